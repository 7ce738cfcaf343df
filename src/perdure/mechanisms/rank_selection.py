"""Dynamic rank selection (DRS, FM-LoRA, arXiv:2504.08823): a task's rank from how hard it is after a short warm-up.

The published rule is p(r | task) = softmax over candidates of w_r · H / τ, with H the task's validation loss after a
warm-up. Taken literally, argmax_r w_r · H is the same for every H > 0: **the literal rule ignores the task**. It says
neither how w learns nor what a rank costs.

Differs: the `affine` rule is w_r · H - cost · r / r_max. Its w rises with the rank and is concave at the start (√(r /
r_max)): a linear one could only ever choose an extreme. w is learned in the warm-up by Gumbel-softmax over a
prefix-nested supernet, where a rank uses the first inner dimensions, and starts anew with each task; it stays rising,
so that with the same w a harder task never gets a smaller rank. H is divided by the logarithm of the number of classes
that compete: 1 is guessing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.types import Batch, Data, Task

Mode = Literal["affine", "fixed"]
_BATCH, _COST = 32, 0.5
_HOT, _COLD = 1.0, 0.1  # temperature at the start and at the end of the warm-up


class Nested(Protocol):
    """A branch whose inner dimensions can be weighted, and cut to the first few."""

    gate: Tensor | None

    def cut(self, rank: int) -> None:
        """Keep the first `rank` inner dimensions."""


class DRS(nn.Module):
    """Chooses one rank for all layers at the start of a task.

    Args:
        ranks: candidates.
        mode: the rule; `fixed` takes the largest and needs no warm-up.
        cost: price of the largest rank, in units of the normalised loss; None is 0.5. Users know it as `rank_cost`.
        epochs: length of the warm-up.
        lr: its learning rate (Adam).
    """

    def __init__(
        self,
        ranks: Sequence[int],
        mode: Mode = "affine",
        cost: float | None = None,
        epochs: int = 1,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.ranks = tuple(sorted(set(ranks)))
        if not self.ranks:
            raise ValueError(f"ranks={self.ranks}: expected candidate ranks, such as (2, 4, 8)")
        if mode != "fixed" and len(self.ranks) == 1:
            raise ValueError(
                f"ranks={tuple(ranks)}, drs={mode!r}: one rank leaves nothing to choose; write drs='fixed'"
            )
        self.mode, self.epochs, self.lr = mode, epochs, lr
        self.cost = _COST if cost is None else cost
        self.selected = BufferDict()  # rank and complexity of the current task

    @property
    def largest(self) -> int:
        """The rank that a branch is opened with."""
        return self.ranks[-1]

    def measures(self) -> dict[str, float]:
        """The current task's `rank`, and the `complexity` H that it was chosen by; nothing when ranks are fixed."""
        return {name: value.item() for name, value in sorted(self.selected.items())}

    def logits(self, complexity: float | Tensor, weights: Tensor | None = None) -> Tensor:
        """Unnormalised log-probability (n,) of each candidate, for a task of this complexity.

        Args:
            complexity: H.
            weights: w (n,); what it starts from when None.
        """
        share = torch.tensor(self.ranks, dtype=torch.float32) / self.largest
        weights = share.sqrt() if weights is None else weights
        return weights * complexity - self.cost * share.to(weights.device)

    def pick(self, complexity: float, weights: Tensor | None = None) -> int:
        """The most probable rank."""
        return self.ranks[int(self.logits(complexity, weights).argmax())]

    def choose(self, learner: Core, task: Task, branches: Sequence[Nested]) -> None:
        """Choose the rank for `task`, and cut `branches`, which are open with the largest rank, to it.

        The warm-up leaves no trace: parameters are as they were.
        """
        if self.mode == "fixed":
            return
        complexity, weights = self._warm_up(learner, task, branches)
        rank = self.pick(complexity, weights)
        for branch in branches:
            branch.cut(rank)
        self.selected["complexity"], self.selected["rank"] = (
            torch.tensor(value, dtype=torch.float32) for value in (complexity, rank)
        )

    def _warm_up(self, learner: Core, task: Task, branches: Sequence[Nested]) -> tuple[float, Tensor]:
        data = learner.method.data(learner, task)
        rest, held = split(data, learner.generator("drs split"))
        trained = list(learner.trainable().values())
        before = [p.detach().clone() for p in trained]
        raw = self._start().to(learner.device).requires_grad_()
        groups = [{"params": each["params"], "lr": self.lr * each["scale"]} for each in learner.param_groups()]
        optimizer = torch.optim.Adam([*groups, {"params": [raw]}], self.lr)
        share = torch.tensor(self.ranks, dtype=torch.float32, device=learner.device) / self.largest
        noise, complexity = learner.generator("drs noise"), 1.0
        steps, step = self.epochs * math.ceil(len(rest) / _BATCH), 0
        for epoch in range(self.epochs):
            order = rest[torch.randperm(len(rest), generator=learner.generator("drs order", epoch))]
            for batch in learner.batches(data, _BATCH, order):
                heat = _HOT * (_COLD / _HOT) ** (step / max(1, steps - 1))
                logits = self.logits(complexity, _rising(raw))
                drawn = (
                    torch.rand(len(logits), generator=noise, dtype=logits.dtype).clamp(1e-9, 1 - 1e-9).to(logits.device)
                )
                self._gate(branches, F.softmax((logits - (-drawn.log()).log()) / heat, 0))
                loss = learner.loss(learner.augment(batch, learner.generator("drs augment", step)))
                loss = loss + self.cost * (F.softmax(logits, 0) * share).sum()
                optimizer.zero_grad()
                with learner.undivided():  # what is encoded once more on the way back is all here
                    learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                learner.processes.average_gradients([*trained, raw])
                learner.scaler.step(optimizer)
                learner.scaler.update()
                step += 1
            with torch.no_grad():
                self._gate(branches, F.softmax(self.logits(complexity, _rising(raw)), 0))
                complexity = _complexity(learner, learner.batches(data, 4 * _BATCH, held))
        for branch in branches:
            branch.gate = None
        with torch.no_grad():
            for p, old in zip(trained, before, strict=True):
                p.copy_(old)
                p.grad = None
        return complexity, _rising(raw).detach().cpu()

    def _start(self) -> Tensor:
        """What `_rising` turns into √(r / r_max)."""
        weights = (torch.tensor(self.ranks, dtype=torch.float32) / self.largest).sqrt()
        return torch.expm1(torch.diff(weights, prepend=weights.new_zeros(1))).log()

    def _gate(self, branches: Sequence[Nested], probabilities: Tensor) -> None:
        mask = soft_prefix(probabilities, self.ranks)
        for branch in branches:
            branch.gate = mask


