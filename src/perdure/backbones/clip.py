"""Pairs of image and text encoders of transformers: CLIP and its kin, pairs put together here, the embedded one."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone, Tower, named_towers
from perdure.backbones.positions import Positions, Side, TextLength, elastic
from perdure.backbones.preprocess import Preprocess
from perdure.backbones.scripts import unread_scripts
from perdure.options.ranges import Count, checked
from perdure.options.spec import Spec

# Trained on texts padded to full length, without a mask: anything shorter gives other embeddings.
_PADDED_TO_FULL_LENGTH = ("siglip",)
# Their positions begin behind the number of the padding token.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text")
_MASK = "attention_mask"
# `model_type` of a config -> the name in the option syntax that asks for it.
_OWN_NAMES = {"chinese_clip": "chinese_clip", "vision-text-dual-encoder": "dual"}


@checked
def clip(
    path: str,
    input_norm: str = "model",
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
    length: TextLength | None = None,
    positions: Positions | None = None,
) -> "Clip":
    """A model with image and text tower: CLIP, SigLIP and SigLIP 2, ALIGN, and others that transformers knows.

    Features are the projected image embeddings, not normalised to unit length. A SigLIP 2 must be one of fixed
    resolution. The image tower of ALIGN, an EfficientNet, cannot be adapted; its text tower can: `tower="text"`.

    Args:
        path: hub name, or a folder with config, safetensors, tokenizer and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.
        length: of texts in tokens, not below its own, which it is when None.
        positions: with `length`, how positions become more, see `perdure.backbones.positions`: "stretch" keeps the
            first 20 as they are (Long-CLIP), "interpolate" none; "stretch" when None.

    Raises:
        ValueError: when there is no such model, it is incomplete, or it has not both towers.
    """
    return elastic(load_named("clip", path, input_norm), size, length, positions).reading(layers, means)


def load_named(name: str, path: str, input_norm: str, only: str | None = None) -> "Clip":
    """The model that `path` leads to, for the factory `name`; the others of its arguments as for `load_clip`."""
    # BERT's tokenizer, of the models that have a name of their own, can be a list of words alone.
    tokenizer = "tokenizer*" if only is None else "tokenizer*|vocab.txt"
    written, folder = pretrained.locate(path, "*processor_config.json", tokenizer)
    options = (("path", written),) if input_norm == "model" else (("path", written), ("input_norm", input_norm))
    return load_clip(folder, str(Spec(name, options)), input_norm, only)


def load_clip(folder: str, spec: str, input_norm: str = "model", only: str | None = None) -> "Clip":
    """The model in `folder`, named `spec`.

    Args:
        folder: with config, safetensors, tokenizer and image processor.
        spec: the text that rebuilds it.
        input_norm: see `clip`.
        only: the one `model_type` that is meant.

    Raises:
        ValueError: when it is of another kind, or incomplete.
    """
    pretrained.check_norm(input_norm)
    with pretrained.reading(folder):
        config = pretrained.read_config(folder)
        if only is not None and config.model_type != only:
            right = _OWN_NAMES.get(config.model_type, "clip" if _both_towers(_kind(config)) else "vision")
            raise ValueError(f"{folder!r} is a {config.model_type} model: write {right}(path=...)")
        preprocess = pretrained.read_preprocess(folder, input_norm)
        model = pretrained.read_model(_model_class(folder, config), folder)
        return Clip(model, read_tokenizer(folder), preprocess, spec)


class Clip(Backbone):
    """See `clip`.

    Args:
        model: a transformers model with `vision_model`, `text_model`, `get_image_features` and `get_text_features`.
        tokenizer: its tokenizer.
        preprocess: its image processor.
        spec: the text that rebuilds this backbone.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, spec: str) -> None:
        super().__init__()
        self.model: Any = pretrained.frozen(model)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.spec = spec
        self.eval()
        self.dim = pretrained.features_of(self)
        # ALIGN keeps the temperature itself; SigLIP's additional bias is left out.
        divides = hasattr(self.model, "temperature")
        self.scale = float(1 / self.model.temperature if divides else self.model.logit_scale.exp())
        text = model.config.text_config
        self.first_position = text.pad_token_id + 1 if text.model_type in _POSITIONS_AFTER_PADDING else 0
        self.length = min(tokenizer.model_max_length, text.max_position_embeddings - self.first_position)
        self._padded = model.config.model_type in _PADDED_TO_FULL_LENGTH

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to projected image embeddings (B, dim), not normalised to unit length."""
        return _embeddings(self.model.get_image_features(pixel_values=pixels))

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model's own tokenizer gives, with a mask where the model was trained with one."""
        padding = "max_length" if self._padded else "longest"
        found = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {name: ids for name, ids in found.items() if not (self._padded and name == _MASK)}

    def unread(self, texts: Sequence[str]) -> list[str]:
        """See `perdure.backbones.scripts`."""
        tokens = lambda word: self.tokenizer(word, add_special_tokens=False)["input_ids"]  # noqa: E731
        return list(unread_scripts(texts, tokens, self.tokenizer.unk_token_id, _READ.get(self.spec.partition("(")[0])))

    def lengthened(self, length: int) -> None:
        """Its tokenizer may say more."""
        self.tokenizer.model_max_length = max(self.tokenizer.model_max_length, length)

    @property
    def tokens(self) -> str:
        """What `tokenise` does to `labels`, as Python for an export."""
        padding = "max_length" if self._padded else "longest"
        dropped = "; tokens.pop('attention_mask', None)" if self._padded else ""
        return (
            f"tokenizer(labels, padding={padding!r}, truncation=True, max_length={self.length}, return_tensors='pt')"
            f"{dropped}"
        )

    def embed_tokens(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Projected embeddings (n, dim), not normalised to unit length."""
        return _embeddings(self.model.get_text_features(**tokens))

    def counted(self, tokens: Mapping[str, Tensor]) -> Tensor | None:
        """The tokenizer's mask; SigLIP reads its padding like words."""
        return tokens[_MASK] > 0 if _MASK in tokens else None

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "model.vision_model", "text": "model.text_model"}

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one encoder with its projection; never the logit scale."""
        of = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
        roots = tuple(f"model.{n}" for t in named_towers(tower) for n in of[t])
        return {name: p for name, p in self.named_parameters() if name.startswith(roots)}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.set_attention(self.model, implementation)


def _embeddings(output: Any) -> Tensor:
    embeddings: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeddings


def _kind(config: Any) -> Any:
    # CLIPModel by name: looking it up through AutoModel imports far more of transformers.
    if config.model_type == "clip":
        from transformers import CLIPModel

        return CLIPModel
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING.get(type(config), None)


def _both_towers(kind: Any) -> bool:
    return hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")


def _model_class(folder: str, config: Any) -> Any:
    if config.model_type == "siglip2":
        raise ValueError(f"{folder!r} is a SigLIP 2 of variable resolution: take one of fixed resolution, such as -224")
    kind = _kind(config)
    if not _both_towers(kind):
        raise ValueError(
            f"{folder!r} is a {config.model_type} model without image and text tower: use vision(path=...) for "
            "features alone, or give a CLIP or SigLIP"
        )
    return kind


def read_tokenizer(folder: str) -> Any:
    """The tokenizer in `folder`.

    Raises:
        ValueError: when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder!r} has no usable tokenizer: copy tokenizer.json and tokenizer_config.json of the original model "
            "there, or use vision(path=...) for the images alone"
        ) from error


