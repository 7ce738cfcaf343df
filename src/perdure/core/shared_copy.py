"""A twin: the learner that goes on learning while the first one answers by what it knew before."""

import copy
from typing import Any, Self, TypeVar

import torch
from torch import nn

from perdure.adapters.injection import folded_into
from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.process import Turn, plain

T = TypeVar("T")
L = TypeVar("L", bound=Core)


class Constant(list[T]):
    """A list whose content never changes, so that twins share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def twin_of(learner: L) -> L:
    """A learner of its own, of whose lessons `learner` notices nothing.

    What cannot change is shared (frozen weights, data, tasks), so it costs what was learnt and the adapted layers. Call
    `part` again once it has grown.
    """
    with learner.turn, plain():
        backbone = learner.backbone
        shared: list[Any] = [each for task in learner.tasks for each in (task, task.train, task.test)]
        shared += [pretrained for _, pretrained in folded_into(backbone)]
        memo = {id(each): each for each in shared}
        twin = copy.deepcopy(learner, memo | _same_memory(backbone))
        twin.looked = None
        part(twin, learner)
        return twin


def cast_copy(backbone: Backbone, precision: torch.dtype) -> Backbone:
    """A frozen encoder as a run in `precision` has it, and `backbone` itself as it is: its weights lose no digit."""
    if precision == torch.float32 or all(p.dtype == precision for p in backbone.parameters() if p.is_floating_point()):
        return backbone
    return copy.deepcopy(backbone, _same_memory(backbone)).to(precision)


def _same_memory(backbone: Backbone) -> dict[int, Any]:
    """For `deepcopy`: each copy has tensors of its own over shared memory; thawing or casting one leaves the other.

    `data`, not `detach`, which would also share what backward looks at to see that nothing was overwritten.
    """
    # tokenizer, preprocessing and the like; what a module consists of stands in dictionaries
    shared = [each for each in vars(backbone).values() if not isinstance(each, dict | list)]
    memo: dict[int, Any] = {id(each): each for each in shared}
    # what is quantized is never written, and a parameter of a class of its own
    plainly = [p for p in backbone.parameters() if type(p) is nn.Parameter]
    memo |= {id(p): p for p in backbone.parameters()} | {id(p): nn.Parameter(p.data, p.requires_grad) for p in plainly}
    return memo | {id(b): b.data for b in backbone.buffers()}


def part(twin: Core, learner: Core) -> None:
    """Let `twin` share no weight that may be written: what is trained, and what updates are folded into."""
    theirs = {p.data_ptr() for p in learner.backbone.parameters()}
    folded = {id(layer.weight) for layer, _ in folded_into(twin.backbone)}
    for p in twin.backbone.parameters():
        if (p.requires_grad or id(p) in folded) and p.data_ptr() in theirs:
            p.data = p.data.clone()


def become(learner: L, twin: L) -> None:
    """Let `learner` be what `twin` is, which is of no use after; other threads see all of it or nothing."""
    with learner.turn:
        vars(learner).update({name: value for name, value in vars(twin).items() if not isinstance(value, Turn)})
        learner.objective.bind(learner)


def as_now(learner: L) -> L:
    """The present state, which stays as it is when `learner` becomes another; to read, not to teach."""
    with learner.turn:
        view = copy.copy(learner)
        view._answering = False
        return view
