"""What a method holds and `state_dict` does not know: it would be lost when the learner is saved."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from perdure.core.learner import Core
from perdure.core.method import parts_of

_TORCH = ("_parameters", "_buffers", "_modules")
_DEEPEST = 6


def check_saved(learner: Core) -> None:
    """Refuse a method that holds tensors of its own beside its state, once a task is learnt.

    Tensors that the learner saves, or the backbone brings, may be referred to: they are there after loading too. What
    is declared to be made anew (`Method.derived`, buffers that are not persistent) may be held.

    Raises:
        ValueError: with the name of the first.
    """
    if learner.sharded:  # whose encoder has no memory of its own to be recognised by; one process looks at the same
        return
    # Whatever stands in the state, and the views of it: by the memory that it lies in.
    known = {value.untyped_storage().data_ptr() for value in learner.state_dict(keep_vars=True).values()}
    for part in parts_of(learner.method):
        for place, tensor in _held(part):
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
                raise ValueError(
                    f"{part.name} holds the tensor {place}, which state_dict does not know: it would be lost when the "
                    "learner is saved: keep it as a parameter, a buffer or in BufferDict, let go of it in end_task, or "
                    "name it in `derived`"
                )


def _held(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in plain attributes of a module and of those below, with where they are."""
    for path, module in part.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name not in _TORCH and name not in getattr(module, "derived", ()):
                yield from ((f"{prefix}{name}{inner}", tensor) for inner, tensor in _within(value, _DEEPEST))


def _within(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield "", value
    elif depth and isinstance(value, Mapping):
        for key, each in value.items():
            yield from ((f"[{key!r}]{inner}", tensor) for inner, tensor in _within(each, depth - 1))
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for i, each in enumerate(value):
            yield from ((f"[{i}]{inner}", tensor) for inner, tensor in _within(each, depth - 1))