@checked
def chinese_clip(
    path: str,
    input_norm: str = "model",
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
    length: TextLength | None = None,
    positions: Positions | None = None,
) -> Clip:
    """A Chinese-CLIP: the vision transformer of CLIP and a Chinese RoBERTa, trained on Chinese captions.

    Features are the projected image embeddings, not normalised to unit length.

    Args:
        path: hub name such as "OFA-Sys/chinese-clip-vit-base-patch16", or a folder with config, safetensors, tokenizer
            (vocab.txt) and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.
        length: of texts in tokens, not below its own, which it is when None.
        positions: with `length`, how positions become more, see `perdure.backbones.positions`: "stretch" keeps the
            first 20 as they are (Long-CLIP), "interpolate" none; "stretch" when None.

    Raises:
        ValueError: when there is no such model, it is incomplete, or of another kind.
    """
    return elastic(load_named("chinese_clip", path, input_norm, only="chinese_clip"), size, length, positions).reading(
        layers, means
    )


_KIND = "vision-text-dual-encoder"


@checked
def dual(
    path: str | None = None,
    vision: str | None = None,
    text: str | None = None,
    input_norm: str = "model",
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
    length: TextLength | None = None,
    positions: Positions | None = None,
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
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.
        length: of texts in tokens, not below its own, which it is when None.
        positions: with `length`, how positions become more, see `perdure.backbones.positions`: "stretch" keeps the
            first 20 as they are (Long-CLIP), "interpolate" none; "stretch" when None.

    Raises:
        ValueError: when a model is missing, incomplete, or of a kind that cannot be a tower.
    """
    pretrained.check_norm(input_norm)
    if path is not None and vision is None and text is None:
        return elastic(load_named("dual", path, input_norm, only=_KIND), size, length, positions).reading(layers, means)
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
    pair = _pair(images, texts, str(Spec("dual", tuple(options))), input_norm)
    return elastic(pair, size, length, positions).reading(layers, means)


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


_READ = {"pocket": "LATIN"}  # see its MODEL_CARD.md


@checked
def pocket(
    layers: Count | None = None,
    means: bool = True,
    size: Side | None = None,
    length: TextLength | None = None,
    positions: Positions | None = None,
) -> Clip:
    """A CLIP of 7 million parameters for images of 48 pixels; the model card in `perdure-pocket` says what it can do.

    The weights come from images that allow research use only, and are a package of their own.

    Args:
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.
        length: of texts in tokens, not below its own, which it is when None.
        positions: with `length`, how positions become more, see `perdure.backbones.positions`: "stretch" keeps the
            first 20 as they are (Long-CLIP), "interpolate" none; "stretch" when None.
    """
    return elastic(load_clip(str(pocket_weights()), "pocket"), size, length, positions).reading(layers, means)


def pocket_weights() -> Path:
    """Folder of the weights of `pocket`, in the package `perdure-pocket`.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        found: Path = import_module("perdure_pocket").CLIP
    except ModuleNotFoundError as error:
        raise ValueError(
            "the weights of pocket() are a package of their own, and it is not installed: pip install 'perdure[demo]' "
            "(in a checkout: pip install ./packages/perdure-pocket), or take the backbone clip(path=...)"
        ) from error
    return found
