"""Prefixes: keys and values that join those of an input's tokens in self-attention (arXiv:2101.00190).

softmax(q [p_K; K]ᵀ / √d) [p_V; V] for every query of the block, whose output keeps its length. The model computes it
itself: its attention runs on as many more tokens in front, of which a hook replaces keys and values by the prefix, and
which are cut off before the output projection. So it is exact in any kind of attention: fused or separate projections,
eager or fused kernels, with scaled or normalised keys, masks, gates, or registers before rotated positions.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import hold
from perdure.adapters.prompt_tokens import with_masks
from perdure.adapters.state import assigned
from perdure.types import Site


class Prefix(nn.Module):
    """Company for keys and values in some blocks of a tower: what is given for a while, else its own.

    Args:
        values: its own, (blocks, length, 2 · width), keys beside values; a parameter. Without them it is off whenever
            nothing is given, and the encoder is the pre-trained one.
    """

    def __init__(self, values: Tensor | None = None) -> None:
        super().__init__()
        self.values = None if values is None else nn.Parameter(values)
        self._given: Sequence[Tensor] | None = None
        self.joined = 0  # layers' outputs that it has joined

    def attach(self, model: nn.Module, keys: Sequence[Site], values: Sequence[Site], outs: Sequence[Site]) -> int:
        """Stand in the attention of some blocks, of each of which the three projections are given.

        Returns:
            how many layers give keys or values, so how often `joined` rises in a forward pass.
        """
        layers = 0
        for number, (key, value, out) in enumerate(zip(keys, values, outs, strict=True)):
            attention = model.get_submodule(key.layer.rpartition(".")[0])
            handles = [attention.register_forward_pre_hook(partial(_widen, self, number), with_kwargs=True)]
            for layer, pieces in _by_layer(key, value).items():
                hook = partial(_join, self, number, pieces)
                handles.append(model.get_submodule(layer).register_forward_hook(hook))
                layers += 1
            handles.append(model.get_submodule(out.layer).register_forward_pre_hook(partial(_narrow, self, number)))
            hold(attention, handles)
        return layers

    def using(self, values: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Within, one (length, 2 · width) or (B, length, 2 · width) per block joins: keys beside values."""
        return assigned([self], "_given", [values])

    def of(self, number: int) -> Tensor | None:
        """What joins block number `number` of those attached."""
        if self._given is not None:
            return self._given[number]
        return None if self.values is None else self.values[number]


def starting_prefix(*shape: int) -> Tensor:
    """Small keys and values, which attract all queries alike and add next to nothing."""
    return torch.empty(*shape, dtype=torch.float32).normal_(std=0.02)


def _by_layer(key: Site, value: Site) -> dict[str, list[tuple[slice, slice]]]:
    """Layer -> (its rows, what of a prefix goes there); one piece where a fused layer gives values behind keys."""
    width = key.fan_out
    if key.layer == value.layer and key.rows[1] == value.rows[0]:
        return {key.layer: [(slice(key.rows[0], value.rows[1]), slice(None))]}
    found: dict[str, list[tuple[slice, slice]]] = {}
    for site, part in ((key, slice(width)), (value, slice(width, None))):
        found.setdefault(site.layer, []).append((slice(*site.rows), part))
    return found


def _widen(
    prefix: Prefix, number: int, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = prefix.of(number)
    if given is None:
        return None
    # Zeros: to them a linear update of the projections adds nothing, in whatever order the hooks run.
    front = (0, 0, given.shape[-2], 0)
    hidden = args[0] if args else kwargs["hidden_states"]
    rest, options = with_masks(args[1:], kwargs, given.shape[-2], hidden.shape[1])
    if args:
        return (F.pad(hidden, front), *rest), options
    return args, options | {"hidden_states": F.pad(hidden, front)}


def _join(
    prefix: Prefix,
    number: int,
    pieces: Sequence[tuple[slice, slice]],
    _layer: nn.Module,
    _args: tuple[Any, ...],
    y: Tensor,
) -> Tensor | None:
    given = prefix.of(number)
    if given is None:
        return None
    given = given.to(y.dtype)
    for rows, part in pieces:
        # In place, as in attach.py: no backward needs the output of a linear layer.
        y[:, : given.shape[-2], rows] = given[..., part]
    prefix.joined += 1
    return y


def _narrow(prefix: Prefix, number: int, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    given = prefix.of(number)
    if given is None:
        return None
    # contiguous: a linear layer would take a slower way, with copies of its own
    return (args[0][:, given.shape[-2] :].contiguous(), *args[1:])
