"""From images with captions to the tasks of a stream: split, topics, subsample, order."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from perdure.backbones import BACKBONES
from perdure.backbones.preprocess import Preprocess
from perdure.backbones.texts import pack, present
from perdure.options.ranges import Count, Seed, check_fields
from perdure.options.spec import build, parse_one
from perdure.streams.caption_set import Captioned
from perdure.streams.clusters import clusters
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.options import PROGRAM, check_order
from perdure.streams.sources import Source
from perdure.streams.splits import SHARE, digest, first_of_each, held_out, shuffled
from perdure.streams.task_split import ordered
from perdure.types import Scenario, Stream, Task

WORDS = ("clusters", "random", "natural")
"""What `by` may be; anything else is a column."""

_TASKS = 5
_EMBED = "pocket()"


@dataclass(frozen=True)
class CaptionOptions:
    """How images with captions become tasks.

    Args:
        by: what a task is: "clusters" of images that look alike (when None), "random" parts, "natural" parts in the
            order of the rows, or the column whose values are the topics, one task each.
        tasks: number of tasks; 5 when None. A column has its own number.
        embed: the backbone whose features are clustered; `pocket()` when None.
        order: of the topics: None (by the run's seed), "natural", an integer seed, or all names as a list. Captions
            in several languages come in the order written when None.
        per_task: at most so many train images a task. Which ones depends neither on a seed nor on the order; fewer
            are a subset of more.
        test_per_task: the same for test images.
        texts: at most so many captions an image (and language), the first ones.
        skip_bad: leave unreadable images out and list them; otherwise they are an error when they are met.
        measured: nothing is learnt, all images are test images. The program's, not the user's.
    """

    by: str | None = None
    tasks: Count | None = None
    embed: str | None = None
    order: str | Seed | Sequence[str | Seed] | None = None
    per_task: Count | None = None
    test_per_task: Count | None = None
    texts: Count = 5
    skip_bad: bool = False
    measured: bool = field(default=False, metadata=PROGRAM)

    def __post_init__(self) -> None:
        check_fields(self)
        check_order(self.order)
        if self.by not in (None, "clusters"):
            self.without_effect(f"with by={self.by!r}", "embed")

    def without_effect(self, why: str, *names: str) -> None:
        """Raise a ValueError when one of the options `names` is written."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r} has no effect {why}: leave it out")

    @property
    def column(self) -> str | None:
        """The column of the topics, when `by` is one."""
        return None if self.by in (None, *WORDS) else self.by


@dataclass(frozen=True)
class Album:
    """Images with captions, each image once: `rows` of `source`.

    `captions` holds, for each caption column, the captions of every image; `topics` is None without a column for them.
    """

    source: Source
    rows: Sequence[int]
    keys: Sequence[str]
    captions: tuple[Sequence[Sequence[str]], ...]
    topics: Sequence[str | int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Sequence[int]) -> "Album":
        """The images at `positions`."""

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in positions]

        return replace(
            self,
            rows=some(self.rows),
            keys=some(self.keys),
            captions=tuple(some(column) for column in self.captions),
            topics=None if self.topics is None else some(self.topics),
        )


