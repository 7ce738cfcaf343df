"""Any two towers in one space: a vision and a text encoder from Hugging Face, each with a projection."""

from typing import Any

import torch
from torch import Tensor

from perdure.backbones import pretrained
from perdure.backbones.clip import Clip, named, read_tokenizer
from perdure.options.ranges import checked
from perdure.options.spec import Spec

_KIND = "vision-text-dual-encoder"


@checked
def dual(
    path: str | None = None, vision: str | None = None, text: str | None = None, input_norm: str = "model"
) -> Clip:
    """A dual encoder: one that was saved whole, or two encoders that have never met.

    Of two encoders the projections to the common space of 512 dimensions are new, and so is a pooling layer that the
    weights lack; they are the same in every process. Until both have been learnt, for example with
    `finetune(tower="both")` on captions, images and texts have nothing to do with each other; adapters leave them as
    they are.

    Args:
        path: hub name or folder of a `VisionTextDualEncoderModel` with tokenizer and image processor.
        vision: instead, hub name or folder of a ViT, DeiT, DINOv2, CLIP or SigLIP (its vision tower).
        text: with it, hub name or folder of a BERT, RoBERTa or CLIP (its text tower).
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].

    Raises:
        ValueError: when a model is missing, incomplete, or of a kind that cannot be a tower.
    """
    pretrained.check_norm(input_norm)
    if path is not None and vision is None and text is None:
        return named("dual", path, input_norm, only=_KIND)
    if path is not None or vision is None or text is None:
        given = {"path": path, "vision": vision, "text": text}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"dual({shown}): give path= of a dual encoder that was saved whole, or vision= and text= of two encoders"
        )
    seen, images = pretrained.locate(vision, "*processor_config.json", option="vision")
    heard, texts = pretrained.locate(text, "tokenizer*|vocab.txt", option="text")
    options = [("vision", seen), ("text", heard)]
    if input_norm != "model":
        options.append(("input_norm", input_norm))
    return _pair(images, texts, str(Spec("dual", tuple(options))), input_norm)


def _pair(images: str, texts: str, spec: str, input_norm: str) -> Clip:
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    with pretrained.reading(images):
        seeing = _tower("vision", images)
        preprocess = pretrained.read_preprocess(images, input_norm)
        with pretrained.fitting(spec, preprocess.size):
            seen = _pooled(
                seeing, pixel_values=torch.zeros(1, 3, preprocess.size, preprocess.size, dtype=torch.float32)
            )
        _check("vision", images, seeing, seen)
    with pretrained.reading(texts):
        hearing = _tower("text", texts)
        tokenizer = read_tokenizer(texts)
        _check("text", texts, hearing, _pooled(hearing, input_ids=tokenizer(["a"], return_tensors="pt").input_ids))
        config = VisionTextDualEncoderConfig.from_vision_text_configs(seeing.config, hearing.config)
        model = VisionTextDualEncoderModel(config=config, vision_model=seeing, text_model=hearing)
        for projection in ("visual_projection", "text_projection"):
            pretrained.draw(model.get_parameter(f"{projection}.weight"), projection)
        return Clip(model, tokenizer, preprocess, spec)


def _tower(which: str, folder: str) -> Any:
    from transformers import MODEL_MAPPING

    config = pretrained.read_config(folder)
    config = getattr(config, f"{which}_config", config)
    kind = MODEL_MAPPING.get(type(config), None)
    reads = {"vision": "pixel_values", "text": "input_ids"}[which]
    if kind is None or kind.main_input_name != reads or not hasattr(config, "hidden_size"):
        raise _unfit(which, folder, f"it is a {config.model_type} model")
    return pretrained.read_model(kind, folder, "pooler.").eval()


@torch.no_grad()
def _pooled(tower: Any, **inputs: Tensor) -> Tensor | None:
    found: Tensor | None = getattr(tower(**inputs), "pooler_output", None)
    return found


def _check(which: str, folder: str, tower: Any, pooled: Tensor | None) -> None:
    """Raise ValueError unless the tower gives one vector of its width for each input."""
    if pooled is None or tuple(pooled.shape) != (1, tower.config.hidden_size):
        raise _unfit(which, folder, f"a {type(tower).__name__} gives no pooled vector")


def _unfit(which: str, folder: str, reason: str) -> ValueError:
    known = {"vision": "ViT, DeiT, DINOv2, CLIP or SigLIP", "text": "BERT, RoBERTa or CLIP"}[which]
    return ValueError(f"{which}={folder!r} cannot be the {which} tower of a dual encoder: {reason}; take a {known}")
