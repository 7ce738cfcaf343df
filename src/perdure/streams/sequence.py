"""A stream of data sets: one task each, in the order written, with classes of their own."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch

from perdure.backbones.preprocess import Preprocess
from perdure.options.ranges import Seed, checked
from perdure.options.spec import Spec, build, parse_one
from perdure.streams.image_set import Budget, Captioned, ImageSet
from perdure.streams.options import REGISTRY, StreamPlan, check_order
from perdure.streams.splits import digest, noted
from perdure.streams.task_split import ordered
from perdure.types import Stream, Task

_DIVIDES = ("tasks", "increments", "scenario", "domain", "protocol", "embed")
"""Options of a stream that say how it is divided."""


@checked
def sequence(
    *streams: Spec | str,
    scenario: Literal["task", "class"] = "task",
    order: str | Seed | Sequence[str | Seed] | None = None,
) -> StreamPlan:
    """Data sets one after another, each of them one task: `sequence(images(path="a"), cub200())`.

    Classes of different data sets are different ones, whatever they are called. The parts are streams of labelled
    images, or streams of images with captions. Runs measure every task after every task, also before it is learnt.

    Args:
        streams: the data sets, without options that divide them into tasks.
        scenario: "task" (each data set is answered among its own classes) or "class" (all seen classes compete).
        order: None or "natural" (as written), "seed" (by the run's), an integer seed, or all names (or positions) as a
            list.

    Raises:
        ValueError: when there is only one part, when a part divides itself, or when labelled and captioned ones mix.
    """
    check_order(order)
    specs = [parse_one(each) if isinstance(each, str) else each for each in streams]
    if len(specs) < 2:
        raise ValueError(
            f"sequence of {len(specs)} data sets: expected at least 2, such as 'sequence(images(path=\"a\"), cub200())'"
        )
    plans = [_one_task(spec) for spec in specs]

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        # Made-up pictures follow the seed: every part gets its own. The order of real data sets is fixed above.
        seeds = [int(digest((seed, "part", i))[:15], 16) for i in range(len(plans))]
        found = [each(preprocess, own, measured) for each, own in zip(plans, seeds, strict=True)]
        names = _distinct([stream.name for stream in found])
        chosen = ordered(names, "natural" if order is None else order, "data set", seed)
        return _joined([found[i] for i in chosen], [names[i] for i in chosen], scenario)

    return plan


def _one_task(spec: Spec) -> StreamPlan:
    if spec.name == "sequence":
        raise ValueError(f"{str(spec)!r} within a sequence: write its parts in the outer one")
    if spec.name == "captions" and not isinstance(columns := dict(spec.kwargs).get("captions", ""), str):
        raise ValueError(f"captions={columns!r} makes a task of each column, a sequence one of each data set: keep one")
    return undivided(spec, "in a sequence, where each data set is one task", order="natural", by="natural")


def undivided(spec: Spec, why: str, **more: str) -> StreamPlan:
    """The stream of `spec` as a single task.

    Args:
        spec: without options that divide it.
        why: they would have no effect.
        more: options that are decided too, where the stream has them.

    Raises:
        ValueError: when `spec` has an option that is decided.
    """
    decided = {"tasks": 1} | more
    for name, value in spec.kwargs:
        if name in (*_DIVIDES, *decided):
            raise ValueError(f"{name}={value!r} has no effect on {spec.name!r} {why}: leave it out")
    factory = REGISTRY.get(spec.name)
    options = inspect.signature(factory).parameters if factory else {}
    given = tuple((name, value) for name, value in decided.items() if name in options and "tasks" in options)
    plan: StreamPlan = build(Spec(spec.name, (*spec.kwargs, *given), spec.parts), REGISTRY, "stream")
    return plan


def _distinct(names: Sequence[str]) -> list[str]:
    distinct: list[str] = []
    for name in names:
        number = sum(name == earlier for earlier in names[: len(distinct)]) + 1
        distinct.append(name if number == 1 else f"{name} ({number})")
    return distinct


def _joined(parts: Sequence[Stream], names: Sequence[str], scenario: Literal["task", "class"]) -> Stream:
    for part, name in zip(parts, names, strict=True):
        if len(part.tasks) != 1:
            raise ValueError(f"sequence: {name!r} has {len(part.tasks)} tasks, and each data set is one: give it whole")
        if not all(isinstance(data, ImageSet) for data in (part.tasks[0].train, part.tasks[0].test)):
            raise ValueError(f"sequence: {name!r} has conversations: write in_turn(...) in its place")
    captioned = [isinstance(part.tasks[0].train, Captioned) for part in parts]
    if any(captioned) and not all(captioned):
        with_captions, without = names[captioned.index(True)], names[captioned.index(False)]
        raise ValueError(
            f"sequence: {with_captions!r} has captions, {without!r} has labels; make a sequence of one kind"
        )
    sets: list[list[Any]] = [[part.tasks[0].train, part.tasks[0].test] for part in parts]
    if all(captioned):
        _align(sets)
    tasks = []
    budget = Budget()
    first = 0
    for t, (part, name, (train, test)) in enumerate(zip(parts, names, sets, strict=True)):
        (task,) = part.tasks
        classes = tuple(first + c for c in task.classes)
        titles = (name,) if captioned[t] else task.names
        train, test = (data.relabelled(data.labels + first, budget) for data in (train, test))
        tasks.append(Task(t, name, classes, titles, len(parts), train, test))
        first += len(classes)
    return _noted(parts, names, tasks, scenario)


def _align(sets: list[list[Any]]) -> None:
    """Give captioned sets identities of their own."""
    following = 0
    for i, pair in enumerate(sets):
        moved = [data.moved(following) for data in pair if isinstance(data, Captioned)]
        following = 1 + int(torch.cat([data.pairs for data in moved]).max())
        sets[i] = list(moved)


def _noted(
    parts: Sequence[Stream], names: Sequence[str], tasks: Sequence[Task], scenario: Literal["task", "class"]
) -> Stream:
    notes = [part.notes for part in parts]
    splits = [each["split"] for each in notes]
    split = {"kind": "; ".join(dict.fromkeys(each["kind"] for each in splits))}
    for key in ("train_sha256", "test_sha256"):
        if all(key in each for each in splits):
            split[key] = digest(each[key] for each in splits)
    more: dict[str, Any] = {"data": " + ".join(names), "sequence": True}
    if all("captions" in each for each in notes):
        more["captions"] = {side: [n for each in notes for n in each["captions"][side]] for side in ("train", "test")}
    if remarks := [line for each in notes for line in each.get("remarks", ())]:
        more["remarks"] = remarks
    together = noted("sequence", scenario, tasks, split, **more)
    # What else a data set says of itself, such as how many images were left out.
    for name, each in zip(names, notes, strict=True):
        if own := {k: v for k, v in each.items() if k not in (*together.notes, "captions")}:
            together.notes.setdefault("data_sets", {})[name] = own
    return together
