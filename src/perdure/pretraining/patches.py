"""Images as patches: which of them are hidden, and what a vision transformer makes of each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.types import Batch


def grid_of(backbone: Backbone) -> int:
    """Patches along a side of an image, whatever tokens stand before them.

    Raises:
        ValueError: when the vision tower has no blocks, or its tokens are no square of patches.
    """
    tokens = backbone.before(0, backbone.sample()).shape[1]
    grid = int(tokens**0.5)  # a class token and registers are fewer than would make the next square
    if grid < 2 or backbone.preprocess.size % grid:
        raise ValueError(
            f"{backbone.spec} reads an image as {tokens} tokens, which are no square of patches: use a ViT"
        )
    return grid


def hidden_patches(learner: Core, count: int, grid: int, ratio: float) -> Tensor:
    """Which patches of `count` images a step hides, bool (count, grid²): `ratio` of each image's, neither 0 nor all."""
    order = torch.rand(count, grid**2, generator=learner.generator("hidden patches", learner.step)).argsort(1)
    return (order < min(max(1, round(ratio * grid**2)), grid**2 - 1)).to(learner.device)


def without(backbone: Backbone, image: Tensor, hidden: Tensor) -> Tensor:
    """Images uint8 (B, 3, S, S) whose `hidden` patches have the mean colour that the model was trained with."""
    grid, side = int(hidden.shape[1] ** 0.5), image.shape[-1]
    mask = F.interpolate(hidden.view(-1, 1, grid, grid).float(), size=side, mode="nearest") > 0
    mean = torch.tensor(backbone.preprocess.mean, device=image.device)
    colour = (255 * mean).round().to(torch.uint8).view(1, 3, 1, 1)
    return torch.where(mask, colour, image)


def patches_of(image: Tensor, grid: int) -> Tensor:
    """Images (B, 3, S, S) as patches (B, grid², 3 · (S / grid)²), row after row."""
    return F.unfold(image.float(), image.shape[-1] // grid, stride=image.shape[-1] // grid).transpose(1, 2)


def tokens_of(learner: Core, batch: Batch, grid: int) -> Tensor:
    """What the last vision block gives for each patch, (B, grid², width) in float32."""
    taken: list[Tensor] = []

    def take(_block: nn.Module, _args: Any, output: Any) -> None:
        taken.append(output if isinstance(output, Tensor) else output[0])

    backbone = learner.backbone
    handle = backbone.get_submodule(backbone.blocks()[-1]).register_forward_hook(take)
    try:
        learner.encode(batch)
    finally:
        handle.remove()
    return taken[0][:, -(grid**2) :].float()
