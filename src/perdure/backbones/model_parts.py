"""What a multimodal model of transformers is made of: its projector, the blocks that are read, its image tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from perdure.backbones.preprocess import Preprocess


def projectors(model: Any) -> tuple[str, ...]:
    """Dotted names of what stands between the towers; in Qwen's models it is the last part of the vision tower."""
    names = {id(module): name for name, module in model.named_modules()}
    body = model.model.base_model
    vision, language = body.get_encoder("image"), body.get_decoder()
    beside = [each for each in body.children() if each not in (vision, language) and [*each.parameters()]]
    within = sorted((name, each) for name, each in vision.named_children() if "merger" in name)
    return tuple(names[id(each)] for each in (*beside, *(each for _, each in reversed(within))))


def beside_language(model: Any) -> list[Any]:
    """All parts of a model of transformers but its language tower and its head: what looks at images."""
    body = model.base_model
    return [each for each in body.children() if body.get_decoder() not in each.modules()]


def unread(config: Any) -> int:
    """How many blocks at the vision tower's end nobody reads: LLaVA takes what enters its last one."""
    layer = getattr(config, "vision_feature_layer", -1)
    last = max(layer) if isinstance(layer, Sequence) else layer
    depth = getattr(config.vision_config, "num_hidden_layers", 0)
    return -last - 1 if last < 0 else depth - last


def image_tokens(config: Any) -> list[int]:
    """Ids of the tokens in whose places images and videos stand."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return sorted({each for each in found if isinstance(each, int)})


def preprocess_of(config: Any) -> Preprocess:
    """How images are shown that come without a conversation, as in a stream of classes: whole, at the model's size."""
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None) or 224
    side = int(size[0] if isinstance(size, Sequence) else size)
    return Preprocess(size=side, resize=side)


@contextmanager
def checkpointed(model: nn.Module, asked: bool) -> Iterator[None]:
    """Within, blocks keep no activations where that is `asked` for: transformers looks whether a block trains."""
    asked = asked and torch.is_grad_enabled()
    layers = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)] if asked else []
    try:
        for each in layers:
            each.training = True  # of the block alone: what is within it, dropout, stays as it is
        yield
    finally:
        for each in layers:
            each.training = False
