"""Pre-trained models by name."""

from collections.abc import Callable

from perdure.backbones.base import Backbone
from perdure.backbones.clip import clip
from perdure.backbones.pocket import pocket
from perdure.backbones.timm import timm
from perdure.backbones.tiny import tiny
from perdure.backbones.vision import vision

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "timm": timm,
    "vision": vision,
    "clip": clip,
    "pocket": pocket,
    "tiny": tiny,
}
"""Name in the mini-language -> factory; its signature is the list of options."""

__all__ = ["BACKBONES", "Backbone"]
