"""What every objective offers: a loss, scores over classes, and their evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.types import Batch, Task

if TYPE_CHECKING:
    from perdure.learner import Core


class Objective(nn.Module):
    """Scores over all seen classes, learnt by cross-entropy among the classes that compete in a batch.

    The loss is local: only the task's classes enter the softmax (other columns get no gradient), as in InfLoRA,
    SD-LoRA and PILOT. As soon as a batch holds an example of another class (replay), all seen classes compete.
    """

    open_vocabulary = False
    """Whether classes can be scored before they were learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: tuple[int, ...] = ()  # seen, in column order
        self.names: tuple[str, ...] = ()
        self.local: tuple[int, ...] = ()  # columns of the current task
        self.mask = True  # False: every seen class always competes

    def grow(self, learner: Core, task: Task) -> None:
        """Make room for the classes of `task`."""
        fresh = [(c, n) for c, n in zip(task.classes, task.names, strict=True) if c not in self.classes]
        self.classes += tuple(c for c, _ in fresh)
        self.names += tuple(n for _, n in fresh)
        self.local = tuple(sorted(self.classes.index(c) for c in task.classes))

    def refresh(self) -> None:
        """Called before prediction, when parameters may have changed."""

    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, seen classes), columns in the order of `classes`."""
        raise NotImplementedError

    def columns(self, labels: Tensor) -> Tensor:
        """Class ids (B,) to columns of the scores."""
        lookup = torch.full((max(self.classes) + 1,), -1, device=labels.device)
        lookup[list(self.classes)] = torch.arange(len(self.classes), device=labels.device)
        return lookup[labels]

    def loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch."""
        return self.losses(features, batch).mean()

    def losses(self, features: Tensor, batch: Batch, local: bool | None = None) -> Tensor:
        """Cross-entropy of each example, (B,).

        Args:
            features: (B, dim).
            batch: with `label`.
            local: whether only the task's classes compete; None finds out from the labels.
        """
        scores, target = self.scores(features), self.columns(batch["label"])
        if self.competes_locally(batch) if local is None else local:
            mine = torch.tensor(self.local, device=target.device)
            scores, target = scores[:, mine], torch.searchsorted(mine, target)
        return F.cross_entropy(scores, target, reduction="none")

    def competes_locally(self, batch: Batch) -> bool:
        """Whether the batch holds the task's own classes only, and the mask is on."""
        if not self.mask or len(self.local) == len(self.classes):
            return False
        target = self.columns(batch["label"])
        return bool(torch.isin(target, torch.tensor(self.local, device=target.device)).all())
