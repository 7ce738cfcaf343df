"""Random views of training images, on the device, a batch at a time."""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.types import Batch

Augment = Callable[[Batch, torch.Generator], Batch]
_TRIES = 10  # windows drawn for an image, as in torchvision


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


def zoom(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirrored, then a random window of 5 to 100 % of the area and of aspect 3:4 to 4:3, enlarged to the full side.

    As torchvision's RandomResizedCrop(scale=(0.05, 1)), but cut from the image as the model would see it, so that what
    the central crop leaves out is never shown.
    """
    image = _flip(batch["image"], generator)
    count, side = len(image), image.shape[-1]
    high, wide = _windows(count, side, generator)
    corner = torch.rand(2, count, generator=generator, dtype=torch.float32)
    # Beyond the window's outer pixels its border is repeated, as if it had been cut out first.
    rows, columns = (
        (corner[axis] * (side - extent + 1)).floor()[:, None]
        + ((torch.arange(side, dtype=torch.float32) + 0.5) * extent[:, None] / side - 0.5)
        .clamp(min=0)
        .minimum(extent[:, None] - 1)
        for axis, extent in enumerate((high, wide))
    )
    grid = torch.stack([columns[:, None, :].expand(-1, side, -1), rows[:, :, None].expand(-1, -1, side)], -1)
    grid = ((2 * grid + 1) / side - 1).to(image.device)
    enlarged = F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)
    return batch | {"image": enlarged.round().to(image.dtype)}


def _windows(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Heights and widths (count,) in whole pixels: of each image's tries the first that fits, else the full side."""
    area = torch.empty(count, _TRIES, dtype=torch.float32).uniform_(0.05, 1, generator=generator) * side**2
    bound = math.log(4 / 3)
    ratio = torch.empty_like(area).uniform_(-bound, bound, generator=generator).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round().clamp(min=1)
    fits = (sides <= side).all(0)
    first = torch.where(fits, torch.arange(_TRIES), _TRIES).argmin(1)
    high, wide = sides.gather(2, first.expand(2, count)[..., None]).squeeze(2)
    fitted = fits.any(1)
    return torch.where(fitted, high, side), torch.where(fitted, wide, side)


def _flip(image: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(image), generator=generator, dtype=torch.float32) < 0.5
    return torch.where(chosen.to(image.device)[:, None, None, None], image.flip(-1), image)


AUGMENTS: dict[str, Augment] = {"none": none, "flip": flip, "crop": crop, "zoom": zoom}


def check_views(name: str | None, asks: Collection[str]) -> None:
    """Refuse a view, a name of `AUGMENTS` or none, where what is learnt shows its images as they are.

    Args:
        name: as it was given.
        asks: what the objective asks for.

    Raises:
        ValueError: with the remedy.
    """
    if name not in (None, "none") and "conversations" in asks:
        raise ValueError(
            f"augment={name!r} has no effect on conversations, which may ask where things are and so show their images "
            "as they stand: leave it out"
        )
