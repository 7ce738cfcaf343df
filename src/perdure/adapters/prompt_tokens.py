"""Prompt tokens that pass through the blocks beside the input's own, and the attention masks that let them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import before_recorders, hold
from perdure.adapters.state import assigned


class PromptBase(nn.Module):
    """Tokens that pass through blocks without position; a subclass says which, and when."""

    reads = False
    """Whether the mean of what the tokens became replaces the image's first token when they leave."""

    def now(self) -> Tensor | None:
        """Tokens (m, width), or (B, m, width) where each image has its own; None for none at all."""
        raise NotImplementedError

    def attach(self, blocks: Sequence[nn.Module], tower: str = "vision") -> None:
        """Let the tokens pass through consecutive `blocks` of `tower`; then they are dropped.

        To self-attention the order of tokens means nothing. Among those of an image they stand right behind the first:
        the class token stays where models look for it, and the patches stay last, where models that rotate them by
        their position (DINOv3) count them from the end. In a text they stand in front of all, so that tokens which
        only see what is before them see these.
        """
        place = 1 if tower == "vision" else 0
        hold(blocks[0], [blocks[0].register_forward_pre_hook(partial(_enter, self, place), with_kwargs=True)])
        if tower in ("text", "language"):
            for block in blocks[1:]:
                hold(block, [block.register_forward_pre_hook(partial(_pass, self), with_kwargs=True)])
        hold(blocks[-1], [before_recorders(blocks[-1], partial(_leave, self, place))])


class PromptTokens(PromptBase):
    """`values` (m, width): the same m tokens for all images or texts, from a normal distribution of deviation 0.02."""

    def __init__(self, m: int, width: int) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"m={m}: expected at least 1 prompt token")
        self.off = False
        self.values = nn.Parameter(torch.empty(m, width, dtype=torch.float32).normal_(std=0.02))

    def now(self) -> Tensor | None:
        """See `PromptBase.now`."""
        return None if self.off else self.values


class RoutedPrompts(PromptBase):
    """Tokens that someone else owns and chooses: there are none but within `using`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Tensor | None = None

    def now(self) -> Tensor | None:
        """See `PromptBase.now`."""
        return self._values

    def using(self, values: Tensor) -> AbstractContextManager[None]:
        """Within, images are encoded with `values`, (m, width) or (B, m, width)."""
        return assigned([self], "_values", [values])


def _enter(
    tokens: PromptBase, place: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    hidden: Tensor = args[0]
    values = tokens.now()
    if values is None:
        return None
    added = values.to(hidden.dtype).expand(len(hidden), -1, -1)
    rest, options = with_masks(args[1:], kwargs, values.shape[-2], hidden.shape[1])
    return (torch.cat([hidden[:, :place], added, hidden[:, place:]], dim=1), *rest), options


def _pass(
    tokens: PromptBase, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    values = tokens.now()
    if values is None:
        return None
    more = values.shape[-2]
    rest, options = with_masks(args[1:], kwargs, more, args[0].shape[1] - more)
    return (args[0], *rest), options


def _leave(tokens: PromptBase, place: int, _block: nn.Module, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    values = tokens.now()
    if values is None:
        return hidden
    end = place + values.shape[-2]
    first = hidden[:, place:end].mean(1, keepdim=True) if tokens.reads else hidden[:, :place]
    return torch.cat([first, hidden[:, end:]], dim=1)


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

    options = {name: wide(value) if name.endswith("mask") else value for name, value in kwargs.items()}
    turns = options.get("position_embeddings")
    if turns is not None and turns[0].shape[-2] == length:
        # cosines and sines, by which the queries and keys of each token are turned: those of more tokens are not
        options["position_embeddings"] = tuple(
            F.pad(each, (0, 0, m, 0), value=float(part == 0)) for part, each in enumerate(turns)
        )
    return tuple(wide(value) if isinstance(value, Tensor) and value.dim() == 4 else value for value in args), options