@dataclass(frozen=True)
class Gallery:
    """A data set of images with captions; `test` is None when it has no test part. `columns` names the captions."""

    name: str
    train: Album
    test: Album | None
    columns: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def arrange_captions(found: Gallery, options: CaptionOptions, preprocess: Preprocess, seed: int) -> Stream:
    """The stream of tasks, one topic each; with several caption columns, one language each.

    Args:
        found: the data set.
        options: how its images become tasks.
        preprocess: what the learner's backbone wants.
        seed: the run's; orders the topics, nothing else.

    Raises:
        ValueError: when the data set and the options do not fit together.
    """
    if options.measured and options.column is None:
        # Clusters are those of what is learnt: without it, there are none.
        options = replace(options, by="natural", embed=None, tasks=options.tasks or 1)
    train, test, kind = _split(found, options.measured)
    budget = Budget()
    sides = [_Side("train", train, 0, preprocess, budget), _Side("test", test, len(train), preprocess, budget)]
    split = {"kind": kind} | {f"{side.kind}_sha256": digest(sorted(side.album.keys)) for side in sides}
    languages = len(found.columns) > 1
    names = found.columns if languages else _find_topics(found.name, sides, options)
    if not languages and options.by in (None, "clusters"):
        split["topics_sha256"] = digest(sorted(line for side in sides for line in side.assigned()))
    for side, size in zip(sides, (options.per_task, options.test_per_task), strict=True):
        side.subsample(size)
    order = "natural" if languages and options.order is None else options.order
    lots = [
        _Lot(names[t], t if languages else 0, [side.of(0 if languages else t) for side in sides])
        for t in ordered(names, order, "caption column" if languages else "topic", seed)
    ]
    sets = _captioned(found.name, sides, lots, options)
    tasks = tuple(
        Task(t, lot.name, (t,), (lot.name,), len(lots), *pair)
        for t, (lot, pair) in enumerate(zip(lots, sets, strict=True))
    )
    skipped = [where for side in sides for where in side.skipped]
    notes = {
        "data": found.name,
        "classes": [lot.name for lot in lots],
        "train_images": [len(learnt) for learnt, _ in sets],
        "test_images": [len(tested) for _, tested in sets],
        "captions": {side.kind: [int(present(pair[i].texts).sum()) for pair in sets] for i, side in enumerate(sides)},
        "split": split,
        # Once each, for every language shows the same images.
        "skipped": list(dict.fromkeys(skipped + [where for pair in sets for data in pair for where in data.skipped])),
        **found.notes,
    }
    scenario: Scenario = "domain" if languages else "class"
    return Stream(found.name, scenario, tasks, notes)


class _Side:
    """The train or the test part: its images, with the identity and the topic of each."""

    def __init__(self, kind: str, album: Album, first: int, preprocess: Preprocess, budget: Budget) -> None:
        self.kind = kind
        self.album = album
        self.pairs = first + torch.arange(len(album))
        self.images = _images(album, preprocess, budget)
        self.topics = np.zeros(len(album), dtype=np.int64)
        """-1 for an image that is left out."""
        self.kept: Sequence[int] = range(len(album))
        self.skipped: tuple[str, ...] = ()

    def assigned(self) -> list[str]:
        """Image and topic, as texts."""
        return [f"{key} {topic}" for key, topic in zip(self.album.keys, self.topics.tolist(), strict=True)]

    def subsample(self, size: int | None) -> None:
        """Keep at most `size` images a topic."""
        if size is not None:
            self.kept = first_of_each(self.topics.tolist(), self.album.keys, size, f"{self.kind} images")

    def of(self, topic: int) -> list[int]:
        """Positions of the kept images of a topic."""
        return [i for i in self.kept if self.topics[i] == topic]


@dataclass(frozen=True)
class _Lot:
    """A task to be: its name, which captions it has, and the positions of its images in each part."""

    name: str
    column: int
    positions: list[list[int]]


def _images(album: Album, preprocess: Preprocess, budget: Budget) -> ImageSet:
    rows = torch.tensor(album.rows, dtype=torch.int64)
    return ImageSet(album.source, rows, torch.zeros_like(rows), preprocess, budget)


def _split(found: Gallery, measured: bool) -> tuple[Album, Album, str]:
    if measured:
        return found.train.take([]), found.test or found.train, "all of it is measured"
    if found.test is not None:
        return found.train, found.test, "given"
    groups = found.train.topics or [0] * len(found.train)
    held = held_out(groups, found.train.keys, SHARE, "test part")
    kept = sorted(set(range(len(found.train))) - set(held))
    which = "of each topic" if found.train.topics else "of the images"
    return found.train.take(kept), found.train.take(held), f"{SHARE:.0%} {which} held out"


