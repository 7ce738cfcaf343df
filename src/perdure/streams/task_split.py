"""From the images of a data set to the tasks of a stream: split, subsample, order, increments."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.streams import splits
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.naming import class_name, in_case_only, numbers, recorded, task_name
from perdure.streams.options import Options, read_order
from perdure.streams.sources import Source, told_shared
from perdure.types import Scenario, Stream, Task

_Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class LabelledPart(splits.ImagePart):
    """Labelled images, with `labels` and `domains` as positions in the names of `LabelledData`."""

    labels: _Ids
    domains: _Ids

    @classmethod
    def of(cls, source: Source, labels: Sequence[int], domains: Sequence[int] | None = None) -> "LabelledPart":
        """All images of `source`; without `domains` they are in domain 0."""
        ids = np.array(labels, dtype=np.int64)
        places = np.zeros_like(ids) if domains is None else np.array(domains, dtype=np.int64)
        return cls(source, range(len(ids)), list(map(source.key, range(len(ids)))), ids, places)

    def groups(self) -> list[tuple[int, int]]:
        """Class and domain of each image."""
        return list(zip(self.labels.tolist(), self.domains.tolist(), strict=True))


@dataclass(frozen=True)
class LabelledData:
    """A data set: its parts, and its classes and domains in their natural order.

    `test` is None when the data set has no test part; of one that is only measured, `train` may be the test part.
    Without domains, `domains` is empty and every image in domain 0. `numbers` are what the data itself calls its
    classes where these are numbers. `tasks` is how many there are by default, `scenario` the one that it prescribes.
    """

    name: str
    train: LabelledPart
    test: LabelledPart | None
    names: tuple[str, ...]
    domains: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    numbers: tuple[int, ...] | None = None
    tasks: int = 10
    scenario: Scenario | None = None


def arrange(found: LabelledData, options: Options, preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
    """The stream of tasks.

    Args:
        found: the data set.
        options: how its images become tasks.
        preprocess: what the backbone wants.
        seed: the run's; orders the classes (or the domains), nothing else.
        measured: nothing is learnt, all images are test images.

    Raises:
        ValueError: when the data set and the options do not fit together.
    """
    scenario = found.scenario or options.scenario
    train, test, split = splits.divide(found.train, found.test, found.train.groups(), "each class", measured)
    if measured:
        found, test = _with_classes_of(found, test)
    elif len(found.names) < 2:
        raise ValueError(f"{found.name}: only one class, {found.names[0]!r}; a stream needs at least 2")
    else:
        check_classes(found)
    shared = told_shared(train.source, test.source) if found.test is not None and not measured else []
    remarks = [*in_case_only(found.names), *shared]
    if options.per_class is not None:
        purpose, total = splits.drawn_anew("train images", options.draw), len(train)
        train = train.take(splits.first_of_each(train.groups(), train.keys, options.per_class, purpose))
        splits.check_drawn(options.draw, len(train), total)
        if options.draw is not None:
            split["drawn_sha256"] = splits.digest(sorted(train.keys))
    if options.test_per_class is not None:
        test = test.take(splits.first_of_each(test.groups(), test.keys, options.test_per_class, "test images"))
    if scenario == "domain":
        places = _by_domain(found, options, seed, measured)
    else:
        places = _by_class(found, options, seed, measured)
    if measured:
        places = [place for place in places if place.domain is None or place.domain in test.domains]
    made = _tasks(places, found, train, test, preprocess, options.skip_bad, measured)
    tasks = splits.all_with_images(found.name, made, "add some or leave it out", measured)
    notes = found.notes | ({"remarks": [*found.notes.get("remarks", ()), *remarks]} if remarks else {})
    return splits.noted(found.name, scenario, tasks, split, **notes)


def check_classes(found: LabelledData) -> None:
    """Raise a ValueError for a class without train images, whether it has test images or not."""
    learnt = set(found.train.labels.tolist())
    tested = Counter([] if found.test is None else found.test.labels.tolist())
    absent = [i for i in range(len(found.names)) if i not in learnt]
    strange = [i for i in absent if tested[i]]
    more = f" ({len(absent) - 1} more such classes)" if len(absent) > 1 else ""
    if strange:
        raise ValueError(
            f"{found.name}: class {found.names[strange[0]]!r} is in test ({tested[strange[0]]} images) but not in train"
            f"{more}; add train images or remove it from test"
        )
    if absent:
        raise ValueError(
            f"{found.name}: class {found.names[absent[0]]!r} has no train image{more}; add some or remove the class"
        )


@dataclass(frozen=True)
class _Place:
    """Which classes, and which domain if that matters, make up a task."""

    name: str
    classes: tuple[int, ...]
    domain: int | None


def _with_classes_of(found: LabelledData, test: LabelledPart) -> tuple[LabelledData, LabelledPart]:
    """The data set with no other classes than those of the test part, and that part with their labels."""
    present, labels = np.unique(test.labels, return_inverse=True)
    called = None if found.numbers is None else tuple(found.numbers[label] for label in present)
    names = tuple(found.names[label] for label in present)
    return replace(found, names=names, numbers=called), replace(test, labels=labels)


def _by_class(found: LabelledData, options: Options, seed: int, measured: bool) -> list[_Place]:
    order = ordered(found.names, options.order, "class", seed, found.numbers)
    sizes = _increments(len(order), options, 1 if measured else found.tasks)
    ends = np.cumsum(sizes).tolist()
    places = []
    for t, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        classes = tuple(order[end - size : end])
        places.append(_Place(task_name(t, [found.names[c] for c in classes]), classes, None))
    return places


def _increments(classes: int, options: Options, usual: int) -> list[int]:
    if options.increments is not None:
        if sum(options.increments) != classes:
            raise ValueError(
                f"increments={tuple(options.increments)}: they sum to {sum(options.increments)}, but there are "
                f"{classes} classes; make the two equal"
            )
        return list(options.increments)
    tasks = options.tasks or usual
    if tasks > classes:
        default = "" if options.tasks else " (the default)"
        raise ValueError(f"tasks={tasks}{default}: there are only {classes} classes; write tasks={classes} or fewer")
    return [classes // tasks + (t < classes % tasks) for t in range(tasks)]


def _by_domain(found: LabelledData, options: Options, seed: int, measured: bool) -> list[_Place]:
    count = len(found.domains)
    if not count:
        raise ValueError("scenario='domain' needs domain=..., the column or the folder level that holds the domain")
    if count < 2 and not measured:
        raise ValueError(f"{found.name}: only one domain, {found.domains[0]!r}; scenario='domain' needs at least 2")
    if options.increments is not None:
        raise ValueError("increments has no effect with scenario='domain', where each task is one domain: leave it out")
    if options.tasks not in (None, count):
        raise ValueError(f"tasks={options.tasks}: scenario='domain' has one task a domain, here {count}: leave it out")
    everything = tuple(range(len(found.names)))
    return [_Place(found.domains[d], everything, d) for d in ordered(found.domains, options.order, "domain", seed)]


def ordered(
    names: Sequence[str],
    order: str | int | Sequence[str | int] | None,
    kind: str,
    seed: int,
    called: Sequence[int] | None = None,
) -> list[int]:
    """Positions of `names` as the option `order` has them.

    Args:
        names: in their natural order.
        order: the option.
        kind: what they name, for messages.
        seed: the run's.
        called: the numbers by which the data itself calls them; what their names say when None.
    """
    if order is None or order == "seed" or isinstance(order, int):
        return splits.shuffled(names, f"{kind} order {order if isinstance(order, int) else seed}")
    if order == "natural":
        return list(range(len(names)))
    number = {n: i for i, n in enumerate(called or numbers(names) or range(len(names)))}
    place = {name: i for i, name in enumerate(names)}
    chosen = []
    for entry in read_order(order):
        if isinstance(entry, str):
            entry = recorded([class_name(entry, "order:")], place)[0]
            if entry not in place and (as_number := numbers([entry])) and as_number[0] in number:
                entry = as_number[0]
        if isinstance(entry, int) and entry not in number:
            raise ValueError(f"order: {entry} is not a {kind}; there are {min(number)}-{max(number)}")
        if isinstance(entry, str) and entry not in place:
            raise ValueError(f"order: there is no {kind} {entry!r}{meant(entry, names)}")
        chosen.append(place[entry] if isinstance(entry, str) else number[entry])
    if twice := [c for c, n in Counter(chosen).items() if n > 1]:
        raise ValueError(f"order names the {kind} {names[twice[0]]!r} twice; name each once")
    if missing := [name for i, name in enumerate(names) if i not in set(chosen)]:
        raise ValueError(f"order leaves out the {kind} {missing[0]!r} ({len(chosen)} of {len(names)} named); name all")
    return chosen


def _tasks(
    places: Sequence[_Place],
    found: LabelledData,
    train: LabelledPart,
    test: LabelledPart,
    preprocess: Preprocess,
    skip_bad: bool,
    measured: bool,
) -> Iterator[Task]:
    ids: dict[int, int] = {}
    budget = Budget()

    def images(part: LabelledPart, place: _Place) -> ImageSet:
        inside = np.isin(part.labels, place.classes)
        if place.domain is not None:
            inside &= part.domains == place.domain
        chosen = part.take(inside.nonzero()[0].tolist())
        rows, labels = torch.tensor(chosen.rows, dtype=torch.int64), [ids[c] for c in chosen.labels.tolist()]
        data = ImageSet(part.source, rows, torch.tensor(labels, dtype=torch.int64), preprocess, budget)
        return data.readable() if skip_bad else data

    for t, place in enumerate(places):
        for c in place.classes:
            ids.setdefault(c, len(ids))
        learnt, tested = images(train, place), images(test, place)
        present = set(learnt.labels.tolist())
        gone = [found.names[c] for c in place.classes if ids[c] not in present and place.domain is None]
        if gone and skip_bad and not measured:
            raise ValueError(f"{found.name}: class {gone[0]!r} has no readable train image; add some or remove it")
        classes = tuple(ids[c] for c in place.classes)
        names = tuple(found.names[c] for c in place.classes)
        yield Task(t, place.name, classes, names, len(places), learnt, tested)
