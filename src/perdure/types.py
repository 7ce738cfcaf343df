"""The nouns of continual learning. Plain data; imports nothing of this package.

What needs tensors imports torch when it is called: who only reads what a folder says of its tasks waits for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch = dict[str, Any]
"""One batch by name, with an entry for each example: `image` uint8 (B, 3, S, S), `label` int64 (B,), ...

A value is a tensor, or a list of Python values (a conversation, a picture of any size). `join`, `take` and `to` are the
only places that know it; who asks for a name knows which of the two it stands for, so it is typed no further.
"""


def join(batches: Sequence[Batch]) -> Batch:
    """Batches of the same names as one, in their order."""
    import torch

    first, *_ = batches
    return {
        name: torch.cat([batch[name] for batch in batches])
        if isinstance(value, torch.Tensor)
        else [each for batch in batches for each in batch[name]]
        for name, value in first.items()
    }


def count(batch: Batch) -> int:
    """How many examples a batch has."""
    return len(batch["label"] if "label" in batch else next(iter(batch.values())))


def take(batch: Batch, rows: Tensor | range) -> Batch:
    """The examples at `rows`, int64 (n,) or a range, in that order; of these what else a step has added is left out."""
    import torch

    if isinstance(rows, range):
        here = slice(rows.start, rows.stop)
        return {name: value[here] for name, value in batch.items() if len(value) == count(batch)}
    return {
        name: value[rows.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in rows.tolist()]
        for name, value in batch.items()
    }


def to(batch: Batch, device: torch.device) -> Batch:
    """The same with its tensors on `device`; a list stays what it is."""
    import torch

    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


AnyLearner = Any
"""A `perdure.core.learner.Core`, where it cannot be named: it is made of an objective and a method whose hooks take it,
so the base classes of both stand below it; every objective and every method says `learner: Core` and is checked."""

Scenario = Literal["class", "task", "domain"]
"""What may be answered at test time: every seen class, the task's own, or the same classes in every task."""


class Data(Protocol):
    """A finite set of examples, read in batches."""

    @property
    def labels(self) -> Tensor:
        """Global class ids, int64 (n,); known without reading an image."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The examples at `positions`, collated."""
        ...


class Nothing:
    """The data of a task that is known by its description only, as after loading a learner."""

    @cached_property
    def labels(self) -> Tensor:
        """None, int64 (0,)."""
        import torch

        return torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return 0

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        raise IndexError(f"this task has no data; asked for {list(positions)}")


