"""A learner measured on the images of a stream, on those of its own run, or on those of the folders it was taught."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.api.folders import taught_tasks
from perdure.api.given import known_task, untaught, within
from perdure.api.learner import Learner
from perdure.backbones.preprocess import skippable
from perdure.evaluation.calibration import errors
from perdure.evaluation.with_task import measured
from perdure.formatting import meant, shortened
from perdure.process import plain
from perdure.streams import build_stream
from perdure.streams.folders import told_left_out
from perdure.streams.naming import recorded
from perdure.training.building import check_gives
from perdure.training.config import make_stream
from perdure.training.summary import of_all_tasks, scored_by, taught_hashes
from perdure.types import Batch, Data, Row, Task


@plain()
def evaluate(
    folder: str | Path, stream: str | None, device: str | None = None, told_task: str | None = None
) -> tuple[list[Task], list[Row], list[str]]:
    """The tasks of a stream, a learner's accuracy on them, and what to know about it; classes are matched by name.

    All images of a stream that is given are measured: its test part where it has one, else all of it, without those
    that the learner was taught, and without classes that it does not know. Without a stream these are the test images
    of what it was taught. With `told_task` answers are given within the learnt task of that name.

    Raises:
        ValueError: when no class of the stream is among those that were learnt, or all images were taught.
    """
    folder = Path(folder)
    learner = Learner.load(folder, device)
    described, remarks, tasks = stream or learner.config.stream or str(folder), list[str](), list[Task]()
    if stream or learner.config.stream:
        prepared = learner.backbone.preprocess
        own = make_stream(learner.config, prepared) if stream is None else None
        found = own or build_stream(described, prepared, learner.config.seed, measured=True)
        check_gives(found, learner, described)
        tasks = list(found.tasks if stream else found.tasks[: learner.learnt])
        remarks += remarks_on(found.notes)
    if not stream and learner.learnt > len(tasks):
        tasks += [task for task in taught_tasks(learner, folder, remarks.append) if task.index >= len(tasks)]
    known_as = known_task(learner, told_task)
    if known_as is not None and stream is None:
        tasks = [task for task in tasks if task.index == known_as.index]
        if not tasks:
            raise ValueError(f"task {known_as.name!r} has no test images at hand: measure it on others, with --stream")
    if stream is not None:
        known = taught_hashes(folder)
        unknown = learner.learnt - len(known)
        tasks, count = _untaught(tasks, of_all_tasks([known]), f"{described}: all", folder)
        images = sum(len(task.test) for task in tasks)
        things = "questions" if "conversations" in learner.objective.asks else "images"
        if unknown:
            remarks.append(f"which images {unknown} of {learner.learnt} tasks were taught is not known: they count")
        apart = f"; {count} more were taught to this learner and are left out" if count else ""
        remarks.append(f"{images} {things} are measured{apart}")
    if "classes" in learner.objective.asks:
        tasks = _named_alike(tasks, learner, f"{described}: ", folder, remarks)
    if "conversations" in learner.objective.asks:  # by which score, for who wants means
        known_scores = {task.index: task.score for task in learner.tasks} if stream is None else {}
        plan = learner.objective.planned
        tasks = [
            dataclasses.replace(task, score=known_scores[task.index]) if task.index in known_scores else plan(task)
            for task in tasks
        ]
        scores = scored_by(learner.config.describe(), [task.score for task in tasks])
        tasks = [dataclasses.replace(task, score=score) for task, score in zip(tasks, scores, strict=True)]
    with within(known_as, learner, tasks) as asked:
        with skippable("skip_bad=True in the stream"):
            # of its own tasks the number says which they are
            found_on = (measured if stream is None and known_as is None else learner.objective.evaluate)(learner, asked)
        sure = errors(learner, list(asked)) if "classes" in learner.objective.asks else []
    rows = [
        Row(learner.learnt - 1, t.index, k, v) for t, each in zip(asked, found_on, strict=True) for k, v in each.items()
    ]
    return list(asked), rows + sure, remarks


def remarks_on(notes: Mapping[str, Any]) -> list[str]:
    """What a stream's notes say to who uses it, line by line."""
    left_out = notes.get("left_out")
    return [*([told_left_out(left_out)] if left_out else []), *notes.get("remarks", ())]


def _untaught(tasks: Sequence[Task], known: Tensor, what: str, folder: Path) -> tuple[list[Task], int]:
    """The tasks without the images whose hashes are known, and how many these were."""
    parts = [(task, *untaught(task.test, known)) for task in tasks]
    kept, count = (
        [dataclasses.replace(task, test=test) for task, test, _ in parts if len(test)],
        sum(n for *_, n in parts),
    )
    if not kept:
        raise ValueError(f"{what} {count} images were taught to {folder}: measure on others")
    return kept, count


def _named_alike(tasks: Sequence[Task], learner: Learner, what: str, folder: Path, remarks: list[str]) -> list[Task]:
    """The tasks with the learner's ids of their classes, without classes that it does not know; these are told."""
    kept, strange = [], dict[str, int]()
    for task in tasks:
        names = dict(zip(task.classes, recorded(task.names, learner.known), strict=True))
        for c, name in names.items():
            if name not in learner.known:
                strange[name] = strange.get(name, 0) + int((task.test.labels == c).sum())
        ids = {c: learner.known[name] for c, name in names.items() if name in learner.known}
        test = _Renumbered(task.test, ids)
        if len(test):
            kept.append(dataclasses.replace(task, classes=tuple(ids.values()), test=test))
    listed = ", ".join(f"{shortened(name)}{meant(name, learner.known)}" for name in list(strange)[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    if not kept:
        raise ValueError(f"{what}no class is among what {folder} has learnt, but {listed}{more}")
    if strange:
        remarks.append(
            f"{sum(strange.values())} images of {len(strange)} classes that were never learnt are left out: "
            f"{listed}{more}"
        )
    return kept


class _Renumbered:
    """Data of classes that a learner knows, with its ids of them."""

    def __init__(self, data: Data, ids: Mapping[int, int]) -> None:
        self.data = data
        self.rows = [row for row, c in enumerate(data.labels.tolist()) if c in ids]
        self.labels = torch.tensor([ids[int(data.labels[row])] for row in self.rows], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        batch = self.data.__getitems__([self.rows[i] for i in positions])
        return batch | {"label": self.labels[list(positions)]}
