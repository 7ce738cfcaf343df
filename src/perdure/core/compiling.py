"""Vision blocks that torch.compile has made faster, for as long as a training step takes.

Only blocks are compiled, as in PyTorch's regional compilation: blocks alike share one graph. All else, prompts and
cached lower blocks among it, meets them as it meets plain ones, and outside a step they are plain.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from perdure.backbones.base import Backbone

_GRAPHS = 64
"""For each class of blocks, of a task: sizes of batches, and whatever else differs between blocks."""


@cache
def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ValueError: when that fails on `device`.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:  # what torch raises is of the first; its cache's folder, the second
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--compile: torch.compile does not work on {device.type} here ({why}): install a C++ compiler such as "
            "g++, on a GPU Triton, or leave it out"
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def begin(backbone: Backbone) -> None:
    """Begin a task: blocks, to which other things may be attached now, are compiled anew when they are called.

    Raises:
        ValueError: when nothing can be compiled here.
    """
    from torch._C._dynamo.eval_frame import reset_code

    check_compiler(next(backbone.parameters()).device)
    for kind in {type(block) for block in _blocks(backbone)}:
        reset_code(kind.forward.__code__)


@contextmanager
def compiled(backbone: Backbone) -> Iterator[None]:
    """Within, the vision blocks of `backbone` compute by compiled graphs, forward and backward.

    Raises:
        ValueError: when there are too many different ones.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    blocks = _blocks(backbone)
    for block in blocks:
        kind: Any = type(block)  # hashable, which mypy doubts
        block.forward = MethodType(_compiled(kind), block)
    # adapters are hooks: unless these are looked at, a block would compute with those of the one compiled first
    watched = {"skip_nnmodule_hook_guards": False, "recompile_limit": _GRAPHS, "fail_on_recompile_limit_hit": True}
    try:
        with config.patch(watched):
            yield
    except FailOnRecompileLimitHit as error:
        raise ValueError(
            f"--compile: blocks of {backbone.spec} would be compiled more than {_GRAPHS} times in one task, since what "
            "the method makes them compute is another thing in every step: leave it out"
        ) from error
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # where lower blocks were skipped, it is gone already


def _blocks(backbone: Backbone) -> list[nn.Module]:
    return [backbone.get_submodule(name) for name in backbone.blocks()]


@cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    # a graph for each size, so that a run that goes on computes by the same ones, whichever it meets first
    faster: Callable[..., Any] = torch.compile(kind.forward, dynamic=False)
    return faster
