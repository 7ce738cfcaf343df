"""Classifier alignment with class Gaussians: SLCA (Zhang et al., ICCV 2023, arXiv:2303.05118), as InfLoRA+CA has it.

Heads that were learnt apart never saw each other's classes. `end_task` stores each class's mean and covariance of
features and re-trains all heads on samples of these Gaussians, with all seen classes competing.

Differs: by default one covariance is shared by all classes (SLCA: `full`) and the heads start from the closed-form
solution of linear discriminant analysis for these Gaussians (SLCA: `start="heads"`), which ends the matter where it is
already what training would lead to; logits are not normalised unless `temperature` is given (SLCA: 0.1), and means not
shrunk unless `shrink` is (0.1 in the codes of both). The first task is aligned too.
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.method import Method, parts_of, predicts
from perdure.mechanisms.class_statistics import ClassStatistics, Covariance
from perdure.mechanisms.subspace import exact, shrunk
from perdure.options.ranges import Factor, Range, Rank, Rate, without_effect
from perdure.types import Task

# As in the official code.
_BATCH, _MOMENTUM, _WEIGHT_DECAY = 256, 0.9, 5e-4
_RANK, _EPOCHS, _LR, _SAMPLES = 16, 5, 0.01, 256


class Align(Method, name="align"):
    """Makes heads that were learnt apart compete, on features drawn from a Gaussian for each class seen.

    A class's Gaussian is taken at the end of its task, with the encoder of that moment: `align` suits encoders whose
    old features hardly move (`probe`, `inflora`).

    Args:
        covariance: `shared` by all classes, `full` or `diagonal` for each, or `lowrank`: `rank` directions and a
            diagonal.
        rank: with `lowrank`, 16 when None.
        start: `lda` starts linear heads from the closed-form solution for the Gaussians, `heads` from what was learnt.
            None is `lda` for linear heads and `heads` for cosine ones.
        epochs: passes over the samples; 0 leaves it at the closed form. None is 5, and 0 where the closed form is what
            training would lead to: linear heads, `lda`, `shared`, no `temperature`.
        lr: learning rate at the start, of SGD with momentum 0.9 and a cosine schedule; None is 0.01.
        samples: drawn of each class per pass; None is 256.
        temperature: divide logits by their mean norm per task and by this; None leaves them as they are.
        shrink: how much shorter the oldest classes' means are made, in [0, 1).
    """

    needs = ("classes",)
    unlabelled = "untaught"

    def __init__(
        self,
        covariance: Covariance = "shared",
        rank: Rank | None = None,
        start: Literal["lda", "heads"] | None = None,
        epochs: Annotated[int, Range(0, 10**5)] | None = None,
        lr: Rate | None = None,
        samples: Annotated[int, Range(1, 10**4)] | None = None,
        temperature: Factor | None = None,
        shrink: Annotated[float, Range(0, 1, below=True)] = 0.0,
    ) -> None:
        super().__init__()
        if rank is not None and covariance != "lowrank":
            raise ValueError(
                f"rank={rank} has no effect with covariance={covariance!r}: leave it out, or use 'lowrank'"
            )
        if epochs == 0 and start == "heads":
            raise ValueError(f"epochs={epochs}: expected 1 or more, or 0 with start='lda' for the closed form alone")
        self._given = {"temperature": temperature, "lr": lr, "samples": samples}
        if epochs == 0:
            without_effect("with epochs=0", **self._given)
        self.start, self.epochs = start, epochs
        self.lr, self.samples = _LR if lr is None else lr, _SAMPLES if samples is None else samples
        self.temperature, self.shrink = temperature, shrink
        self.class_statistics = ClassStatistics(covariance, rank or _RANK)

    def grow(self, learner: Core, task: Task) -> None:
        """Nothing to make room for; refuse what would have no effect."""
        if task.pretext:
            return
        if not any(True for _ in learner.objective.parameters()):
            raise ValueError(
                "align re-trains heads, and this objective has none: use --objective classify, or leave align out"
            )
        if deaf := [part.name for part in parts_of(learner.method) if predicts(part)]:
            raise ValueError(
                f"align cannot be combined with {deaf[0]}, which answers without the heads: keep one of them"
            )
        form, rank = self.class_statistics.covariance, self.class_statistics.rank
        if form == "lowrank" and rank > learner.backbone.dim:
            raise ValueError(f"align(rank={rank}): expected 1 to {learner.backbone.dim}, the size of the features")
        if not learner.objective.linear and (self.start == "lda" or self.epochs == 0):
            raise ValueError(
                "align: start='lda' is the solution for linear heads, and cosine heads have no bias: write "
                "align(start='heads') with 1 or more epochs"
            )
        if not self._passes(self._closed(learner)):
            without_effect(f"on align's closed form (epochs={_EPOCHS} would train)", **self._given)

    def end_task(self, learner: Core, task: Task) -> None:
        """Remember this task's Gaussians; re-train all heads."""
        if task.pretext:
            return
        # The task's own images: those that `joint` adds were counted when they came.
        self.class_statistics.add(*learner.features(task.train))
        means = self._means(learner, task)
        closed = self._closed(learner)
        if closed:
            self._solve(learner, means)
        heads = list(learner.objective.parameters())
        frozen = [p for p in heads if not p.requires_grad]
        learner.objective.requires_grad_(True)
        try:
            self._train(learner, means, heads, self._passes(closed))
        finally:
            for p in frozen:
                p.requires_grad_(False)
        if not all(torch.isfinite(p).all() for p in heads):
            raise ValueError(f"align diverged after task {task.number}: give a lower lr than {self.lr:g}")

    def _means(self, learner: Core, task: Task) -> Tensor:
        """Means (classes, dim), older ones made shorter: μ · (1 - shrink · (1 - (t_c + 1) / (t + 1)))."""
        first = learner.stream.first_task()
        age = [1 - (first[c] + 1) / (task.index + 1) for c in self.class_statistics.classes]
        means = torch.stack([self.class_statistics.mean(c) for c in self.class_statistics.classes])
        return means * (1 - self.shrink * torch.tensor(age, dtype=means.dtype, device=means.device)).unsqueeze(1)

    def _solve(self, learner: Core, means: Tensor) -> None:
        """Heads of linear discriminant analysis: W = Σ⁻¹(μ - m), b = -(μ - m)ᵀ Σ⁻¹ (μ + m) / 2, m the mean of μ."""
        wide = exact(means)
        centre = wide.mean(0)
        covariance = shrunk(self.class_statistics.pooled(), self.class_statistics.freedom)
        weight = torch.linalg.solve(covariance, (wide - centre).T).T
        bias = -0.5 * (weight * (wide + centre)).sum(1)
        columns = learner.objective.columns(torch.tensor(self.class_statistics.classes, device=means.device))
        learner.objective.assign(columns, weight, bias)

    def _train(self, learner: Core, means: Tensor, heads: list[nn.Parameter], epochs: int) -> None:
        objective, generator = learner.objective, learner.generator("align")
        known = objective.columns(torch.tensor(self.class_statistics.classes, device=means.device))
        target = torch.arange(len(means), device=means.device).repeat_interleave(self.samples)
        optimizer = torch.optim.SGD(heads, self.lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
        steps, step = epochs * math.ceil(len(target) / _BATCH), 0
        for _ in range(epochs):
            drawn = (means.unsqueeze(1) + self.class_statistics.draw(self.samples, generator)).flatten(0, 1)
            order = torch.randperm(len(drawn), generator=generator).to(means.device)
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                step += 1
                scores = self._levelled(learner, objective.scores(drawn[chosen]))[:, known]
                optimizer.zero_grad()
                F.cross_entropy(scores, target[chosen]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        optimizer.zero_grad()

    def _closed(self, learner: Core) -> bool:
        return learner.objective.linear and self.start != "heads"

    def _passes(self, closed: bool) -> int:
        if self.epochs is not None:
            return self.epochs
        # Samples of one shared covariance only add noise to the closed form, which is already their optimum.
        return 0 if closed and self.class_statistics.covariance == "shared" and self.temperature is None else _EPOCHS

    def _levelled(self, learner: Core, scores: Tensor) -> Tensor:
        """Logits divided by the mean over tasks of their norm, and by the temperature."""
        if self.temperature is None:
            return scores
        first = learner.stream.first_task()
        owners = torch.tensor([first[c] for c in learner.objective.classes], device=scores.device)
        norms = torch.stack([scores[:, owners == t].norm(dim=1) for t in torch.unique(owners).tolist()])
        return scores / norms.mean(0).unsqueeze(1) / self.temperature
