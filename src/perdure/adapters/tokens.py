"""Prompt tokens: vectors that pass through the encoder beside an image's own tokens (VPT, arXiv:2203.12119)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters.attach import hold


class Passing(nn.Module):
    """Tokens that pass through blocks without position; a subclass says which, and when."""

    reads = False
    """Whether the mean of what the tokens became replaces the image's first token when they leave."""

    def now(self) -> Tensor | None:
        """Tokens (m, width), or (B, m, width) where each image has its own; None for none at all."""
        raise NotImplementedError

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Let the tokens pass through consecutive `blocks`, right behind the image's first; then they are dropped.

        To self-attention the order of tokens means nothing. But the class token stays where models look for it, and
        the patches stay last, where models that rotate them by their position (DINOv3) count them from the end.
        """
        hold(blocks[0], [blocks[0].register_forward_pre_hook(partial(_enter, self))])
        hold(blocks[-1], [blocks[-1].register_forward_hook(partial(_leave, self))])


class Tokens(Passing):
    """`values` (m, width): the same m tokens for all images, from a normal distribution of deviation 0.02."""

    def __init__(self, m: int, width: int) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"m={m}: expected at least 1 prompt token")
        self.off = False
        self.values = nn.Parameter(torch.empty(m, width).normal_(std=0.02))

    def now(self) -> Tensor | None:
        """See `Passing.now`."""
        return None if self.off else self.values


class Given(Passing):
    """Tokens that someone else owns and chooses: there are none but within `giving`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Tensor | None = None

    def now(self) -> Tensor | None:
        """See `Passing.now`."""
        return self._values

    @contextmanager
    def giving(self, values: Tensor) -> Iterator[None]:
        """Within, images are encoded with `values`, (m, width) or (B, m, width)."""
        self._values = values
        try:
            yield
        finally:
            self._values = None


def _enter(tokens: Passing, _block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden: Tensor = args[0]
    values = tokens.now()
    if values is None:
        return args
    added = values.to(hidden.dtype).expand(len(hidden), -1, -1)
    return torch.cat([hidden[:, :1], added, hidden[:, 1:]], dim=1), *args[1:]


def _leave(tokens: Passing, _block: nn.Module, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    values = tokens.now()
    if values is None:
        return hidden
    end = 1 + values.shape[-2]
    first = hidden[:, 1:end].mean(1, keepdim=True) if tokens.reads else hidden[:, :1]
    return torch.cat([first, hidden[:, end:]], dim=1)
