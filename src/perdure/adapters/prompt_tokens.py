"""Prompt tokens: vectors that pass through an encoder beside the tokens of an image or text (VPT, arXiv:2203.12119)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters.attention_masks import with_masks
from perdure.adapters.injection import hold


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
        if tower == "text":
            for block in blocks[1:]:
                hold(block, [block.register_forward_pre_hook(partial(_pass, self), with_kwargs=True)])
        hold(blocks[-1], [blocks[-1].register_forward_hook(partial(_leave, self, place))])


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
    """Tokens that someone else owns and chooses: there are none but within `giving`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Tensor | None = None

    def now(self) -> Tensor | None:
        """See `PromptBase.now`."""
        return self._values

    @contextmanager
    def giving(self, values: Tensor) -> Iterator[None]:
        """Within, images are encoded with `values`, (m, width) or (B, m, width)."""
        self._values = values
        try:
            yield
        finally:
            self._values = None


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
