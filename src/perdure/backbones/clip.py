"""CLIP and its relatives from Hugging Face: image and text embeddings in one space."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone, Tower
from perdure.images import Preprocess
from perdure.spec import Spec

# Trained on texts padded to full length, without a mask: anything shorter gives other embeddings.
_PADDED_TO_FULL_LENGTH = ("siglip",)


def clip(path: str, input_norm: str = "model") -> "Clip":
    """A model with image and text tower: CLIP, SigLIP, Chinese-CLIP and others that transformers knows.

    Features are the projected image embeddings, not normalised to unit length.

    Args:
        path: hub name, or a folder with config, safetensors, tokenizer and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].

    Raises:
        ValueError: when there is no such model, it is incomplete, or it has not both towers.
    """
    written, folder = pretrained.locate(path, "*processor_config.json", "tokenizer*")
    options = (("path", written),) if input_norm == "model" else (("path", written), ("input_norm", input_norm))
    return read(folder, str(Spec("clip", options)), input_norm)


def read(folder: str, spec: str, input_norm: str = "model") -> "Clip":
    """The model in `folder`, named `spec`."""
    pretrained.check_norm(input_norm)
    with pretrained.reading(folder):
        config = pretrained.read_config(folder)
        preprocess = pretrained.read_preprocess(folder, input_norm)
        model = pretrained.read_model(_model_class(folder, config), folder)
        return Clip(model, _tokenizer(folder), preprocess, spec)


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
        text = model.config.text_config
        self._length = min(tokenizer.model_max_length, text.max_position_embeddings)
        self._padding = "max_length" if model.config.model_type in _PADDED_TO_FULL_LENGTH else "longest"

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to projected image embeddings (B, dim), not normalised to unit length."""
        return _embeddings(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Projected embeddings (n, dim) of `texts`, not normalised to unit length; what is too long is cut off."""
        tokens = self.tokenizer(
            list(texts), padding=self._padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return _embeddings(self.model.get_text_features(**tokens.to(self.model.device)))

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature of image-text scores, a positive scalar; SigLIP's additional bias is left out."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale.reshape(())

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "model.vision_model", "text": "model.text_model"}

    def tower_parameters(self, tower: Tower) -> dict[str, nn.Parameter]:
        """Parameters of one encoder with its projection; never the logit scale."""
        of = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
        roots = tuple(f"model.{n}" for t in (of if tower == "both" else (tower,)) for n in of[t])
        return {name: p for name, p in self.named_parameters() if name.startswith(roots)}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.set_attention(self.model, implementation)


def _embeddings(output: Any) -> Tensor:
    embeddings: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeddings


def _model_class(folder: str, config: Any) -> Any:
    # CLIPModel by name: looking it up through AutoModel imports far more of transformers.
    if config.model_type == "clip":
        from transformers import CLIPModel

        return CLIPModel
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(config), None)
    if config.model_type == "siglip2":
        raise ValueError(f"{folder!r} is a SigLIP 2 of variable resolution: take one of fixed resolution, such as -224")
    if not hasattr(kind, "get_image_features") or not hasattr(kind, "get_text_features"):
        raise ValueError(
            f"{folder!r} is a {config.model_type} model without image and text tower: use vision(path=...) for "
            "features alone, or give a CLIP or SigLIP"
        )
    return kind


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder!r} has no usable tokenizer: copy tokenizer.json and tokenizer_config.json of the original model "
            "there, or use vision(path=...) for the images alone"
        ) from error
