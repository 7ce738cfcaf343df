"""What was answered to each test image after a task: kept beside its checkpoint, and what it adds up to.

From it come accuracies of single classes, what is confused with what, and how sure a difference of two methods is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.adapters.state import numbers_in
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint
from perdure.types import Task

ANSWERS = "answers.safetensors"
Answers = dict[int, tuple[Tensor, Tensor]]
"""By task the class of each of its test images, and the one that was answered: int32 (n,) each."""


def files(given: Answers) -> dict[str, dict[str, Tensor]]:
    """What to keep beside the checkpoint of the task just measured: 8 bytes an image; nothing without classes."""
    kept = {
        f"{task}/{name}": value.to(torch.int32)
        for task, pair in given.items()
        for name, value in zip(("label", "answer"), pair, strict=True)
    }
    return {ANSWERS: kept} if kept else {}


def read(done: Checkpoint) -> Answers:
    """What was answered after a task; nothing where an older version did not keep it."""
    found = checkpoint.beside(done, ANSWERS)
    return {task: (found[f"{task}/label"], found[f"{task}/answer"]) for task in numbers_in(found)}


def of_classes(answers: Answers) -> dict[int, tuple[int, int]]:
    """Class -> how many of its test images were answered rightly, and how many there are."""
    found: dict[int, tuple[int, int]] = {}
    for labels, given in answers.values():
        for c in torch.unique(labels).tolist():
            mine = labels == c
            right, count = found.get(c, (0, 0))
            found[c] = right + int((given[mine] == c).sum()), count + int(mine.sum())
    return found


def confusions(answers: Answers) -> Counter[tuple[int, int]]:
    """(class, answer) -> how many test images; right answers stand there too."""
    found: Counter[tuple[int, int]] = Counter()
    for labels, given in answers.values():
        found.update(zip(labels.tolist(), given.tolist(), strict=True))
    return found


def between_tasks(answers: Answers, owner: Mapping[int, int], tasks: int) -> list[list[float | None]]:
    """Row i, column j: the share of task i's test images that are answered with a class of task j.

    Args:
        answers: as `read` gives them.
        owner: class -> index of the task that taught it, the only one.
        tasks: how many there are.
    """
    square: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    for task, (_, given) in answers.items():
        if task < tasks and len(given):
            owners = Counter(owner.get(c, -1) for c in given.tolist())
            square[task] = [owners[j] / len(given) for j in range(tasks)]
    return square


def class_names(tasks: Sequence[Task]) -> dict[int, str]:
    """Names of classes, told apart: where two classes have one name, as of two data sets, "data set: name".

    Args:
        tasks: whose classes they are, in the order of the stream; the first that has a class names it.
    """
    first: dict[int, tuple[Task, str]] = {}
    for task in tasks:
        for c, name in zip(task.classes, task.names, strict=False):
            first.setdefault(c, (task, name))
    found, taken = dict[int, str](), Counter(name for _, name in first.values())
    for c, (task, name) in first.items():
        told = (name, f"{task.name}: {name}", f"task {task.number}, {task.name}: {name}", f"{name} ({c})")
        # a name that others have too is none's
        found[c] = next(each for i, each in enumerate(told) if taken[each] <= (i == 0) and each not in found.values())
    return found


def class_facts(done: Sequence[Checkpoint]) -> dict[str, Any]:
    """What summary.json says of the last task's answers: accuracy of each class by its name, and `confusion`.

    No `confusion` where tasks share classes, as domains do: an answer is then no task's.
    """
    answers = read(done[-1])
    if not answers:
        return {}
    tasks = done[-1].tasks[: done[-1].learnt]
    names, owner = class_names(tasks), {c: task.index for task in tasks for c in task.classes}
    facts: dict[str, Any] = {
        "class_accuracy": {names.get(c, str(c)): right / count for c, (right, count) in of_classes(answers).items()}
    }
    if len(owner) == sum(len(task.classes) for task in tasks):
        facts["confusion"] = between_tasks(answers, owner, len(tasks))
    return facts
