"""Few-shot class-incremental streams: a base task with all of its images, then sessions of few classes and few images.

FSCIL (Tao et al., CVPR 2020, arXiv:2004.10956): CIFAR-100 and miniImageNet as 60 classes and 8 sessions of 5 classes
with 5 images each, CUB-200 as 100 classes and 10 sessions of 10.
"""

from dataclasses import replace
from typing import Any

import torch

from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import Count, Seed, checked
from perdure.options.spec import Spec, parse_one
from perdure.streams.image_set import Captioned, ImageSet
from perdure.streams.naming import task_name
from perdure.streams.options import StreamPlan
from perdure.streams.sequence import undivided
from perdure.streams.splits import first_of_each
from perdure.types import Stream, Task

_BASE = 0.6  # of the classes, about: what FSCIL has of CIFAR-100 and miniImageNet


@checked
def fewshot(
    *stream: Spec | str | StreamPlan, shots: Count = 5, ways: Count = 5, base: Count | None = None, draw: Seed = 0
) -> StreamPlan:
    """A base task, then sessions of few classes with few images each: `fewshot(cifar100(), shots=5, ways=5)`.

    All test images of a class are tested. Of the order of classes the first are the base.

    Args:
        stream: a stream of labelled images, without options that divide it into tasks.
        shots: train images of each class of a session.
        ways: classes of a session.
        base: classes of the base task; None is about three fifths of all, and what the sessions leave. CUB-200 of the
            literature is `fewshot(cub200(), ways=10, base=100)`.
        draw: a seed of which images are the shots; it depends neither on the run's seed nor on the order of classes.

    Raises:
        ValueError: when there is not one stream, it is one of something else than labelled images, its classes do not
            divide as asked, or a class has fewer images than `shots`.
    """
    if len(stream) != 1:
        raise ValueError(f"fewshot of {len(stream)} streams: expected one, such as fewshot(cifar100(), shots=5)")
    made = _plan_of(stream[0])

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        whole = made(preprocess, seed, measured)
        if (
            len(whole) != 1
            or not isinstance(whole.tasks[0].train, ImageSet)
            or isinstance(whole.tasks[0].train, Captioned)
        ):
            raise ValueError(f"fewshot: {whole.name} is no stream of labelled images in one task; give one of these")
        sizes = _sizes(len(whole.tasks[0].classes), ways, base, whole.name)
        tasks = _sessions(whole.tasks[0], sizes, 0 if measured else shots, draw)
        notes: dict[str, Any] = {
            "train_images": [len(task.train) for task in tasks],
            "test_images": [len(task.test) for task in tasks],
            "few_shot": {"base": sizes[0], "ways": ways, "shots": shots},
        }
        return replace(whole, tasks=tasks, notes=whole.notes | notes)

    return plan


def _plan_of(stream: Spec | str | StreamPlan) -> StreamPlan:
    if not isinstance(stream, Spec | str):
        return stream
    spec = parse_one(stream) if isinstance(stream, str) else stream
    return undivided(spec, "in fewshot, which says what the tasks are")


def _sizes(classes: int, ways: int, base: int | None, name: str) -> list[int]:
    """Number of classes of each task."""
    sessions = round((1 - _BASE) * classes) // ways if base is None else (classes - base) // ways
    rest = classes - sessions * ways
    if sessions < 1 or (base is not None and rest != base):
        asked = "three fifths of the classes" if base is None else f"base={base}"
        near = classes - ways * max(1, sessions)
        fewer = "fewer ways" if base is None or base < classes else "a smaller base and fewer ways"
        remedy = f"give a base such as {near}, or other ways" if near > 0 else f"give {fewer}"
        raise ValueError(
            f"fewshot: {name} has {classes} classes, which are not {asked} and sessions of ways={ways}: {remedy}"
        )
    return [rest, *[ways] * sessions]


def _sessions(whole: Task, sizes: list[int], shots: int, draw: int) -> tuple[Task, ...]:
    """The base task and the sessions; with `shots` 0 all images of all classes."""
    train, test = whole.train, whole.test
    assert isinstance(train, ImageSet)
    assert isinstance(test, ImageSet)
    keys = [train.source.key(row) for row in train.rows.tolist()]
    few = first_of_each(train.labels.tolist(), keys, shots, f"shots {draw}") if shots else range(len(keys))
    chosen = torch.zeros(len(keys), dtype=torch.bool)
    chosen[list(few)] = True
    made, first = [], 0
    for index, size in enumerate(sizes):
        classes, names = whole.classes[first : first + size], whole.names[first : first + size]
        first += size
        ids = torch.tensor(classes)
        mine = torch.isin(train.labels, ids)
        learnt = train.subset((mine & chosen if index else mine).nonzero().flatten())
        tested = test.subset(torch.isin(test.labels, ids).nonzero().flatten())
        if index and shots:
            _check(learnt, dict(zip(classes, names, strict=True)), shots)
        made.append(Task(index, task_name(index, names), classes, names, len(sizes), learnt, tested))
    return tuple(made)


def _check(learnt: ImageSet, names: dict[int, str], shots: int) -> None:
    """Raise a ValueError for a class of a session that has not images enough."""
    for c, name in names.items():
        if (count := int((learnt.labels == c).sum())) < shots:
            raise ValueError(
                f"fewshot: class {name!r} has {count} train images, fewer than shots={shots}: give fewer shots, or add "
                "images"
            )