def soft_prefix(probabilities: Tensor, ranks: Sequence[int]) -> Tensor:
    """Weight (r_max,) of each inner dimension: the probability (of (n,) candidates) that the rank includes it."""
    included = torch.arange(max(ranks))[:, None] < torch.tensor(ranks)
    return included.to(probabilities) @ probabilities


def split(data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of nine tenths of each class to train on, and of one tenth to measure on.

    Both are all of the data when every class has fewer than five examples.
    """
    rest, held = [], []
    for label in torch.unique(data.labels).tolist():
        mine = (data.labels == label).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = max(1, len(mine) // 10) if len(mine) >= 5 else 0
        rest.append(mine[count:])
        held.append(mine[:count])
    if not sum(map(len, held)):
        return torch.cat(rest), torch.cat(rest)
    return torch.cat(rest), torch.cat(held)


def _rising(raw: Tensor) -> Tensor:
    return F.softplus(raw).cumsum(0)


def _complexity(learner: Core, batches: Iterable[Batch]) -> float:
    """Mean loss over that of a guess, among what competes: the task's own, or all seen as in joint training."""
    objective, shares = learner.objective, []
    for batch in batches:
        only_task = objective.only_task_classes(batch)
        losses = objective.losses(learner.encode(batch), batch, only_task)
        shares.append(losses / objective.chance_loss(batch, only_task))
    return torch.cat(shares).mean().item()
