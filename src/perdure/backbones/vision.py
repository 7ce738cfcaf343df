"""Vision transformers from Hugging Face: ViT, DeiT, DINOv2, and the vision towers of CLIP and SigLIP."""

from typing import Any

from torch import Tensor

from perdure.backbones import pretrained
from perdure.backbones.base import Backbone
from perdure.backbones.positions import Side, elastic
from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import Count, checked
from perdure.options.spec import Spec

# `model_type` of a config -> class. Only what was checked: of a model with another layout, token 0 would be read as
# the class token without complaint.
_CLASS_TOKEN = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "vit_msn": "ViTMSNModel",
}
_POOLED = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "chinese_clip": "ChineseCLIPVisionModel",
    "metaclip_2": "MetaClip2VisionModel",
}
# Their own pooler is random in most checkpoints.
_WITH_POOLER = ("vit", "deit")


@checked
def vision(
    path: str, input_norm: str = "model", layers: Count | None = None, means: bool = True, size: Side | None = None
) -> "Vision":
    """A vision transformer: ViT, DeiT, DINOv2 and 3, or the vision tower of a CLIP or SigLIP.

    Features are the class token after the last norm; for CLIP the same, and for SigLIP the output of its attention
    pooling, both before any projection.

    Args:
        path: hub name, or a folder with config, safetensors and image processor.
        input_norm: "model" for the mean and deviation of the image processor, "none" for raw pixels in [0, 1].
        layers: features are tokens of the last so many blocks in place of the model's own, see `Backbone.reading`.
        means: with `layers`, the mean of a block's other tokens beside its first.
        size: side of images in pixels, a multiple of the patch; positions are interpolated. Its own when None.

    Raises:
        ValueError: when there is no such model, it is incomplete, or of another kind.
    """
    pretrained.check_norm(input_norm)
    written, folder = pretrained.locate(path, "*processor_config.json")
    options = (("path", written),) if input_norm == "model" else (("path", written), ("input_norm", input_norm))
    with pretrained.reading(folder):
        config = pretrained.read_config(folder)
        kind, pooled = _kind(folder, config)
        preprocess = pretrained.read_preprocess(folder, input_norm)
        extra = {"add_pooling_layer": False} if config.model_type in _WITH_POOLER else {}
        model = pretrained.read_model(kind, folder, **extra)
        made = Vision(model, pooled, preprocess, str(Spec("vision", options)))
        return elastic(made, size).reading(layers, means)


class Vision(Backbone):
    """See `vision`.

    Args:
        model: a transformers model that maps `pixel_values` to `last_hidden_state` and `pooler_output`.
        pooled: whether the features are `pooler_output`, or the first token of `last_hidden_state`.
        preprocess: its image processor.
        spec: the text that rebuilds this backbone.
    """

    def __init__(self, model: Any, pooled: bool, preprocess: Preprocess, spec: str) -> None:
        super().__init__()
        self.model: Any = pretrained.frozen(model)
        self.pooled = pooled
        self.preprocess = preprocess
        self.spec = spec
        self.eval()
        self.dim = pretrained.features_of(self)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) to features (B, dim)."""
        output = self.model(pixel_values=pixels)
        features: Tensor = output.pooler_output if self.pooled else output.last_hidden_state[:, 0]
        return features

    def towers(self) -> dict[str, str]:
        """Tower -> dotted name of its module."""
        return {"vision": "model"}

    def set_attention(self, implementation: pretrained.Attention) -> None:
        """Choose how attention is computed; the result is the same up to rounding."""
        pretrained.set_attention(self.model, implementation)


def _kind(folder: str, config: Any) -> tuple[Any, bool]:
    import transformers

    kind = config.model_type.removesuffix("_vision_model")
    name = _POOLED.get(kind) or _CLASS_TOKEN.get(kind)
    if name is None or not hasattr(transformers, name):
        known = ", ".join(sorted(_CLASS_TOKEN | _POOLED))
        raise ValueError(f"{folder!r} is a {config.model_type} model; vision(path=...) reads: {known}")
    tower = getattr(config, "vision_config", config)
    if kind == "siglip" and not tower.vision_use_head:
        raise ValueError(f"{folder!r} is a SigLIP without pooling head, so it gives no features of a whole image")
    return getattr(transformers, name), kind in _POOLED
