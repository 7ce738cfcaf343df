"""Columns behind a block, one a task: each reads what the former ones, which are frozen, give there."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.state import BufferDict, ParameterStore, numbers_in

_OWN = ("down", "bias", "up")
_LATERAL = ("scale", "lateral_down", "lateral_up")


class ProgressiveColumns(Adapter):
    """h + a_k, h the block's output and k the column that is chosen for the example; h where there is none.

    a_k = up_k gelu(down_k h + bias_k) + lateral_up_k gelu(Σ_{j<k} lateral_down_kj (scale_kj · a_j)), the a_j of former
    columns without gradient. In training it is the open column for all, so that activations may be computed twice.

    Args:
        width: of the block's output.
        rank: units of a column, and of what reads the former ones.
        lateral: whether it does.
    """

    folds = False

    def __init__(self, width: int, rank: int, lateral: bool = True) -> None:
        super().__init__()
        if rank > width:
            raise ValueError(f"rank={rank}: expected 1 to {width}, the width of the blocks")
        self.width, self.rank, self.lateral = width, rank, lateral
        self.open, self.closed = ParameterStore(), BufferDict()  # "down", ...; "3/down", ... of task 3
        self.routes: Tensor | None = None  # (B,), the task whose column each example takes, or -1

    @property
    def tasks(self) -> list[int]:
        """Those that have a column, in ascending order."""
        return numbers_in(self.closed)

    def start(self, device: torch.device, former: int = 0) -> None:
        """Open a column that gives nothing yet and reads `former` ones, in the place of one that may be open."""
        down = starting_rows(self.rank, self.width)
        made = {"down": down, "bias": down.new_zeros(self.rank), "up": down.new_zeros(self.width, self.rank)}
        if self.lateral and former:
            made["scale"] = 0.1 * torch.rand(former, dtype=torch.float32)
            made["lateral_down"] = torch.stack([starting_rows(self.rank, self.width) for _ in range(former)])
            made["lateral_up"] = down.new_zeros(self.width, self.rank)
        for name in (*_OWN, *_LATERAL):
            self.open.take(name)
            if name in made:
                self.open.put(name, made[name].to(device))

    def close(self, task: int) -> None:
        """Keep the open column as that of `task`."""
        for name in self.open.names:
            value = self.open.take(name)
            assert value is not None
            self.closed[f"{task}/{name}"] = value

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The block's output (B, ..., width) with what the chosen column makes of it; its input is not read."""
        if self.training and "down" in self.open:
            return y + self._column({name: self.open[name] for name in self.open.names}, y, self._former(y, self.tasks))
        if self.routes is None:
            return y
        taken = [task for task in torch.unique(self.routes).tolist() if task >= 0]
        if not taken:
            return y
        added = torch.zeros_like(y)
        for task in taken:
            rows = (self.routes == task).nonzero().flatten()
            added[rows] = self.given(y[rows], task)
        return y + added

    def given(self, h: Tensor, task: int) -> Tensor:
        """What the closed column of `task` makes of `h` (..., width)."""
        return self._former(h, [each for each in self.tasks if each <= task])[-1]

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """None: there is no linear update."""
        return None

    @torch.no_grad()
    def _former(self, h: Tensor, tasks: Iterable[int]) -> list[Tensor]:
        """What the closed columns make of `h`, the oldest first; each needs those before it."""
        found: list[Tensor] = []
        for task in tasks:
            names = (name for name in (*_OWN, *_LATERAL) if f"{task}/{name}" in self.closed)
            found.append(self._column({name: self.closed[f"{task}/{name}"] for name in names}, h, found))
        return found

    @staticmethod
    def _column(of: dict[str, Tensor], h: Tensor, former: list[Tensor]) -> Tensor:
        # the master copies are float32, the encoder may compute in bfloat16
        of = {name: value.to(h.dtype) for name, value in of.items()}
        added = F.linear(F.gelu(F.linear(h, of["down"], of["bias"])), of["up"])
        if "scale" not in of:
            return added
        read = zip(of["scale"], of["lateral_down"], former, strict=True)
        heard = torch.stack([F.linear(scale * a, down) for scale, down, a in read]).sum(0)
        return added + F.linear(F.gelu(heard), of["lateral_up"])
