"""Pre-trained models by name."""

from collections.abc import Callable

from perdure.backbones.base import Backbone
from perdure.backbones.clip import chinese_clip, clip, dual, pocket
from perdure.backbones.mllm import mllm
from perdure.backbones.open_clip import open_clip
from perdure.backbones.timm import timm
from perdure.backbones.tiny import tiny
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.backbones.vision import vision

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "timm": timm,
    "vision": vision,
    "clip": clip,
    "chinese_clip": chinese_clip,
    "open_clip": open_clip,
    "dual": dual,
    "pocket": pocket,
    "tiny": tiny,
    "mllm": mllm,
    "tiny_mllm": tiny_mllm,
}
"""Name in the option syntax -> factory; its signature is the list of options."""

__all__ = ["BACKBONES", "Backbone"]
