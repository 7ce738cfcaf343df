"""A class is forgotten: its column goes, and what parts of a learner say that they keep of it.

What is left is what a fresh learner has that grows for the same tasks without the class, so it is saved, loaded and
taught like any other.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.streams.image_set import ImageSet
from perdure.types import Data, Subset, Task


@dataclass(frozen=True)
class Forgotten:
    """What leaves a learner; for the hook `forget` of modules that keep something of classes.

    Args:
        classes: the ids that go.
        columns: of the scores, those that stay, in their order, int64 (n,).
        tasks: as they were, with these classes.
    """

    classes: frozenset[int]
    columns: Tensor
    tasks: tuple[Task, ...]

    def stays(self, classes: Tensor) -> Tensor:
        """Which of `classes` (n,) stay, bool (n,)."""
        return ~torch.isin(classes.cpu(), torch.tensor(sorted(self.classes)))


def forget_classes(learner: Core, classes: Collection[int]) -> None:
    """Let `learner` be as if its tasks never had the classes, but for what their images have done to trained weights.

    Args:
        learner: who has learnt other classes too.
        classes: ids.
    """
    seen = torch.tensor(learner.objective.classes)
    gone = torch.tensor(sorted(classes))
    columns = (~torch.isin(seen, gone)).nonzero().flatten()
    left = Forgotten(frozenset(classes), columns, tuple(learner.tasks))
    renamed = learner.objective.forget(left)
    for module in [*learner.method.modules()]:
        if isinstance(module, BufferDict):
            _rename(module, renamed)
        if callable(forget := getattr(module, "forget", None)):
            forget(left)
    learner.tasks = without_classes(learner.tasks, left.classes)
    learner.objective.arrange(learner, learner.task)
    learner.kept.clear()
    learner.still.clear()


def without_classes(tasks: Sequence[Task], classes: Collection[int]) -> list[Task]:
    """The tasks without some classes; a training set stays whole, for memories refer to its images by position."""
    return [_without(task, classes) for task in tasks]


def _without(task: Task, classes: Collection[int]) -> Task:
    kept = [(c, name) for c, name in zip(task.classes, task.names, strict=True) if c not in classes]
    if len(kept) == len(task.classes):
        return task
    ids, names = tuple(c for c, _ in kept), tuple(name for _, name in kept)
    return dataclasses.replace(task, classes=ids, names=names, test=only_classes(task.test, ids))


def only_classes(data: Data, classes: Sequence[int]) -> Data:
    """The examples of `data` whose class is one of `classes`; `data` itself where all are."""
    mine = torch.isin(data.labels.cpu(), torch.tensor(classes, dtype=torch.int64))
    if bool(mine.all()):
        return data
    rows = mine.nonzero().flatten()
    return data.subset(rows) if isinstance(data, ImageSet) else Subset(data, rows)


def _rename(held: BufferDict, renamed: dict[str, tuple[str, Tensor]]) -> None:
    """Values that stand under the names of heads' parameters, as importances do, follow these."""
    if not (mine := {name: held[name] for name in held if name in renamed}):
        return
    for name in mine:
        del held[name]
    for name, value in mine.items():
        new, rows = renamed[name]
        if len(rows):
            held[new] = value[rows.to(value.device)]
