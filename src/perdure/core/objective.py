"""What every objective offers: a loss, scores of rows, and their evaluation.

A row is one thing that is scored: an image, where classes are learnt. Whatever comes of rows is (R, ...), an entry of a
batch (B, ...); where every example has one row, R is B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.types import AnyLearner, Batch, Task, Union

TEMPLATE = "a photo of a {}."
COSINES = 'head["logit_scale"] * torch.nn.functional.normalize(features) @ head["weight"].T'
"""`Head.scores` where rows of `weight` have unit length."""


@dataclass(frozen=True)
class Competitors:
    """What a single example competes with, where it is looked at alone.

    Args:
        only_task: whether of all classes only the task's own compete.
        others: other examples, see `Objective.competitors`.
    """

    only_task: bool = False
    others: Batch = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """How scores are made of features: in words, in Python, and the tensors, which Python finds in `head`."""

    what: str
    scores: str
    tensors: dict[str, Tensor]


OBJECTIVES: dict[str, type[Objective]] = {}
"""Every objective by name; a class registers itself by `class Mine(Objective, name="mine")`."""


class Objective(nn.Module):
    """Scores over all seen classes, learnt by cross-entropy among the classes that compete in a batch.

    The loss is local: only the task's classes enter the softmax (other columns get no gradient), as in InfLoRA,
    SD-LoRA and PILOT. As soon as a batch holds an example of another class (replay), all seen classes compete.
    """

    name: ClassVar[str]
    """As it is written."""
    asks: ClassVar[frozenset[str]] = frozenset({"classes"})
    """What a stream must have for it: `classes`, `captions` or `conversations`."""
    towers: ClassVar[frozenset[str]] = frozenset({"vision"})
    """Whose output it reads: what may be computed once, and where adapters have an effect."""
    outputs: ClassVar[tuple[str, ...]] = ("scores",)
    """Of which outputs of single examples its distributions are made (see `output`); none where rows are too many."""
    open_vocabulary: ClassVar[bool] = False
    """Whether a task can be measured before it was learnt."""
    one_row: ClassVar[bool] = True
    """Whether each example is one row, so that its features can be kept in its place."""
    vectorised: ClassVar[bool] = True
    """Whether gradients of single examples may be computed by `vmap`: no row is picked by what a batch holds."""
    linear: bool = False
    """Whether scores are linear in the features, with a bias, by a head that can be set (see `assign`)."""
    templates: tuple[str, ...] = (TEMPLATE,)
    """Sentences with `{}` into which names of classes are put."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or cls.__name__.lower()
        if name:
            OBJECTIVES[name] = cls

    def __init__(self) -> None:
        super().__init__()
        self.classes: tuple[int, ...] = ()  # seen, in column order
        self.names: tuple[str, ...] = ()
        self.task_columns: tuple[int, ...] = ()  # of the current task's classes
        self.former: tuple[tuple[int, ...], ...] = ()  # columns of former tasks' classes that answer together
        self.answered: dict[int, tuple[Tensor, Tensor]] = {}  # by task, of the last evaluation: labels, answers
        self.masked_loss = True  # False: every seen class always competes
        # who reads texts for it; in a list: the learner owns us, not we the learner
        self._learner: list[AnyLearner] = []

    def bind(self, learner: AnyLearner) -> None:
        """Called when it belongs to another learner than before."""
        self._learner = [learner] if "text" in self.towers else []

    def grow(self, learner: AnyLearner, task: Task) -> None:
        """Make room for the classes of `task`.

        Raises:
            ValueError: when the backbone lacks a tower that is read.
        """
        if lacking := self.towers - learner.backbone.towers().keys():
            raise ValueError(
                f"{self.name} needs a {min(lacking)} tower, which {learner.backbone.spec} lacks: use clip(path=...) or "
                "pocket(), or --objective classify"
            )
        self.bind(learner)
        fresh = [(c, n) for c, n in zip(task.classes, task.names, strict=True) if c not in self.classes]
        self.classes += tuple(c for c, _ in fresh)
        self.names += tuple(n for _, n in fresh)
        self.arrange(learner, task)

    def arrange(self, learner: AnyLearner, task: Task) -> None:
        """Note which columns are those of `task`, the learner's last, and which are of tasks before it."""
        column = {c: i for i, c in enumerate(self.classes)}
        self.task_columns = tuple(sorted(column[c] for c in task.classes))
        # apart where the task is told at test time, else together
        former = {tuple(sorted(column[c] for c in each.classes)) for each in learner.tasks[:-1] if each.classes}
        if learner.scenario != "task" and former:
            former = {tuple(sorted({i for each in former for i in each}))}
        self.former = tuple(sorted(former))

    def planned(self, task: Task) -> Task:
        """`task` as it will be measured; raises a ValueError, before anything is, where its test set cannot be."""
        return task

    def check_used(self, tasks: Sequence[Task]) -> None:
        """Raise a ValueError for an option that has no effect on `tasks`, which are all that is measured."""

    def grown(self, learner: AnyLearner) -> None:
        """Called when the method has made room too."""

    def forget(self, left: Any) -> dict[str, tuple[str, Tensor]]:
        """Let go of classes: see `perdure.core.forgetting.Forgotten`, which imports this.

        Returns:
            Name, in the learner, of each parameter with a row for each class -> its name now, and the rows kept (n,).
        """
        kept = left.columns.tolist()
        self.classes, self.names = tuple(self.classes[i] for i in kept), tuple(self.names[i] for i in kept)
        self.answered = {}
        return {}

    def unmask(self) -> None:
        """Let all seen classes compete for every example, and all heads learn."""
        self.masked_loss = False
        self.requires_grad_(True)

    def refresh(self) -> None:
        """Called before prediction, when parameters may have changed."""

    def precompute(self, learner: AnyLearner, batch: Batch) -> Batch:
        """What it wants to know of each image beside it and no training can change, as `{name: (B, ...)}`.

        Computed once for a training set where images stay as they are, and for a test set; never within a step.
        """
        return {}

    def embed_texts(self, learner: AnyLearner, batch: Batch) -> Batch:
        """`batch` with what its loss reads of the texts, computed once for all who ask in a step."""
        return batch

    def texts(self, learner: AnyLearner, batch: Batch) -> tuple[list[str], Tensor]:
        """Texts of the current task that the text tower reads in a step on `batch`, and the class of each, (n,)."""
        return [], batch["label"][:0]

    def shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (n, dim) of the captions that a step shows, and for each the row of its image, (n,)."""
        raise NotImplementedError

    def chosen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which captions a step shows, as (rows, places) into `text`; the same ones whenever asked in a step."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """What a person should know of how the last task was learnt, a sentence each."""
        return []

    def scores(self, features: Tensor) -> Tensor:
        """Scores (R, K) of rows (R, dim): of the seen classes, in the order of `classes`."""
        raise NotImplementedError

    def task_scores(self, features: Tensor) -> Tensor:
        """Scores (R, classes of the current task), the columns `task_columns`: all that most steps need."""
        return self.scores(features)[:, list(self.task_columns)]

    def output(self, learner: AnyLearner, batch: Batch, name: str) -> Tensor | list[Tensor]:
        """What the model makes of each example, (B, ...): `features`, `scores`, or embeddings of all its `captions`."""
        features = learner.encode(batch)
        return features if name == "features" else self.scores(features)

    def distributions(self, features: Tensor | None, batch: Batch, old: bool = False) -> list[Tensor]:
        """Scores of every softmax that answers, each (n, k) with a distribution in each of its n rows.

        Where texts are read the last one is the other way round: of each text over the batch's images.

        Args:
            features: (R, dim); None where `batch` holds the `outputs`, as a teacher gave them.
            batch: what a step trains on.
            old: of answers that former tasks had already.
        """
        scores = batch["scores"] if features is None else self.scores(features)
        return [scores[:, list(each)] for each in self.former] if old else [scores]

    def columns(self, labels: Tensor) -> Tensor:
        """Class ids (B,) to columns of the scores."""
        lookup = torch.full((max(self.classes) + 1,), -1, device=labels.device)
        lookup[list(self.classes)] = torch.arange(len(self.classes), device=labels.device)
        return lookup[labels]

    def targets(self, batch: Batch) -> Tensor:
        """The right column of each row, (R,)."""
        return self.columns(batch["label"])

    def owners(self, batch: Batch) -> Tensor:
        """The example of each row, (R,), each of which has one or more."""
        return torch.arange(len(batch["label"]), device=batch["label"].device)

    def chance_loss(self, batch: Batch, only_task: bool) -> float:
        """Loss of who knows nothing: log of the number of classes that compete."""
        return math.log(max(2, len(self.task_columns if only_task else self.classes)))

    def loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch."""
        return self.losses(features, batch).mean()

    def losses(self, features: Tensor, batch: Batch, only_task: bool | None = None) -> Tensor:
        """Cross-entropy of each example, (B,): the mean over its rows.

        Args:
            features: (R, dim).
            batch: with `label`.
            only_task: whether only the task's classes compete; None finds out from the labels.
        """
        target = self.targets(batch)
        if self.only_task_classes(batch) if only_task is None else only_task:
            target = torch.searchsorted(torch.tensor(self.task_columns, device=target.device), target)
            losses = F.cross_entropy(self.task_scores(features), target, reduction="none")
        else:
            losses = F.cross_entropy(self.scores(features), target, reduction="none")
        if len(losses) == len(batch["label"]):
            return losses
        owners = self.owners(batch)
        sums = losses.new_zeros(len(batch["label"])).index_add(0, owners, losses)
        return sums / torch.bincount(owners, minlength=len(sums))

    def only_task_classes(self, batch: Batch) -> bool:
        """Whether the batch holds the task's own classes only, and the loss is masked."""
        if not self.masked_loss or len(self.task_columns) == len(self.classes):
            return False
        target = self.targets(batch)
        return bool(torch.isin(target, torch.tensor(self.task_columns, device=target.device)).all())

    def example(self, batch: Batch, index: int) -> Batch:
        """The example at `index` as a batch of its own, with those of its texts that a step on `batch` shows."""
        return {name: value[index : index + 1] for name, value in batch.items()}

    def competitors(self, learner: AnyLearner, batch: Batch) -> Batch:
        """What single examples compete with, made of a `batch` of others: nothing where classes compete."""
        return {}

    def example_loss(self, features: Tensor, batch: Batch, rivals: Competitors) -> Tensor:
        """Loss of the one example of `batch`, a scalar, as in `losses`."""
        return self.losses(features, batch, rivals.only_task)[0]

    def example_scores(self, features: Tensor, batch: Batch, rivals: Competitors) -> Tensor:
        """Scores of the one example of `batch`, which say what it is taken for."""
        return self.scores(features)

    def assign(self, columns: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Set the head's rows for `columns` (n,), where it is `linear`: `weight` (n, dim) and `bias` (n,)."""
        raise NotImplementedError

    def head(self, learner: AnyLearner) -> Head:
        """What an export needs to give the same scores; who defines `scores` and not this cannot be exported."""
        raise NotImplementedError

    def evaluate(self, learner: AnyLearner, tasks: Sequence[Task], size: int = 256) -> list[dict[str, float]]:
        """Shares of right answers on the test set of each of `tasks`.

        As the scenario has it, with the task id given, and of the task id itself. Batches are as large as fit; scores
        of an example never depend on the others.
        """
        if not tasks:
            return []
        with learner.inference():
            tests = Union([learner.cache.test(task.test) for task in tasks])
            scores = torch.split(learner.scores_of(tests, size).cpu(), [len(task.test) for task in tasks])
        stream, last = learner.stream, learner.learnt - 1
        allowed = [set(stream.candidates(task, last)) & set(self.classes) | set(task.classes) for task in tasks]
        score = partial(task_accuracies, learner, classes=self.classes, first=stream.first_task())
        self.answered = {
            task.index: (task.test.labels.cpu(), best_class(each, self.classes, of))
            for task, each, of in zip(tasks, scores, allowed, strict=True)
        }
        return [score(*each) for each in zip(tasks, scores, allowed, strict=True)]


def asking(*what: str) -> str:
    """Names of the objectives that learn one of `what`, as they would be written in a sentence."""
    return " or ".join(name for name, objective in OBJECTIVES.items() if not objective.asks.isdisjoint(what))


def best_class(scores: Tensor, classes: Sequence[int], candidates: set[int]) -> Tensor:
    """The class among `candidates` with the best of the scores (n, columns) of `classes`, int64 (n,)."""
    ids = torch.tensor(classes)
    allowed = torch.isin(ids, torch.tensor([*candidates])).nonzero().flatten()
    return ids[allowed[scores[:, allowed].argmax(1)]]


def task_accuracies(
    learner: AnyLearner, task: Task, scores: Tensor, candidates: set[int], classes: Sequence[int], first: dict[int, int]
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
