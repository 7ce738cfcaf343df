"""A tiny random LLaVA, the same on every machine: for tests and examples, made at once and without files."""

from typing import Annotated, Any

import torch

from perdure.backbones.language import Language
from perdure.options.ranges import Range, Seed, checked
from perdure.options.spec import Spec
from perdure.process import ALONE

_PATCH = 14  # side, in pixels
_HEADS = 4
_SPECIAL = ("<pad>", "<|end|>", "<|turn|>", "<image>")
_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@checked
def tiny_mllm(
    dim: Annotated[int, Range(4 * _HEADS, 1024)] = 32,
    depth: Annotated[int, Range(1, 16)] = 2,
    size: Annotated[int, Range(_PATCH, 16 * _PATCH)] = 2 * _PATCH,
    seed: Seed = 7,
    length: Annotated[int, Range(16, 2048)] = 2048,
) -> Language:
    """A LLaVA of random weights, for tests: milliseconds a step, no files; its tokens are bytes, so it reads any text.

    Args:
        dim: width of both towers; a multiple of 16.
        depth: blocks of each tower.
        size: side of the images, in pixels; a multiple of 14, each patch of which is an image token.
        seed: of the weights; the random state of torch is left alone.
        length: see `mllm`.
    """
    for name, value, unit in (("dim", dim, 4 * _HEADS), ("size", size, _PATCH)):
        if value % unit:
            raise ValueError(f"{name}={value}: expected a multiple of {unit}, for example {name}={2 * unit}")
    spec = Spec("tiny_mllm", (("dim", dim), ("depth", depth), ("size", size), ("seed", seed), ("length", length)))
    with ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = _llava(dim, depth, size)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # wider than models begin, so that answers differ
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return Language(model, processor, str(spec), length)


def _llava(dim: int, depth: int, size: int) -> tuple[Any, Any]:
    import transformers as hf

    tokenizer = _tokenizer()
    pad, end, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<|end|>", "<image>"))
    shape = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": _HEADS}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**shape, intermediate_size=2 * dim, image_size=size, patch_size=_PATCH),
        text_config=hf.LlamaConfig(
            **shape,
            intermediate_size=2 * dim,
            num_key_value_heads=_HEADS // 2,
            max_position_embeddings=2048,
            vocab_size=len(tokenizer),
            pad_token_id=pad,
            eos_token_id=end,
            bos_token_id=None,
        ),
        image_token_index=image,
        image_seq_length=(size // _PATCH) ** 2,
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config).float()
    model.generation_config = hf.GenerationConfig(eos_token_id=end, pad_token_id=pad)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return model, processor


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", eos_token="<|end|>")
