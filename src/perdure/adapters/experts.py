"""Experts beside an MLP: bottlenecks of which each image or text takes a few, chosen by the router of its task."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.state import BufferDict, ParameterStore, assigned, numbers_in
from perdure.types import Site

_PARTS = ("down", "down_bias", "up", "up_bias")
_BEFORE_NORM = "before_norm"
_ROUTER = "router"  # of the task in training; "router/3" is that of task 3


@dataclass
class Routes:
    """Which routers a batch is sent through.

    Args:
        routers: tasks whose routers take part; None is the one in training.
        place: for each image or text the place of its router in `routers`, or -1 for no expert at all, int64 (B,).
        noise: added to the routers' scores (B, most experts); None in evaluation.
        counted: which tokens of a text are more than padding, bool (B, L); None where all are.
        seen: what routers read of each input in place of the mean of its tokens, (B, fan_in): of a conversation, whose
            answer is said token by token, what came before it.
        tallied: whether what is chosen counts.
    """

    routers: Sequence[int | None]
    place: Tensor
    noise: Tensor | None = None
    counted: Tensor | None = None
    seen: Tensor | None = None
    tallied: bool = True


class Experts(Adapter):
    """y + scale · Σ_e gate_e · (up_e relu(down_e x + b_e) + c_e), beside an MLP with output y.

    x is what enters the norm before the MLP, which `overhear` tells; where there is no such norm, the MLP's input.
    Part 0 stands on the MLP's first layer, part 1 on its last. The gates of an image are the softmax over the `top`
    largest scores of its router, which reads the mean of its tokens; all others are zero. Without routes it adds
    nothing. Trained experts are parameters, frozen ones and old routers tensors.

    Args:
        sites: the first and the last layer of the MLP.
        normed: whether there is a norm to listen at.
        rank: units of an expert.
        top: experts that an image takes.
        scale: factor of what is added.
    """

    folds = False

    def __init__(self, sites: Sequence[Site], rank: int, top: int, scale: float, normed: bool = False) -> None:
        super().__init__()
        first, last = sites
        self.fan_in, self.fan_out = first.fan_in, last.fan_out
        most = min(self.fan_in, self.fan_out)
        if rank < 1 or rank > most:
            raise ValueError(f"rank={rank}: expected 1 to {most}, the width at {last.layer}")
        self.rank, self.top, self.scale = rank, top, scale
        self.learnt, self.fixed = ParameterStore(), BufferDict()
        if normed:  # in the state, for experts of an earlier version have learnt from the MLP's input and go on with it
            self.fixed[_BEFORE_NORM] = torch.ones((), dtype=torch.float32)
        self.routes: Routes | None = None
        self.chosen: Tensor | None = None  # how often each expert was, in this step
        self._read: Tensor | None = None  # x, on its way to the MLP's last layer

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.open) + len(self.shut)

    @property
    def routes_new(self) -> bool:
        """Whether there is a router in training."""
        return _ROUTER in self.learnt

    @property
    def open(self) -> list[int]:
        """Numbers of the experts in training."""
        return numbers_in(self.learnt.names)

    @property
    def shut(self) -> list[int]:
        """Numbers of the frozen experts."""
        return numbers_in(self.fixed)

    def add(self, count: int, device: torch.device) -> None:
        """New experts, which give nothing yet."""
        for number in range(self.count, self.count + count):
            down = starting_rows(self.rank, self.fan_in)
            up, bias = down.new_zeros(self.fan_out, self.rank), down.new_zeros(self.rank)
            fresh = down, bias, up, down.new_zeros(self.fan_out)
            for part, value in zip(_PARTS, fresh, strict=True):
                self.learnt.put(f"{number}/{part}", value.to(device))

    def open_router(self, device: torch.device) -> None:
        """A new router over all experts."""
        self.learnt.put(_ROUTER, torch.randn(self.count, self.fan_in, dtype=torch.float32).mul_(0.02).to(device))

    def close_router(self, task: int) -> None:
        """Freeze the router in training as that of `task`."""
        router = self.learnt.take(_ROUTER)
        assert router is not None
        self.fixed[f"{_ROUTER}/{task}"] = router

    def tally(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add this step's choices, of all processes by `total`, to those of the task."""
        if self.chosen is not None:
            used, chosen = self.fixed.get("used"), total(self.chosen)
            self.fixed["used"] = chosen if used is None else used + chosen
            self.chosen = None

    def freeze(self, count: int) -> None:
        """Freeze the `count` experts that the task has used most, and forget how often it did."""
        used = self.fixed.pop("used", None)
        for number in [] if used is None else used.argsort(descending=True, stable=True)[:count].tolist():
            for part in _PARTS:
                value = self.learnt.take(f"{number}/{part}")
                if value is not None:
                    self.fixed[f"{number}/{part}"] = value

    def overhear(self, x: Tensor) -> None:
        """Remember what enters the norm before the MLP, (B, N, d)."""
        if self.routes is not None and _BEFORE_NORM in self.fixed:
            self._read = x

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The first layer's output as it is; the last one's with what the experts add."""
        if self.routes is None:
            return y
        if part == 0:
            if _BEFORE_NORM not in self.fixed:
                self._read = x
            return y
        assert self._read is not None
        x, self._read = self._read, None
        seen = _mean(x, self.routes.counted) if self.routes.seen is None else self.routes.seen
        gates = self._gates(seen.float(), self.routes)
        if self.routes.noise is not None and None in self.routes.routers:
            learning = self.routes.place == self.routes.routers.index(None)
            chosen = ((gates > 0) & learning.unsqueeze(1)).sum(0) * self.routes.tallied
            self.chosen = chosen if self.chosen is None else self.chosen + chosen
        gates = gates.to(x.dtype)
        down, down_bias, up, up_bias = (self._all(name).to(x.dtype) for name in _PARTS)
        hidden = F.relu(F.linear(x, down.flatten(0, 1), down_bias.flatten()))
        hidden = hidden * gates.repeat_interleave(self.rank, dim=1).unsqueeze(1)
        added = F.linear(hidden, up.transpose(0, 1).flatten(1)) + (gates @ up_bias).unsqueeze(1)
        return torch.add(y, added, alpha=self.scale)

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """None: there is no linear update."""
        return None

    def _all(self, part: str) -> Tensor:
        """That part of all experts, in the order of their numbers."""
        names = [f"{number}/{part}" for number in range(self.count)]
        return torch.stack([self.learnt[name] if name in self.learnt else self.fixed[name] for name in names])

    def _gates(self, seen: Tensor, routes: Routes) -> Tensor:
        """Shares (B, experts) of `seen` (B, d)."""
        tables = [self.learnt[_ROUTER] if r is None else self.fixed[f"{_ROUTER}/{r}"] for r in routes.routers]
        if not tables:
            return seen.new_zeros(len(seen), self.count)
        place = routes.place
        scores = []
        for table in tables:
            # an expert that came after a router is none of its
            missing = seen.new_full((len(seen), self.count - len(table)), -torch.inf)
            scores.append(torch.cat([seen @ table.float().T, missing], dim=1))
        mine = torch.stack(scores, dim=1)[torch.arange(len(seen), device=seen.device), place.clamp_min(0)]
        best = (mine if routes.noise is None else mine + routes.noise).topk(self.top, dim=1)
        shares = best.values.softmax(1) * (place >= 0).unsqueeze(1)
        return torch.zeros_like(mine).scatter(1, best.indices, shares)


def _mean(tokens: Tensor, counted: Tensor | None) -> Tensor:
    """Mean (B, d) over those of `tokens` (B, L, d) that count."""
    if counted is None:
        return tokens.mean(1)
    weights = counted.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


@contextmanager
def routing(experts: Sequence[Experts], routes: Sequence[Routes]) -> Iterator[None]:
    """Within, images or texts take what `routes` say, one for each of `experts`; what was read on the way goes."""
    with assigned(experts, "routes", routes), assigned(experts, "_read", [None] * len(experts)):
        yield
