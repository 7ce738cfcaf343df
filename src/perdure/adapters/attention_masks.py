"""Attention masks of a text tower, when tokens join those of a text."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def widened(mask: Tensor, m: int) -> Tensor:
    """`mask` for `m` more tokens in front, which all others see.

    These see each other and the rest as the first token sees the second: where no token looks ahead, only the new ones
    before them. So it is also what attention without a mask, but told to be causal, does with more tokens.

    Args:
        mask: (..., L, L) or (..., 1, L), bool or added to the scores (0 or a large negative number).
        m: how many.

    Returns:
        (..., m + L, m + L) or (..., 1, m + L), of the same type.
    """
    boolean = mask.dtype == torch.bool
    wide = F.pad(mask, (m, 0), value=boolean)
    if mask.shape[-2] == 1:
        return wide
    first = wide[..., :1, :]
    visible = first if boolean else first > -1
    ahead = visible[..., m + 1 : m + 2]
    before = torch.ones(m, wide.shape[-1], dtype=torch.bool, device=mask.device).tril()
    top = before | (visible & ahead)
    if not boolean:
        top = torch.zeros_like(top, dtype=mask.dtype).masked_fill(~top, torch.finfo(mask.dtype).min)
    return torch.cat([top, wide], dim=-2)


def with_masks(
    args: tuple[Any, ...], kwargs: dict[str, Any], m: int, length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block or its attention, behind the `length` tokens, with masks among them widened for `m` more.

    Raises:
        RuntimeError: for a mask of another kind, of which nobody knows what it hides.
    """

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fits = value.dim() > 1 and value.shape[-1] == length and value.shape[-2] in (1, length)
        if not fits or not (value.dtype == torch.bool or value.is_floating_point()):
            raise RuntimeError(f"an attention mask is {value.dtype} of shape {tuple(value.shape)}")
        return widened(value, m)

    return (
        tuple(wide(value) if isinstance(value, Tensor) and value.dim() == 4 else value for value in args),
        {name: wide(value) if name.endswith("mask") else value for name, value in kwargs.items()},
    )
