"""From the images of a data set to the tasks of a stream: split, subsample, order, increments."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.naming import class_name, in_case_only, numbers, recorded
from perdure.streams.options import Options, read_order
from perdure.streams.sources import Source
from perdure.streams.splits import SHARE, digest, first_of_each, held_out, shuffled
from perdure.types import Stream, Task

_TASKS = 10
_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """Labelled images: `rows` of `source`, with `labels` and `domains` as positions in the names of `Found`."""

    source: Source
    rows: np.ndarray[Any, np.dtype[np.int64]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    domains: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Sequence[int]) -> "Part":
        """The images at `positions`."""
        at = np.asarray(positions, dtype=np.int64)
        return replace(self, rows=self.rows[at], labels=self.labels[at], domains=self.domains[at])

    def keys(self) -> list[str]:
        """What identifies each image."""
        return [self.source.key(int(row)) for row in self.rows]

    def groups(self) -> list[tuple[int, int]]:
        """Class and domain of each image."""
        return list(zip(self.labels.tolist(), self.domains.tolist(), strict=True))


@dataclass(frozen=True)
class Found:
    """A data set: its parts, and its classes and domains in their natural order.

    `test` is None when the data set has no test part; of one that is only measured, `train` may be the test part.
    Without domains, `domains` is empty and every image in domain 0. `numbers` are what the data itself calls its
    classes where these are numbers.
    """

    name: str
    train: Part
    test: Part | None
    names: tuple[str, ...]
    domains: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    numbers: tuple[int, ...] | None = None


def arrange(found: Found, options: Options, preprocess: Preprocess, seed: int) -> Stream:
    """The stream of tasks.

    Args:
        found: the data set.
        options: how its images become tasks.
        preprocess: what the backbone wants.
        seed: the run's; orders the classes (or the domains), nothing else.

    Raises:
        ValueError: when the data set and the options do not fit together.
    """
    if options.measured:
        found, options = _only_tested(found), options.by_default(tasks=1)
    elif len(found.names) < 2:
        raise ValueError(f"{found.name}: only one class, {found.names[0]!r}; a stream needs at least 2")
    train, test, split = _split(found, options)
    if not options.measured:
        _check_classes(found, train, test)
    split |= {"train_sha256": digest(sorted(train.keys())), "test_sha256": digest(sorted(test.keys()))}
    if options.per_class is not None:
        train = train.take(first_of_each(train.groups(), train.keys(), options.per_class, "train images"))
    if options.test_per_class is not None:
        test = test.take(first_of_each(test.groups(), test.keys(), options.test_per_class, "test images"))
    lots = _by_domain(found, options, seed) if options.scenario == "domain" else _by_class(found, options, seed)
    if options.measured:
        lots = [lot for lot in lots if lot.domain is None or lot.domain in test.domains]
    tasks = _tasks(lots, found, train, test, options, preprocess)
    notes = {
        "data": found.name,
        "classes": list(dict.fromkeys(name for task in tasks for name in task.names)),
        "train_images": [len(task.train) for task in tasks],
        "test_images": [len(task.test) for task in tasks],
        "split": split,
        "skipped": [where for task in tasks for data in (task.train, task.test) for where in _skipped(data)],
        **found.notes,
    }
    if alike := in_case_only(found.names):
        notes["remarks"] = [*notes.get("remarks", ()), *alike]
    return Stream(found.name, options.scenario, tasks, notes)


@dataclass(frozen=True)
class _Lot:
    name: str
    classes: tuple[int, ...]
    domain: int | None


def _only_tested(found: Found) -> Found:
    """The data set as it is measured: its test part, or all of it when it has none, with the classes in there."""
    test = found.train if found.test is None else found.test
    present = sorted(set(test.labels.tolist()))
    place = {label: i for i, label in enumerate(present)}
    labels = np.array([place[label] for label in test.labels.tolist()], dtype=np.int64)
    known = None if found.numbers is None else tuple(found.numbers[label] for label in present)
    names = tuple(found.names[label] for label in present)
    return replace(found, train=test.take([]), test=replace(test, labels=labels), names=names, numbers=known)


def _split(found: Found, options: Options) -> tuple[Part, Part, dict[str, Any]]:
    if options.measured and found.test is not None:
        return found.train, found.test, {"kind": "all of it is measured"}
    if found.test is not None:
        return found.train, found.test, {"kind": "given"}
    held = held_out(found.train.groups(), found.train.keys(), SHARE, "test part")
    kept = np.setdiff1d(np.arange(len(found.train)), held)
    return found.train.take(kept.tolist()), found.train.take(held), {"kind": f"{SHARE:.0%} of each class held out"}


def _check_classes(found: Found, train: Part, test: Part) -> None:
    learnt = set(train.labels.tolist())
    tested = Counter(test.labels.tolist())
    if strange := sorted(set(tested) - learnt):
        raise ValueError(
            f"{found.name}: class {found.names[strange[0]]!r} is in test ({tested[strange[0]]} images) but not in train"
            f"{_more(len(strange))}; add train images or remove it from test"
        )
    if empty := [name for i, name in enumerate(found.names) if i not in learnt]:
        raise ValueError(
            f"{found.name}: class {empty[0]!r} has no train image{_more(len(empty))}; add some or remove the class"
        )


def _more(count: int) -> str:
    return f" (and {count - 1} more classes)" if count > 1 else ""


def _by_class(found: Found, options: Options, seed: int) -> list[_Lot]:
    order = ordered(found.names, options.order, "class", seed, found.numbers)
    sizes = _increments(len(order), options)
    ends = np.cumsum(sizes).tolist()
    lots = []
    for t, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        classes = tuple(order[end - size : end])
        shown = ", ".join(found.names[c] for c in classes[:_SHOWN]) + (", ..." if size > _SHOWN else "")
        lots.append(_Lot(f"{t}: {shown} ({size} {'class' if size == 1 else 'classes'})", classes, None))
    return lots


def _increments(classes: int, options: Options) -> list[int]:
    if options.increments is not None:
        if sum(options.increments) != classes:
            raise ValueError(
                f"increments={tuple(options.increments)}: they sum to {sum(options.increments)}, but there are "
                f"{classes} classes; make the two equal"
            )
        return list(options.increments)
    tasks = options.tasks or _TASKS
    if tasks > classes:
        default = "" if options.tasks else " (the default)"
        raise ValueError(f"tasks={tasks}{default}: there are only {classes} classes; write tasks={classes} or fewer")
    return [classes // tasks + (t < classes % tasks) for t in range(tasks)]


def _by_domain(found: Found, options: Options, seed: int) -> list[_Lot]:
    count = len(found.domains)
    if not count:
        raise ValueError("scenario='domain' needs domain=..., the column or the folder level that holds the domain")
    if count < 2 and not options.measured:
        raise ValueError(f"{found.name}: only one domain, {found.domains[0]!r}; scenario='domain' needs at least 2")
    if options.increments is not None:
        raise ValueError("increments has no effect with scenario='domain', where each task is one domain: leave it out")
    if options.tasks not in (None, count):
        raise ValueError(f"tasks={options.tasks}: scenario='domain' has one task a domain, here {count}: leave it out")
    everything = tuple(range(len(found.names)))
    return [_Lot(found.domains[d], everything, d) for d in ordered(found.domains, options.order, "domain", seed)]


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
    if order is None or isinstance(order, int):
        return shuffled(names, f"{kind} order {seed if order is None else order}")
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
    lots: list[_Lot], found: Found, train: Part, test: Part, options: Options, preprocess: Preprocess
) -> tuple[Task, ...]:
    ids: dict[int, int] = {}
    for lot in lots:
        for c in lot.classes:
            ids.setdefault(c, len(ids))
    budget = Budget()
    tasks = []
    for t, lot in enumerate(lots):
        learnt, tested = (_data(part, lot, ids, preprocess, budget) for part in (train, test))
        if options.skip_bad:
            learnt, tested = learnt.readable(), tested.readable()
            present = set(learnt.labels.tolist())
            gone = [found.names[c] for c in lot.classes if ids[c] not in present and lot.domain is None]
            if gone and not options.measured:
                raise ValueError(f"{found.name}: class {gone[0]!r} has no readable train image; add some or remove it")
        for part, data in (("train", learnt), ("test", tested)):
            if not len(data) and not (options.measured and part == "train"):
                raise ValueError(f"{found.name}: task {lot.name!r} has no {part} image; add some or leave it out")
        classes = tuple(ids[c] for c in lot.classes)
        names = tuple(found.names[c] for c in lot.classes)
        tasks.append(Task(t, lot.name, classes, names, len(lots), learnt, tested))
    return tuple(tasks)


def _data(part: Part, lot: _Lot, ids: dict[int, int], preprocess: Preprocess, budget: Budget) -> ImageSet:
    inside = np.isin(part.labels, lot.classes)
    if lot.domain is not None:
        inside &= part.domains == lot.domain
    labels = torch.tensor([ids[c] for c in part.labels[inside].tolist()], dtype=torch.int64)
    return ImageSet(part.source, torch.from_numpy(part.rows[inside]), labels, preprocess, budget)


def _skipped(data: Any) -> tuple[str, ...]:
    return data.skipped if isinstance(data, ImageSet) else ()
