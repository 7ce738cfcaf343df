"""Tensors and parameters by name, whose number and shapes grow from task to task; and what is given for a while."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """A dictionary that follows its module to devices and into checkpoints.

    Buffers must exist, with their final shape, before a state is loaded; what a method remembers (Fisher diagonals,
    bases, memories) depends on data and cannot. Keys may hold dots.
    """

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__  # a module is itself, not its contents

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        return self._held[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._held[key] = value.detach().clone()

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __bool__(self) -> bool:
        return bool(self._held)

    def append(self, key: str, value: Tensor, dim: int = 0) -> None:
        """Put `value` behind what is kept under `key`, along `dim`."""
        self[key] = torch.cat([self[key], value.detach()], dim) if key in self else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._held = {k: fn(v) for k, v in self._held.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + k: v for k, v in self._held.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._held = {k[len(prefix) :]: v.detach().clone() for k, v in state_dict.items() if k.startswith(prefix)}


@contextmanager
def assigned(modules: Sequence[nn.Module], name: str, values: Iterable[Any]) -> Iterator[None]:
    """Within, each of `modules` has its own of `values` as its attribute `name`; then what it had before."""
    before = [getattr(each, name) for each in modules]
    for each, its in zip(modules, values, strict=True):
        setattr(each, name, its)
    try:
        yield
    finally:
        for each, its in zip(modules, before, strict=True):
            setattr(each, name, its)


def numbers_in(keys: Iterable[str]) -> list[int]:
    """The numbers that some of `keys` begin with, as in "3/down", in ascending order."""
    return sorted({int(key.partition("/")[0]) for key in keys if key[:1].isdigit()})


class ParameterStore(nn.Module):
    """Parameters of which data decides how many there are; `BufferDict` holds what is trained no more.

    They stand in alphabetical order, whenever they came: an optimizer knows its parameters by their order alone, which
    must be the same in a store that was loaded.
    """

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    @property
    def names(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self._parameters)

    def put(self, name: str, value: Tensor) -> None:
        """A new parameter; it replaces one of that name."""
        self.take(name)
        self.register_parameter(name, nn.Parameter(value))
        self._parameters = dict(sorted(self._parameters.items()))

    def take(self, name: str) -> Tensor | None:
        """Remove a parameter, and return its value; None when there is none."""
        taken = self._parameters.pop(name, None)
        return None if taken is None else taken.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._parameters.clear()
        for key in sorted(key for key in state_dict if key.startswith(prefix)):
            self.put(key[len(prefix) :], state_dict[key].detach().clone())
