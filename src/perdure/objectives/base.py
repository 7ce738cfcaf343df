"""What every objective offers: a loss, scores over classes, and their evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.types import Batch, Task, Union

if TYPE_CHECKING:
    from perdure.core.learner import Core


class Objective(nn.Module):
    """Scores over all seen classes, learnt by cross-entropy among the classes that compete in a batch.

    The loss is local: only the task's classes enter the softmax (other columns get no gradient), as in InfLoRA,
    SD-LoRA and PILOT. As soon as a batch holds an example of another class (replay), all seen classes compete.
    """

    open_vocabulary: ClassVar[bool] = False
    """Whether a task can be measured before it was learnt."""
    classifies: ClassVar[bool] = True
    """Whether it scores classes; else methods that answer by classes have nothing to answer."""
    texts: ClassVar[bool] = False
    """Whether it reads texts, so that a text tower can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: tuple[int, ...] = ()  # seen, in column order
        self.names: tuple[str, ...] = ()
        self.local: tuple[int, ...] = ()  # columns of the current task
        self.mask = True  # False: every seen class always competes

    def bind(self, learner: Core) -> None:
        """Called when it belongs to another learner than before."""

    def grow(self, learner: Core, task: Task) -> None:
        """Make room for the classes of `task`."""
        fresh = [(c, n) for c, n in zip(task.classes, task.names, strict=True) if c not in self.classes]
        self.classes += tuple(c for c, _ in fresh)
        self.names += tuple(n for _, n in fresh)
        self.local = tuple(sorted(self.classes.index(c) for c in task.classes))

    def unmask(self) -> None:
        """Let all seen classes compete for every example, and all heads learn."""
        self.mask = False
        self.requires_grad_(True)

    def refresh(self) -> None:
        """Called before prediction, when parameters may have changed."""

    def record(self, learner: Core, batch: Batch) -> Batch:
        """What it wants to know of each image beside it and no training can change, as `{name: (B, ...)}`.

        Computed once for a training set where images stay as they are, and for a test set; never within a step.
        """
        return {}

    def read(self, learner: Core, batch: Batch) -> Batch:
        """`batch` with what its loss reads of the texts, computed once for all who ask in a step."""
        return batch

    def said(self, learner: Core, batch: Batch) -> tuple[list[str], Tensor]:
        """Texts of the current task that the text tower reads in a step on `batch`, and the class of each, (n,)."""
        return [], batch["label"][:0]

    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, seen classes), columns in the order of `classes`."""
        raise NotImplementedError

    def local_scores(self, features: Tensor) -> Tensor:
        """Scores (B, classes of the current task), the columns `local`: all that most steps need."""
        return self.scores(features)[:, list(self.local)]

    def columns(self, labels: Tensor) -> Tensor:
        """Class ids (B,) to columns of the scores."""
        lookup = torch.full((max(self.classes) + 1,), -1, device=labels.device)
        lookup[list(self.classes)] = torch.arange(len(self.classes), device=labels.device)
        return lookup[labels]

    def guess(self, batch: Batch, local: bool) -> float:
        """Loss of who knows nothing: log of the number of classes that compete."""
        return math.log(max(2, len(self.local if local else self.classes)))

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
        target = self.columns(batch["label"])
        if self.competes_locally(batch) if local is None else local:
            target = torch.searchsorted(torch.tensor(self.local, device=target.device), target)
            return F.cross_entropy(self.local_scores(features), target, reduction="none")
        return F.cross_entropy(self.scores(features), target, reduction="none")

    def competes_locally(self, batch: Batch) -> bool:
        """Whether the batch holds the task's own classes only, and the mask is on."""
        if not self.mask or len(self.local) == len(self.classes):
            return False
        target = self.columns(batch["label"])
        return bool(torch.isin(target, torch.tensor(self.local, device=target.device)).all())

    def narrowed(self, batch: Batch) -> Batch:
        """`batch` with those texts only that a step shows, so that its examples can be looked at one by one."""
        return batch

    def company(self, learner: Core, batch: Batch) -> Batch:
        """What a single example competes with, where it is asked about alone: nothing where classes compete."""
        return {}

    def loss_alone(self, features: Tensor, batch: Batch, local: bool, company: Batch) -> Tensor:
        """Loss of the one example of `batch`, a scalar, as in `losses`; see `company`."""
        return self.losses(features, batch, local)[0]

    def answers_alone(self, features: Tensor, batch: Batch, company: Batch) -> Tensor:
        """Scores of the one example of `batch`, (n,), which say what it is taken for; see `company`."""
        return self.scores(features)[0]

    def evaluate(self, learner: Core, tasks: Sequence[Task], size: int = 256) -> list[dict[str, float]]:
        """Shares of right answers on the test set of each of `tasks`.

        As the scenario has it, with the task id given, and of the task id itself. Batches are as large as fit; scores
        of an example never depend on the others.
        """
        if not tasks:
            return []
        with learner.inference():
            tests = Union([learner.encoded(task.test, keep=True) for task in tasks])
            scores = torch.split(learner.answers(tests, size).cpu(), [len(task.test) for task in tasks])
        stream, last = learner.stream, learner.learnt - 1
        allowed = [set(stream.candidates(task, last)) & set(self.classes) | set(task.classes) for task in tasks]
        told = partial(accuracies, learner, classes=self.classes, first=stream.first_task())
        return [told(*each) for each in zip(tasks, scores, allowed, strict=True)]


def accuracies(
    learner: Core, task: Task, scores: Tensor, candidates: set[int], classes: Sequence[int], first: dict[int, int]
) -> dict[str, float]:
    """Shares of right answers on a task's test set.

    Args:
        learner: who answered.
        task: with its test set.
        scores: (n, columns), on the CPU.
        candidates: classes that may be answered.
        classes: class of each column.
        first: class -> index of the task it belongs to.
    """
    ids, labels = torch.tensor(classes), task.test.labels.cpu()
    allowed, own = (torch.isin(ids, torch.tensor([*of])).nonzero().flatten() for of in (candidates, task.classes))
    answer = allowed[scores[:, allowed].argmax(1)]
    told = own[scores[:, own].argmax(1)]
    place = torch.empty(int(ids.max()) + 1, dtype=torch.int64)
    place[ids] = torch.arange(len(ids))
    target = place[labels]
    found = {
        "accuracy": (answer == target).float().mean().item(),
        "accuracy_with_task_id": (told == target).float().mean().item(),
    }
    if learner.scenario == "class":
        owner = torch.tensor([first[c] for c in classes])
        found["task_id_accuracy"] = (owner[answer] == owner[target]).float().mean().item()
    return found
