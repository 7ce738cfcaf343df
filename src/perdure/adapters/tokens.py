"""Prompt tokens: learnt vectors that pass through the encoder beside an image's own tokens (VPT, arXiv:2203.12119)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters.attach import hold


class Tokens(nn.Module):
    """`values` (m, width): m tokens without position, from a normal distribution of deviation 0.02."""

    def __init__(self, m: int, width: int) -> None:
        super().__init__()
        if m < 1:
            raise ValueError(f"m={m}: expected at least 1 prompt token")
        self.off = False
        self.values = nn.Parameter(torch.empty(m, width).normal_(std=0.02))

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Let the tokens pass through consecutive `blocks`, behind the image's own; then they are dropped.

        To self-attention the order of tokens means nothing, and the class token stays where the model looks for it.
        """
        hold(blocks[0], [blocks[0].register_forward_pre_hook(partial(_enter, self))])
        hold(blocks[-1], [blocks[-1].register_forward_hook(partial(_leave, self))])


def _enter(tokens: Tokens, _block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden: Tensor = args[0]
    if tokens.off:
        return args
    added = tokens.values.to(hidden.dtype).expand(len(hidden), -1, -1)
    return torch.cat([hidden, added], dim=1), *args[1:]


def _leave(tokens: Tokens, _block: nn.Module, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    return hidden if tokens.off else hidden[:, : -len(tokens.values)]