def _find_topics(name: str, sides: list[_Side], options: CaptionOptions) -> tuple[str, ...]:
    """Give each image its topic; returns their names in natural order."""
    if options.column is not None:
        return _from_column(name, sides, options)
    count = options.tasks or _TASKS
    if options.by in (None, "clusters"):
        _cluster(sides, count, options)
        return tuple(f"cluster {c}" for c in range(count))
    for side in sides:
        keys = side.album.keys
        row = shuffled(keys, "random topics") if options.by == "random" else list(range(len(keys)))
        for topic, part in enumerate(np.array_split(np.array(row, dtype=np.int64), count)):
            side.topics[part] = topic
    return tuple(f"{options.by} {c}" for c in range(count))


def _from_column(name: str, sides: list[_Side], options: CaptionOptions) -> tuple[str, ...]:
    values = [side.album.topics or [] for side in sides]
    known = sorted({v for each in values for v in each}, key=lambda v: (isinstance(v, str), v))
    if len(known) < 2 and not options.measured:
        raise ValueError(f"by={options.by!r}: all images of {name} have one value in it; a stream needs at least 2")
    if options.tasks not in (None, len(known)):
        raise ValueError(
            f"tasks={options.tasks}: by={options.by!r} has one task a value, here {len(known)}; leave it out"
        )
    place = {v: i for i, v in enumerate(known)}
    for side, each in zip(sides, values, strict=True):
        side.topics = np.array([place[v] for v in each], dtype=np.int64)
    return tuple(map(str, known))


def _cluster(sides: list[_Side], count: int, options: CaptionOptions) -> None:
    backbone = build(parse_one(options.embed or _EMBED), BACKBONES, "backbone")
    seen = []
    for side in sides:
        images = side.images
        if images.preprocess != backbone.preprocess:
            # Looked at once: nothing of it has to stay in memory.
            images = _images(side.album, backbone.preprocess, Budget(0))
        seen.append(images.readable() if options.skip_bad else images)
        side.skipped = seen[-1].skipped
    for side, images, nearest in zip(sides, seen, clusters(backbone, seen[0], seen[1], count), strict=True):
        number = dict(zip(images.rows.tolist(), nearest.tolist(), strict=True))
        side.topics = np.array([number.get(row, -1) for row in side.album.rows], dtype=np.int64)


def _captioned(
    name: str, sides: list[_Side], lots: list[_Lot], options: CaptionOptions
) -> list[tuple[Captioned, Captioned]]:
    """The train and the test data of each task."""
    lines = [
        [side.album.captions[lot.column][i][: options.texts] for i in positions]
        for lot in lots
        for side, positions in zip(sides, lot.positions, strict=True)
    ]
    packed = pack([each for part in lines for each in part])
    texts = iter(torch.split(packed, [len(part) for part in lines]))
    shared: dict[str, ImageSet] = {}
    made = []
    for t, lot in enumerate(lots):
        pair = []
        for side, positions in zip(sides, lot.positions, strict=True):
            unlearnt = options.measured and side.kind == "train"
            if not positions and not unlearnt:
                raise ValueError(
                    f"{name}: task {lot.name!r} has no {side.kind} image; use fewer tasks, or by='random' for even ones"
                )
            at = torch.tensor(positions, dtype=torch.int64)
            images = shared.get(side.kind) or side.images.subset(at)
            if len(side.album.captions) > 1 and images.cached:
                # All languages show these images; what the first decodes, the others find.
                shared[side.kind] = images
            data = Captioned.around(images.relabelled(torch.full((len(at),), t)), side.pairs[at], next(texts).clone())
            pair.append(data.readable() if options.skip_bad else data)
        for side, data in zip(sides, pair, strict=True):
            if not len(data) and not (options.measured and side.kind == "train"):
                raise ValueError(f"{name}: task {lot.name!r} has no readable {side.kind} image; add some")
        made.append((pair[0], pair[1]))
    return made
