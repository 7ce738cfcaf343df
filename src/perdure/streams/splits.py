"""How any data set becomes a stream: what is drawn, from names and a seed only, what is held out, and what is noted."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import numpy as np

from perdure.streams.sources import Source, identities
from perdure.types import Scenario, Stream, Task

SHARE = 0.2
"""Of each class's images, how many become test images when a data set has no test part."""


def shuffled(names: Sequence[str], purpose: str) -> list[int]:
    """Positions of `names` in a random order that `purpose` determines."""
    # Hashes rather than a generator: one name more or less leaves the order of the others as it was, and the
    # order cannot change with the version of a library.
    return sorted(range(len(names)), key=lambda i: (digest((purpose, names[i])), i))


def first_of_each(groups: Sequence[Hashable], names: Sequence[str], size: int, purpose: str) -> list[int]:
    """Positions of at most `size` random members of each group, in increasing order."""
    chosen: dict[Hashable, int] = {}
    kept = []
    for i in shuffled(names, purpose):
        if chosen.setdefault(groups[i], 0) < size:
            chosen[groups[i]] += 1
            kept.append(i)
    return sorted(kept)


def drawn_anew(purpose: str, draw: int | None) -> str:
    """A purpose with a seed of its own; as it is where that is None or 0."""
    return f"{purpose} {draw}" if draw else purpose


def check_drawn(draw: int | None, kept: int, total: int) -> None:
    """Refuse a `draw` of train examples that keeps all of them.

    Raises:
        ValueError: when `kept` are as many as there are in all.
    """
    if draw is not None and kept == total > 0:
        raise ValueError(
            f"draw={draw} has no effect: all {total} train examples are kept; ask for fewer (per_class, per_task), or "
            "leave draw, and images in vary, out"
        )


def held_out(groups: Sequence[Hashable], names: Sequence[str], share: float, purpose: str) -> list[int]:
    """Positions of a random `share` of each group, at least one of every group with two members or more."""
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    quota = {g: min(max(1, round(n * share)), n - 1) for g, n in sizes.items()}
    held = []
    for i in shuffled(names, purpose):
        if quota[groups[i]]:
            quota[groups[i]] -= 1
            held.append(i)
    return sorted(held)


@dataclass(frozen=True)
class ImagePart:
    """A part of a data set: `rows` of `source`, with `keys` that name each image wherever the data lies.

    Each further field has one value an image, or is None.
    """

    source: Source
    rows: Sequence[int]
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Sequence[int]) -> Self:
        """The images at `positions`."""

        def some(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[np.asarray(positions, dtype=np.int64)]
            return values and [values[i] for i in positions]

        return replace(self, **{f.name: some(getattr(self, f.name)) for f in fields(self) if f.name != "source"})


P = TypeVar("P", bound=ImagePart)


def divide(
    train: P, test: P | None, groups: Sequence[Hashable], each: str, measured: bool = False
) -> tuple[P, P, dict[str, str]]:
    """The train and the test part of a data set, and what is noted of them.

    Without a test part a share of each of the `groups` of `train` is held out; `each` says what these are. Rows of a
    table that show the same image are held out together. Of what is only measured, the test part or else all is tested.
    """
    if measured:
        tested = train if test is None else test
        train, test, kind = tested.take([]), tested, "all of it is measured"
    elif test is not None:
        kind = "given"
    else:
        first = _first_shown(train)
        alone = list(dict.fromkeys(first))
        drawn = held_out([groups[i] for i in alone], [train.keys[i] for i in alone], SHARE, "test part")
        chosen = {alone[i] for i in drawn}
        held = [i for i, shown in enumerate(first) if shown in chosen]
        kept = sorted({*range(len(train))} - {*held})
        train, test, kind = train.take(kept), train.take(held), f"{SHARE:.0%} of {each} held out"
    sums = {f"{which}_sha256": digest(sorted(part.keys)) for which, part in (("train", train), ("test", test))}
    return train, test, {"kind": kind} | sums


def _first_shown(part: ImagePart) -> list[int]:
    """For each row, the position of the first one that shows the same image; its own where that is not known."""
    [shown] = identities([part.source])
    first: dict[str, int] = {}
    return [i if (image := shown[row]) is None else first.setdefault(image, i) for i, row in enumerate(part.rows)]


def all_with_images(data: str, tasks: Iterable[Task], remedy: str, measured: bool = False) -> tuple[Task, ...]:
    """The tasks; raises a ValueError for one without images, unless it is only `measured`."""
    made: list[Task] = []
    for task in tasks:
        for which, images in (("train", task.train), ("test", task.test)):
            if not len(images) and not (measured and which == "train"):
                readable = "readable " if getattr(images, "skipped", ()) else ""
                raise ValueError(f"{data}: task {task.name!r} has no {readable}{which} image; {remedy}")
        made.append(task)
    return tuple(made)


def noted(name: str, scenario: Scenario, tasks: Sequence[Task], split: Any, **more: Any) -> Stream:
    """The stream of tasks, with what is noted of every one, and what `more` there is to note."""
    sets = [data for task in tasks for data in (task.train, task.test)]
    notes = {
        "data": name,
        "classes": list(dict.fromkeys(each for task in tasks for each in task.names)),
        "train_images": [len(task.train) for task in tasks],
        "test_images": [len(task.test) for task in tasks],
        "split": split,
        # Once each, for every language shows the same images.
        "skipped": list(dict.fromkeys(where for data in sets for where in getattr(data, "skipped", ()))),
    }
    return Stream(name, scenario, tuple(tasks), notes | more)


def digest(parts: Iterable[object]) -> str:
    """sha256 of the texts of `parts`."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
