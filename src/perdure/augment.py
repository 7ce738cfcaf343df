"""Random views of training images, on the device, a batch at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.types import Batch

Augment = Callable[[Batch, torch.Generator], Batch]


def none(batch: Batch, generator: torch.Generator) -> Batch:
    """The images as they are; features of a frozen encoder can then be computed once."""
    return batch


def flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Half of the images mirrored left to right."""
    return batch | {"image": _flip(batch["image"], generator)}


def crop(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirrored, then shifted by up to an eighth of the side, with reflected borders."""
    image = _flip(batch["image"], generator)
    side = image.shape[-1]
    pad = max(1, side // 8)
    shifts = torch.randint(2 * pad + 1, (2, len(image), 1), generator=generator).to(image.device)
    rows, columns = shifts + torch.arange(side, device=image.device)
    padded = F.pad(image.float(), (pad, pad, pad, pad), mode="reflect").to(image.dtype)
    example = torch.arange(len(image), device=image.device)[:, None, None]
    return batch | {"image": padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)}


def _flip(image: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(image), generator=generator) < 0.5
    return torch.where(chosen.to(image.device)[:, None, None, None], image.flip(-1), image)


AUGMENTS: dict[str, Augment] = {"none": none, "flip": flip, "crop": crop}
