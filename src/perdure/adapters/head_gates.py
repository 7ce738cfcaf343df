"""Gates of attention heads: each head's output is multiplied before the output projection sums them up."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters.injection import hold
from perdure.adapters.state import BufferDict, ParameterStore, assigned
from perdure.types import Site

_OPEN = "log_alpha"
_START = 3.0  # a gate that is 1 at test time, and in two steps of three
_COUNTS = ("num_heads", "num_attention_heads", "heads")


class HeadGates(nn.Module):
    """Σ_h g_h · head_h W_h in some blocks of a tower, g whatever is given for a while; without it nothing changes.

    A gate of one changes no bit. One set is in training, those of former tasks are tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open, self.closed = ParameterStore(), BufferDict()  # "log_alpha"; by task the gates (blocks, heads)
        self.shape = (0, 0)  # blocks, heads
        self._given: Tensor | None = None

    @property
    def log_alpha(self) -> nn.Parameter | None:
        """Of the gates in training (blocks, heads), see `HardConcrete`."""
        if _OPEN not in self.open:
            return None
        return self.open[_OPEN]

    def attach(self, model: nn.Module, outs: Sequence[Site]) -> None:
        """Stand before the output projections of some blocks.

        Raises:
            ValueError: when a model does not say how many heads there are, or blocks have different numbers.
        """
        counts = [head_count(model, site) for site in outs]
        if len(set(counts)) > 1:
            raise ValueError(f"blocks have {min(counts)} to {max(counts)} heads: choose those of one number by blocks=")
        self.shape = len(outs), counts[0]
        for number, site in enumerate(outs):
            layer = model.get_submodule(site.layer)
            hold(layer, [layer.register_forward_pre_hook(partial(_gate, self, number))])

    def start(self, device: torch.device, _task: int = 0) -> None:
        """New gates, all open."""
        self.open.put(_OPEN, torch.full(self.shape, _START, dtype=torch.float32, device=device))

    def close(self, task: int) -> None:
        """Settle and keep the gates in training as those of `task`."""
        value = self.open.take(_OPEN)
        assert value is not None
        self.closed[str(task)] = HardConcrete.settled(value)

    def of_tasks(self, tasks: Tensor) -> Tensor:
        """Gates (blocks, B, heads) of the task of each example, int64 (B,); all open where it is -1."""
        known = sorted(int(task) for task in self.closed)
        every = torch.stack(
            [*(self.closed[str(task)] for task in known), self.closed[str(known[0])].new_ones(self.shape)]
        )
        places = torch.searchsorted(torch.tensor(known, device=tasks.device), tasks)
        return every[torch.where(tasks < 0, len(known), places)].transpose(0, 1)

    def using(self, gates: Tensor) -> AbstractContextManager[None]:
        """Within, heads are multiplied by `gates` (blocks, B, heads); B is 1 where all examples have the same."""
        return assigned([self], "_given", [gates])

    def of(self, number: int) -> Tensor | None:
        """The gates (B, heads) of block number `number` of those attached."""
        return None if self._given is None else self._given[number]


def head_count(model: nn.Module, out: Site) -> int:
    """Number of heads whose outputs the output projection `out` reads.

    Raises:
        ValueError: when the model does not say it, or they are not equally wide.
    """
    name = out.layer
    while name := name.rpartition(".")[0]:
        for module in model.get_submodule(name).modules():
            for holder in (module, getattr(module, "config", None)):
                found = [getattr(holder, count, None) for count in _COUNTS]
                if count := next((each for each in found if isinstance(each, int)), 0):
                    if out.fan_in % count:
                        raise ValueError(f"{out.layer} reads {out.fan_in} numbers of {count} heads: not equally wide")
                    return count
    raise ValueError(f"{out.layer}: its model does not say how many heads there are; use another backbone")


def _gate(gates: HeadGates, number: int, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    given = gates.of(number)
    if given is None:
        return None
    heads = args[0].unflatten(-1, (given.shape[-1], -1))
    shaped = given.to(heads.dtype).view(len(given), *(1,) * (heads.ndim - 3), given.shape[-1], 1)
    return ((heads * shaped).flatten(-2), *args[1:])


class HardConcrete:
    """Gates in [0, 1] that are exactly 0 or 1 most of the time, and whose expected number has a gradient.

    Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, ICLR 2018,
    arXiv:1712.01312, equations 10 to 13, with the constants given there.
    """

    BETA, LOW, HIGH = 2 / 3, -0.1, 1.1

    @classmethod
    def draw(cls, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """Random gates, from numbers in (0, 1) of the same shape."""
        noise = uniform.log() - (-uniform).log1p()
        return cls._stretched(((noise + log_alpha) / cls.BETA).sigmoid())

    @classmethod
    def settled(cls, log_alpha: Tensor) -> Tensor:
        """Gates at test time."""
        return cls._stretched(log_alpha.sigmoid())

    @classmethod
    def open(cls, log_alpha: Tensor) -> Tensor:
        """The probability that a gate is not zero."""
        shift = cls.BETA * torch.tensor(-cls.LOW / cls.HIGH).log().item()
        return (log_alpha - shift).sigmoid()

    @classmethod
    def _stretched(cls, concrete: Tensor) -> Tensor:
        return (concrete * (cls.HIGH - cls.LOW) + cls.LOW).clamp(0, 1)
