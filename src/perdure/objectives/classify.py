"""Classification by a linear head per task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.objectives.base import Objective
from perdure.types import Task

if TYPE_CHECKING:
    from perdure.core.learner import Core


class Classify(Objective):
    """One linear layer with bias for the classes that a task brings; prediction concatenates them.

    A head is trained while its classes are part of the current task: in a domain-incremental stream the first task's
    head goes on learning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList()
        self.cosine: float | None = None  # scale of the cosines where heads compare directions, see methods/cosine.py

    def grow(self, learner: Core, task: Task) -> None:
        """A head for the classes that are new; the heads of the task's classes are trained, the others frozen."""
        before = len(self.classes)
        super().grow(learner, task)
        if len(self.classes) > before:
            self.heads.append(nn.Linear(learner.backbone.dim, len(self.classes) - before, dtype=torch.float32))
        owners = torch.repeat_interleave(torch.tensor([head.weight.shape[0] for head in self.linears()]))
        current = set(owners[list(self.local)].tolist())
        for index, head in enumerate(self.heads):
            head.requires_grad_(index in current)

    def linears(self) -> list[nn.Linear]:
        """The heads, in the order of the columns."""
        return [head for head in self.heads if isinstance(head, nn.Linear)]

    def scores(self, features: Tensor) -> Tensor:
        """Logits (B, seen classes)."""
        return self._logits(features, self.linears())

    def local_scores(self, features: Tensor) -> Tensor:
        """Logits (B, classes of the current task); a step costs no more the more heads there are."""
        heads, columns, before, start = [], [], 0, 0
        for head in self.linears():
            mine = [before + c - start for c in self.local if start <= c < start + head.out_features]
            start += head.out_features
            if mine:
                heads.append(head)
                columns += mine
                before += head.out_features
        logits = self._logits(features, heads)
        return logits if len(columns) == before else logits[:, columns]

    def _logits(self, features: Tensor, heads: list[nn.Linear]) -> Tensor:
        if self.cosine is not None:
            rows = torch.cat([head.weight for head in heads])
            return self.cosine * F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T
        return torch.cat([head(features) for head in heads], dim=1)