class Union:
    """Several data sets as one."""

    def __init__(self, sets: Sequence[Data]) -> None:
        import torch

        self.sets = sets
        self.labels: Tensor = torch.cat([s.labels for s in sets])
        self._starts = torch.tensor([0] + [len(s) for s in sets]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Examples at `positions`, in their order."""
        import torch

        wanted = torch.as_tensor(positions)
        owner = torch.bucketize(wanted, self._starts[1:], right=True)
        parts: list[Batch] = []
        places = []
        for index in torch.unique(owner).tolist():
            places.append((owner == index).nonzero().flatten())
            parts.append(self.sets[index].__getitems__((wanted[places[-1]] - self._starts[index]).tolist()))
        return take(join(parts), torch.cat(places).argsort())


class Subset:
    """Some of a data set's examples.

    Args:
        data: the whole.
        positions: of the examples in it, int64 (n,).
    """

    def __init__(self, data: Data, positions: Tensor) -> None:
        self.data, self.positions, self.labels = data, positions, data.labels[positions]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The part's examples at `positions`."""
        import torch

        return self.data.__getitems__(self.positions[torch.as_tensor(positions, dtype=torch.int64)].tolist())


class Told:
    """Data of a task that is known: a batch says its index under "task", int64 (B,)."""

    def __init__(self, data: Data, index: int) -> None:
        self.data, self.index, self.labels = data, index, data.labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The examples at `positions`, and whose they are."""
        import torch

        return self.data.__getitems__(positions) | {"task": torch.full((len(positions),), self.index)}


class Encoded:
    """Data with what was computed of each example once: see `perdure.core.caching`.

    Args:
        kept: name -> (n, ...).
        labels: (n,).
        images: the data, when images are still needed.
    """

    def __init__(self, kept: Batch, labels: Tensor, images: Data | None = None) -> None:
        self.kept, self.labels, self.images = kept, labels, images

    def __deepcopy__(self, memo: dict[int, object]) -> Encoded:
        return self  # it never changes

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, end: int) -> Encoded:
        """The examples from `start` to before `end`, of data without images."""
        return Encoded({name: values[start:end] for name, values in self.kept.items()}, self.labels[start:end])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """What is kept, and labels; images where they are needed."""
        import torch

        batch = take(self.kept | {"label": self.labels}, torch.as_tensor(positions))
        return batch if self.images is None else batch | self.images.__getitems__(positions)


@dataclass(frozen=True)
class Task:
    """One step of a stream: what is learnt, and on which examples."""

    index: int
    name: str
    classes: tuple[int, ...]
    """Global class ids, numbered in the order in which classes arrive."""
    names: tuple[str, ...]
    """Names of `classes`."""
    total: int | None = None
    """How many tasks there will be; None when the end is open."""
    train: Data = field(default_factory=Nothing, compare=False, repr=False)
    test: Data = field(default_factory=Nothing, compare=False, repr=False)
    score: str = ""
    """How answers in words are scored: "exact", "choice", "cider", ...; "" leaves it to the objective."""
    pretext: str = ""
    """What is learnt of images without labels in a step of pre-training, as "masked()"; "" where labels are learnt."""

    @property
    def number(self) -> int:
        """Its place as people count, from 1."""
        return self.index + 1

    def describe(self) -> dict[str, Any]:
        """What `grow` may depend on, as JSON."""
        facts = {k: getattr(self, k) for k in ("index", "name", "classes", "names", "total")}
        return facts | {k: v for k, v in (("score", self.score), ("pretext", self.pretext)) if v}

    @classmethod
    def described(cls, facts: dict[str, Any]) -> Task:
        """A task without data, from what `describe` wrote."""
        told = (facts["index"], facts["name"], tuple(facts["classes"]), tuple(facts["names"]), facts["total"])
        return cls(*told, score=facts.get("score", ""), pretext=facts.get("pretext", ""))


def class_ids(tasks: Iterable[Task]) -> dict[str, int]:
    """Name -> id of all classes of `tasks`."""
    return {name: c for task in tasks for name, c in zip(task.names, task.classes, strict=True)}


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they arrive."""

    name: str
    scenario: Scenario
    tasks: tuple[Task, ...]
    notes: dict[str, Any] = field(default_factory=dict, compare=False)
    """What a run records about the data, as JSON: class order, images per task, the split, skipped images."""

    @property
    def gives(self) -> str:
        """What stands beside its images: `classes`, `captions` or `conversations`; see `Objective.asks`."""
        return next((what for what in ("conversations", "captions") if what in self.notes), "classes")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def candidates(self, task: Task, last: int) -> tuple[int, ...]:
        """Classes that may be answered on `task` once tasks 0..`last` are learnt."""
        if self.scenario == "task":
            return task.classes
        return tuple(sorted({c for t in self.tasks[: last + 1] for c in t.classes}))

    def first_task(self) -> dict[int, int]:
        """Class id -> index of the task in which it first appears."""
        first: dict[int, int] = {}
        for task in self.tasks:
            for c in task.classes:
                first.setdefault(c, task.index)
        return first


@dataclass(frozen=True)
class Site:
    """A place where an adapter can be put: a linear layer, or some output rows of a fused one.

    `input` names what the layer reads: sites with the same `input` (q, k and v of a block) see the same tensor.
    """

    key: str
    layer: str
    input: str
    fan_in: int
    rows: tuple[int, int]

    @property
    def fan_out(self) -> int:
        """Number of output features."""
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True)
class Row:
    """One measurement: the score of `metric` on task `on` after task `after`; `on` is None for the learner itself.

    `after` is -1 for the pre-trained model, before the first task.
    """

    after: int
    on: int | None
    metric: str
    value: float
