"""Several processes that learn as one: each encodes a part of every batch, and every one sees the rows of all.

What reads rows (losses, contrasts, penalties, statistics, scores) is computed from the whole batch in every process, so
that no method knows how many there are and no result depends on it, but for rounding. Only gradients of what lies below
the rows are partial: `gather` passes each process its own rows' gradients times the number of processes, and the mean
over processes is then the whole batch's gradient, of encoders, heads and penalties alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others: when one has ended, or stands still, all end."""


class Lost(RuntimeError):
    """Another process has ended, or has not answered within `PATIENCE`."""


@dataclass(frozen=True)
class Processes:
    """The processes that learn together, as one of them sees them.

    Args:
        rank: which one this is; 0 writes.
        world: how many there are.
        control: the group for what stands on the CPU; None where that is the default one.
    """

    rank: int = 0
    world: int = 1
    control: Any = field(default=None, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def spans(self, count: int) -> list[range] | None:
        """Which of `count` examples each process encodes; None where every one encodes all, being fewer than these."""
        if self.world == 1 or count < self.world:
            return None
        ends = [count * rank // self.world for rank in range(self.world + 1)]
        return [range(*each) for each in pairwise(ends)]

    def gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes in their order, (sum of `sizes`, ...); `own` are this one's, (its size, ...)."""
        rows: Tensor = _Gathered.apply(own, self, tuple(sizes))
        return rows

    def gather_all(self, own: Tensor) -> Tensor:
        """As `gather`, where all have as many rows."""
        return self.gather(own, [len(own)] * self.world)

    def gather_objects(self, own: list[Any]) -> list[Any]:
        """The Python values of all processes in their order."""
        found: list[Any] = [None] * self.world
        with self._waiting():
            distributed.all_gather_object(found, own, group=self.control)
        return [each for some in found for each in some]

    def sum(self, own: Tensor) -> Tensor:
        """The sum over processes; `own` itself where there is one."""
        if self.world == 1:
            return own
        total = own.clone()
        with self._waiting():
            distributed.all_reduce(total, group=self._group(total))
        return total

    def mean(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Of each of `own` the mean over processes, of the same type, by one sum."""
        if self.world == 1 or not own:
            return list(own)
        total = self.sum(torch.cat([each.flatten() for each in own])) / self.world
        pieces = torch.split(total, [each.numel() for each in own])
        return [piece.view_as(each) for piece, each in zip(pieces, own, strict=True)]

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give each parameter the mean of its gradients; one without any gradient in any process stays without."""
        if self.world == 1 or not parameters:
            return
        for dtype in {p.dtype: None for p in parameters}:
            mine = [p for p in parameters if p.dtype == dtype]
            there = mine[0].new_tensor([float(p.grad is not None) for p in mine])
            *means, there = self.mean([*(torch.zeros_like(p) if p.grad is None else p.grad for p in mine), there])
            for i, (p, mean) in enumerate(zip(mine, means, strict=True)):
                if p.grad is not None:
                    p.grad.copy_(mean)
                elif there[i]:
                    p.grad = mean.clone()

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process: all get the same answer."""
        if self.world == 1:
            return mine
        asked = torch.tensor(int(mine))
        with self._waiting():
            distributed.all_reduce(asked, group=self.control)
        return bool(asked)

    def agree(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite `tensors`, of the same names in all processes, with those of the first."""
        if self.world == 1:
            return
        with self._waiting(), torch.no_grad():
            for _, tensor in sorted(tensors.items()):
                whole = tensor.contiguous()
                distributed.broadcast(whole, 0, group=self._group(whole))
                if whole is not tensor:
                    tensor.copy_(whole)

    def wait(self) -> None:
        """Go on when all are here."""
        self.any(False)

    def _group(self, tensor: Tensor) -> Any:
        return self.control if tensor.device.type == "cpu" else None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise has no class of its own in common
            seconds = round(PATIENCE.total_seconds())
            raise Lost(
                f"process {self.rank} of {self.world}: another one has ended, or has not answered in {seconds} seconds"
            ) from error


class _Gathered(torch.autograd.Function):
    """Rows of all processes. Every process goes on with all of them alike, so nothing is to be sent on the way back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes, sizes: tuple[int, ...]) -> Tensor:
        start = sum(sizes[: processes.rank])
        ctx.world, ctx.mine = processes.world, slice(start, start + sizes[processes.rank])
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        with processes._waiting():
            distributed.all_gather(found, padded, group=processes._group(padded))
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return outer[0][ctx.mine] * ctx.world, None, None
