"""Low-rank branches that stay apart, one a task: of each input one is used, none, or shares of all."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.low_rank_mixture import mixed
from perdure.adapters.state import BufferDict, ParameterStore, assigned, numbers_in
from perdure.types import Site

_PARTS = ("down", "up")


class TaskBranches(Adapter):
    """y + scale · up_e (down_e x), e the branch that is chosen for the example; y where there is none.

    In training it is the open branch for all, so that activations may be computed twice. Else `routes` says which, or
    `shares` how much of each is added; without either it adds nothing. What an example gets does not depend on who is
    beside it.

    Args:
        site: the layer.
        rank: inner dimension of a branch.
        scale: factor of a branch (alpha / rank in PEFT).
    """

    folds = False

    def __init__(self, site: Site, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        if rank < 1 or rank > site.fan_in:
            raise ValueError(f"rank={rank}: expected 1 to {site.fan_in}, the inputs of {site.layer}")
        self.rank, self.scale, self.fan_in, self.fan_out = rank, scale, site.fan_in, site.fan_out
        self.block = site.key.rpartition(":")[0]
        self.open, self.closed = ParameterStore(), BufferDict()  # "down", "up"; "3/down", "3/up" of task 3
        self.routes: Tensor | None = None  # (B,), the task whose branch each example takes, or -1
        self.shares: Tensor | None = None  # (B, tasks), what each example takes of each branch

    @property
    def tasks(self) -> list[int]:
        """Those that have a branch, in ascending order."""
        return numbers_in(self.closed)

    def start(self, device: torch.device, former: int = 0) -> None:
        """Open a branch that changes nothing yet, in the place of one that may be open; it does not see others."""
        self.open.put("down", starting_rows(self.rank, self.fan_in).to(device))
        self.open.put("up", torch.zeros(self.fan_out, self.rank, dtype=torch.float32, device=device))

    def close(self, task: int) -> None:
        """Keep the open branch as that of `task`."""
        for part in _PARTS:
            value = self.open.take(part)
            assert value is not None
            self.closed[f"{task}/{part}"] = value

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """Input (B, ..., fan_in) and output of the layer to its new output."""
        if self.training and "down" in self.open:
            return y + self._update(x, self.open["down"], self.open["up"])
        if self.shares is not None:
            down = torch.cat([self.closed[f"{task}/down"] for task in self.tasks])
            up = torch.cat([self.closed[f"{task}/up"] for task in self.tasks], dim=1)
            return torch.add(y, mixed(x, down, up, self.shares), alpha=self.scale)
        if self.routes is None:
            return y
        taken = torch.unique(self.routes).tolist()
        if len(taken) == 1 and taken[0] >= 0:
            return y + self._closed(x, taken[0])
        y = y.clone()
        for task in taken:
            if task >= 0:
                rows = (self.routes == task).nonzero().flatten()
                y[rows] += self._closed(x[rows], task)
        return y

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """None: which update a layer gets depends on the example."""
        return None

    def factors_of(self, task: int) -> tuple[Tensor, Tensor]:
        """The closed branch of `task` as (up (fan_out, rank), down (rank, fan_in)), the scale within `up`."""
        return self.scale * self.closed[f"{task}/up"], self.closed[f"{task}/down"]

    def _closed(self, x: Tensor, task: int) -> Tensor:
        return self._update(x, self.closed[f"{task}/down"], self.closed[f"{task}/up"])

    def _update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        update = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return update if self.scale == 1 else self.scale * update


def routed(adapters: Sequence[TaskBranches], routes: Tensor) -> AbstractContextManager[None]:
    """Within, each example takes the branch of the task that `routes` (B,) says; -1 for none."""
    return assigned(adapters, "routes", [routes] * len(adapters))


def sharing(adapters: Sequence[TaskBranches], shares: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Within, examples take of each branch what `shares` (B, tasks) say, one for each of `adapters`."""
    return assigned(adapters, "shares", shares)
