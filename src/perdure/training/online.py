"""One pass over a stream whose borders nobody tells: its tasks as a single one, and accuracy along the way.

A row of what is measured along the way is named `online/<images seen>/<task of the stream>`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from perdure.core.learner import Core, derived_seed
from perdure.core.method import METHODS, Method
from perdure.streams import Captioned, ImageSet
from perdure.types import Row, Stream, Task, Union

POINTS = 20
"""How often accuracy is measured along a pass."""
_ALONG = "online"


def check_borders(method: Method) -> None:
    """Raise `ValueError` for the first part of `method` that needs to know where a task ends."""
    for part in method:
        if not part.borderless:
            able = ", ".join(sorted(name for name, kind in METHODS.items() if kind.borderless))
            raise ValueError(
                f"{part.name} needs to be told where a task begins or ends, which --online does not tell: use one of "
                f"{able}, without options that count tasks, or leave --online out"
            )


def as_one(stream: Stream, seed: int) -> Stream:
    """The stream as one task of all its classes, whose images come task after task, shuffled within each.

    Raises:
        ValueError: when it has no labelled images, or its tasks are told at test time.
    """
    if stream.scenario == "task":
        raise ValueError("scenario='task' tells at test time which task an image is from, which --online never knows")
    train, test = [], []
    for task in stream:
        if not isinstance(task.train, ImageSet) or isinstance(task.train, Captioned):
            raise ValueError(f"--online learns streams of labelled images, which {stream.name} is not: leave it out")
        generator = torch.Generator().manual_seed(derived_seed(seed, task.index, _ALONG))
        train.append(task.train.subset(torch.randperm(len(task.train), generator=generator)))
        test.append(task.test)
    names = {c: name for task in stream for c, name in zip(task.classes, task.names, strict=True)}
    whole = Task(
        0, f"{len(stream)} tasks in one pass", tuple(names), tuple(names.values()), 1, Union(train), Union(test)
    )
    # what is told of tasks beside each other is not known of one
    notes = {k: v for k, v in stream.notes.items() if k not in ("sequence", "few_shot")}
    return replace(stream, tasks=(whole,), notes=notes | {_ALONG: True})


class Along:
    """Accuracy on each task of the stream after so many steps of the pass.

    Args:
        learner: who learns.
        task: the whole stream, see `as_one`.
        batch_size: new images a step.
    """

    def __init__(self, learner: Core, task: Task, batch_size: int) -> None:
        assert isinstance(task.test, Union)
        self.learner, self.images, self.size = learner, len(task.train), batch_size
        self.tests = [replace(task, test=data) for data in task.test.sets]
        steps = math.ceil(self.images / batch_size)
        self.steps = {math.ceil(steps * point / POINTS) for point in range(1, POINTS + 1)}

    def __call__(self, step: int) -> list[Row]:
        """What is measured when `step` steps are done; nothing at most of them."""
        if step not in self.steps:
            return []
        seen = min(self.images, step * self.size)
        found = self.learner.objective.evaluate(self.learner, self.tests)
        return [Row(0, None, f"{_ALONG}/{seen}/{i}", each["accuracy"]) for i, each in enumerate(found)]


def along(rows: Sequence[Row], images: Sequence[int]) -> dict[str, Any]:
    """What a summary says of a pass.

    Args:
        rows: all measurements.
        images: train images of each task of the stream.

    Returns:
        `images` seen (n), accuracy on each of the `tasks` (n, T) and on all that had begun by then, `begun` (n): the
        means over tasks. Its mean over the pass is the anytime accuracy (Koh et al., ICLR 2022, arXiv:2110.10031).
    """
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        kind, _, of = row.metric.partition("/")
        if kind == _ALONG:
            images_seen, _, task = of.partition("/")
            found.setdefault(int(images_seen), {})[int(task)] = row.value
    places = sorted(found)
    tasks = [[found[place][i] for i in range(len(images))] for place in places]
    starts = [sum(images[:i]) for i in range(len(images))]
    known = [[found[place][i] for i, start in enumerate(starts) if start < place] for place in places]
    begun = [sum(values) / len(values) for values in known]
    return {"images": places, "tasks": tasks, "begun": begun}
