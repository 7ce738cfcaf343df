"""Multimodal language models by path: LLaVA, Qwen-VL, InternVL, SmolVLM and all that transformers loads like them."""

from typing import Annotated, Any, Literal

import torch

from perdure.backbones import pretrained
from perdure.backbones.language import Language
from perdure.options.ranges import Range, checked, without_effect
from perdure.options.spec import Spec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "4bit", "8bit"]
Rope = Literal["linear", "ntk", "yarn"]

_PROCESSOR = "processor_config.json|preprocessor_config.json"


@checked
def mllm(
    path: str,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    checkpointing: bool = False,
    length: Annotated[int, Range(16, 10**7)] | None = None,
    rope: Rope | None = None,
    factor: Annotated[float, Range(1, 1024)] | None = None,
) -> Language:
    """A multimodal language model, which answers questions about images in words.

    Args:
        path: hub name, or a folder with config, safetensors, processor and chat template.
        dtype: of the weights; "auto" is bfloat16 where the files are, else float32.
        quantize: keep the frozen weights of the language model in 4 or 8 bits, by bitsandbytes; needs a GPU.
        checkpointing: compute activations twice instead of keeping them: less memory, more time a step.
        length: most tokens of a conversation with its answer, image tokens included; as many as the model has
            positions for when None.
        rope: how rotary positions make room for `factor` times as many tokens, see `longer`.
        factor: with `rope`; 1 changes nothing.

    Raises:
        ValueError: when there is no such model, it is incomplete, needs foreign code, has no chat template, or cannot
            be quantised here.
    """
    if quantize != "none":
        _check_quantize(quantize)
    if rope is None:
        without_effect("without rope", factor=factor)
    if rope is not None and factor is None:
        raise ValueError(f"rope={rope!r} has no effect without factor: add factor=2 for twice as many tokens")
    written, folder = pretrained.locate(path, _PROCESSOR)
    options: dict[str, Any] = {"path": written, "dtype": dtype, "quantize": quantize}
    options |= {"checkpointing": checkpointing, "length": length}
    usual = {"dtype": "auto", "quantize": "none", "checkpointing": False, "length": None}
    scaled: dict[str, Any] = {"rope": rope, "factor": factor} if rope and factor != 1 else {}
    options |= scaled
    spec = Spec("mllm", tuple((k, v) for k, v in options.items() if k not in usual or v != usual[k]))
    with pretrained.reading(folder):
        from transformers import AutoModelForImageTextToText

        config = pretrained.read_config(folder)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"{folder!r} is a {config.model_type} model, which answers no questions about images")
        if scaled:
            longer(config, folder=folder, **scaled)
        processor = _processor(folder)
        chosen = _dtype(config, dtype)
        more = _quantised(config, quantize, chosen)
        model = pretrained.read_model(AutoModelForImageTextToText, folder, config=config, dtype=chosen, **more)
        found = Language(model, processor, str(spec), length, pretrained.hash_of_files(folder))
    found.changed = ", ".join(f"{name}={value}" for name, value in scaled.items())
    if checkpointing:
        model.activation_checkpointing_enable()
        found.checkpointing = True
    return found


def longer(config: Any, rope: Rope, factor: float, folder: str) -> None:
    """Let a configuration of transformers say that rotary positions make room for `factor` times as many tokens.

    `linear` divides positions by the factor (Chen et al., 2023, arXiv:2306.15595). `ntk` raises the base b to
    b · factor^(d / (d - 2)), d the width of a head, which leaves the fastest rotation as it is and divides the slowest
    by the factor (NTK-aware scaling, bloc97, 2023). `yarn` divides slow rotations only and sharpens attention (Peng et
    al., ICLR 2024, arXiv:2309.00071). transformers computes them all.

    Raises:
        ValueError: when the model has no rotary positions of one kind, or they are scaled already.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    if given.get("rope_type") != "default":
        kind = given.get("rope_type", "none, or several kinds")
        raise ValueError(f"rope={rope!r}: {folder!r} has rotary positions {kind!r}, expected 'default': leave it out")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = int(width * given.get("partial_rotary_factor", 1.0))
    own = text.max_position_embeddings
    if rope == "ntk":
        scaled = {"rope_theta": given["rope_theta"] * factor ** (width / (width - 2))}
    else:
        scaled = {"rope_type": rope, "factor": float(factor)}
        scaled |= {"original_max_position_embeddings": own} if rope == "yarn" else {}
    text.rope_parameters = given | scaled
    text.max_position_embeddings = int(own * factor)


def _processor(folder: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder!r} has no usable processor: copy processor_config.json, preprocessor_config.json and the "
            "tokenizer's files of the original model there; they say how images and texts are read"
        ) from error


def _dtype(config: Any, asked: Dtype) -> torch.dtype:
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return torch.bfloat16 if own in (torch.bfloat16, "bfloat16") else torch.float32


def _check_quantize(quantize: str) -> None:
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        raise ValueError(f"quantize={quantize!r} needs a GPU with CUDA, and there is none: leave it out")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize={quantize!r} needs bitsandbytes: pip install bitsandbytes, or leave it out")


def _quantised(config: Any, quantize: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """Options for the model: weights of the language model's layers in 4 (NF4, twice quantised) or 8 bits."""
    if quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", "vision_tower", "visual", "vision_model", "multi_modal_projector", "connector"]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    bits = {"load_in_4bit": True, **four} if quantize == "4bit" else {"load_in_8bit": True}
    return {
        "quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=skipped),
        "device_map": {"": torch.cuda.current_device()},
    }
