"""How a batch is shared out: among processes, and in parts of which one fits where the whole does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perdure.core.processes import Processes
from perdure.types import Batch, count, take

T = TypeVar("T")


class Portion(NamedTuple):
    """Which `rows` of a batch of so many examples (`of`) a process computes."""

    rows: range
    of: int


class SharedOut(nn.Module):
    """What computes rows of batches, by itself or as one of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.processes = Processes()
        self.sharded = False  # whether each process holds a part of the encoder: all must then encode equally often
        self.compiles = False  # whether vision blocks are compiled for the steps of a task
        self.accumulate = 1  # parts in which a batch is encoded while it is trained on
        self.part: Portion | None = None  # of a batch that is shared out: what this process computes at the moment
        self._undivided = False

    def shared_out(
        self,
        batch: Batch,
        compute: Callable[[Batch], Tensor],
        owners: Callable[[Batch], Tensor] | None = None,
    ) -> Tensor:
        """`compute` of `batch`, (R, ...), of which each of several processes computes the rows of its own examples.

        Args:
            batch: the same in all processes.
            compute: gives rows, in the order of the examples.
            owners: of each row the example; None where each has one row.
        """
        alone = self.processes.world == 1 or self._undivided or self.part is not None
        spans = None if alone else self.processes.spans(count(batch))
        if spans is None:
            return compute(batch)
        self.part = Portion(spans[self.processes.rank], count(batch))
        try:
            own = compute(take(batch, self.part.rows))
        finally:
            self.part = None
        sizes = list(map(len, spans))
        if owners is not None:
            rows = torch.bincount(owners(batch), minlength=count(batch)).tolist()
            sizes = [sum(rows[span.start : span.stop]) for span in spans]
        return self.processes.gather(own, sizes)

    def said(self, batch: Batch, say: Callable[[Batch], list[T]]) -> list[T]:
        """`say` of `batch`, a Python value an example, of which each of several processes says its part."""
        alone = self.processes.world == 1 or self._undivided or self.sharded
        spans = None if alone else self.processes.spans(count(batch))
        if spans is None:
            return say(batch)
        with self.undivided():
            own = say(take(batch, spans[self.processes.rank]))
        return self.processes.gather_objects(own)

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Within, this process computes by itself all that it is asked for, and at once."""
        before, self._undivided = self._undivided, True
        try:
            yield
        finally:
            self._undivided = before

    def in_parts(self, compute: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """`compute` as a step does it, with room for no more than a part of a batch: see `TrainConfig.accumulate`."""
        if self.accumulate == 1 or self._undivided or not (self.training and torch.is_grad_enabled()):
            return compute

        def computed(batch: Batch) -> Tensor:
            # as many in all processes: those that hold an encoder together compute equally often
            parts = min(self.accumulate, self.part.of // self.processes.world if self.part else count(batch))
            ends = [count(batch) * part // parts for part in range(parts + 1)]
            pieces = [take(batch, range(*each)) for each in pairwise(ends)]
            return torch.cat([checkpoint(compute, piece, use_reentrant=False) for piece in pieces])

        return computed
