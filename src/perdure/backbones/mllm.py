"""Multimodal language models by path: LLaVA, Qwen-VL, InternVL, SmolVLM and all that transformers loads like them."""

from typing import Annotated, Any, Literal

import torch

from perdure.backbones import pretrained
from perdure.backbones.language import Language
from perdure.options.ranges import Range, checked
from perdure.options.spec import Spec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "4bit", "8bit"]

_PROCESSOR = "processor_config.json|preprocessor_config.json"


@checked
def mllm(
    path: str,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    checkpointing: bool = False,
    length: Annotated[int, Range(16, 10**7)] | None = None,
) -> Language:
    """A multimodal language model, which answers questions about images in words.

    Args:
        path: hub name, or a folder with config, safetensors, processor and chat template.
        dtype: of the weights; "auto" is bfloat16 where the files are, else float32.
        quantize: keep the frozen weights of the language model in 4 or 8 bits, by bitsandbytes; needs a GPU.
        checkpointing: compute activations twice instead of keeping them: less memory, more time a step.
        length: most tokens of a conversation with its answer, image tokens included; as many as the model has
            positions for when None.

    Raises:
        ValueError: when there is no such model, it is incomplete, needs foreign code, has no chat template, or cannot
            be quantised here.
    """
    if quantize != "none":
        _check_quantize(quantize)
    written, folder = pretrained.locate(path, _PROCESSOR)
    options: dict[str, Any] = {"path": written, "dtype": dtype, "quantize": quantize}
    options |= {"checkpointing": checkpointing, "length": length}
    usual = {"dtype": "auto", "quantize": "none", "checkpointing": False, "length": None}
    spec = Spec("mllm", tuple((k, v) for k, v in options.items() if k not in usual or v != usual[k]))
    with pretrained.reading(folder):
        from transformers import AutoModelForImageTextToText

        config = pretrained.read_config(folder)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"{folder!r} is a {config.model_type} model, which answers no questions about images")
        processor = _processor(folder)
        chosen = _dtype(config, dtype)
        more = _quantised(config, quantize, chosen)
        model = pretrained.read_model(AutoModelForImageTextToText, folder, dtype=chosen, **more)
        found = Language(model, processor, str(spec), length, pretrained.hash_of_files(folder))
    if checkpointing:
        model.activation_checkpointing_enable()
        found.checkpointing = True
    return found


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
