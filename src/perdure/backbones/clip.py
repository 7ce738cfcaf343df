"""CLIP and its relatives from Hugging Face: image and text embeddings in one space."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone, Tower, named_towers
from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import checked
from perdure.options.spec import Spec

# Trained on texts padded to full length, without a mask: anything shorter gives other embeddings.
_PADDED_TO_FULL_LENGTH = ("siglip",)
# Their positions begin behind the number of the padding token.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text")
_MASK = "attention_mask"
# `model_type` of a config -> the name in the mini-language that asks for it.
_OWN_NAMES = {"chinese_clip": "chinese_clip", "vision-text-dual-encoder": "dual"}


@checked
def clip(path: str, input_norm: str = "model") -> "Clip":
    """A model with image and text tower: CLIP, SigLIP and SigLIP 2, ALIGN, and others that transformers knows.

    Features are the projected image embeddings, not normalised to unit length. A SigLIP 2 must be one of fixed
    resolution. The image tower of ALIGN, an EfficientNet, cannot be adapted; its text tower can: `tower="text"`.

    Args:
        path: hub name, or a folder with config, safetensors, tokenizer and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].

    Raises:
        ValueError: when there is no such model, it is incomplete, or it has not both towers.
    """
    return named("clip", path, input_norm)


def named(name: str, path: str, input_norm: str, only: str | None = None) -> "Clip":
    """The model that `path` leads to, for the factory `name`; the others of its arguments as for `read`."""
    # BERT's tokenizer, of the models that have a name of their own, can be a list of words alone.
    tokenizer = "tokenizer*" if only is None else "tokenizer*|vocab.txt"
    written, folder = pretrained.locate(path, "*processor_config.json", tokenizer)
    options = (("path", written),) if input_norm == "model" else (("path", written), ("input_norm", input_norm))
    return read(folder, str(Spec(name, options)), input_norm, only)


def read(folder: str, spec: str, input_norm: str = "model", only: str | None = None) -> "Clip":
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
        room = text.max_position_embeddings
        if text.model_type in _POSITIONS_AFTER_PADDING:
            room -= text.pad_token_id + 1
        self._length = min(tokenizer.model_max_length, room)
        self._padded = model.config.model_type in _PADDED_TO_FULL_LENGTH

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to projected image embeddings (B, dim), not normalised to unit length."""
        return _embeddings(self.model.get_image_features(pixel_values=pixels))

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model's own tokenizer gives, with a mask where the model was trained with one."""
        padding = "max_length" if self._padded else "longest"
        found = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return {name: ids for name, ids in found.items() if not (self._padded and name == _MASK)}

    @property
    def tokens(self) -> str:
        """What `tokenise` does to `labels`, as Python for an export."""
        padding = "max_length" if self._padded else "longest"
        dropped = "; tokens.pop('attention_mask', None)" if self._padded else ""
        return (
            f"tokenizer(labels, padding={padding!r}, truncation=True, max_length={self._length}, return_tensors='pt')"
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
