"""From images with captions to the tasks of a stream: split, topics, subsample, order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones import BACKBONES, Backbone
from perdure.backbones.preprocess import Preprocess
from perdure.options.spec import build, parse_one
from perdure.streams import splits
from perdure.streams.image_set import Budget, Captioned, ImageSet
from perdure.streams.options import CaptionOptions
from perdure.streams.task_split import ordered
from perdure.types import Scenario, Stream, Task

_TASKS = 5
_EMBED = "pocket()"
_BATCH = 128
_RESTARTS = 5
_LLOYD = 100  # passes; tens are enough
_REMEMBERED = 512  # batches, some 60 MB

# Runs of one grid cluster the same images: keyed by the pixels themselves, features cannot be stale.
_known: dict[tuple[str, str], Tensor] = {}

_Points = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class CaptionedPart(splits.ImagePart):
    """Images with captions, each image once.

    `captions` holds, for every image, the captions of each caption column; `topics` is None without a column for them.
    """

    captions: Sequence[Sequence[Sequence[str]]]
    topics: Sequence[str | int] | None = None


@dataclass(frozen=True)
class CaptionedData:
    """A data set of images with captions; `test` is None when it has no test part. `columns` names the captions."""

    name: str
    train: CaptionedPart
    test: CaptionedPart | None
    columns: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def arrange_captions(
    found: CaptionedData, options: CaptionOptions, preprocess: Preprocess, seed: int, measured: bool = False
) -> Stream:
    """The stream of tasks, one topic each; with several caption columns, one language each.

    Args:
        found: the data set.
        options: how its images become tasks.
        preprocess: what the learner's backbone wants.
        seed: the run's; orders the topics, nothing else.
        measured: nothing is learnt, all images are test images.

    Raises:
        ValueError: when the data set and the options do not fit together.
    """
    if measured and options.column is None:
        # Clusters are those of what is learnt: without it, there are none.
        options = replace(options, by="natural", embed=None, tasks=options.tasks or 1)
    topics = found.train.topics
    each = "the images" if topics is None else "each topic"
    train, test, split = splits.divide(found.train, found.test, topics or [0] * len(found.train), each, measured)
    budget = Budget()
    sides = [_Side("train", train, 0, preprocess, budget), _Side("test", test, len(train), preprocess, budget)]
    languages = len(found.columns) > 1
    names = found.columns if languages else _find_topics(found.name, sides, options, measured)
    if not languages and options.by in (None, "clusters"):
        split["topics_sha256"] = splits.digest(sorted(line for side in sides for line in side.assigned()))
    for side, size in zip(sides, (options.per_task, options.test_per_task), strict=True):
        side.subsample(size, None if side.kind == "test" else options.draw)
    if options.draw is not None:
        learnt = sides[0]
        splits.check_drawn(options.draw, len(learnt.kept), len(learnt.part))
        split["drawn_sha256"] = splits.digest(sorted(learnt.part.keys[i] for i in learnt.kept))
    order = "natural" if languages and options.order is None else options.order
    chosen = ordered(names, order, "caption column" if languages else "topic", seed)
    made = _tasks(sides, [(names[t], t if languages else 0, 0 if languages else t) for t in chosen], options)
    remedy = "use fewer tasks, or by='random' for even ones, or add some"
    tasks = splits.all_with_images(found.name, made, remedy, measured)
    scenario: Scenario = "domain" if languages else "class"
    sets = {"train": [task.train for task in tasks], "test": [task.test for task in tasks]}
    captions = {
        which: [sum(map(len, data.texts)) for data in each if isinstance(data, Captioned)]
        for which, each in sets.items()
    }
    stream = splits.noted(found.name, scenario, tasks, split, captions=captions, **found.notes)
    skipped = [where for side in sides for where in side.skipped]
    stream.notes["skipped"] = list(dict.fromkeys(skipped + stream.notes["skipped"]))
    return stream


class _Side:
    """The train or the test part: its images, with the identity and the topic of each."""

    def __init__(self, kind: str, part: CaptionedPart, first: int, preprocess: Preprocess, budget: Budget) -> None:
        self.kind = kind
        self.part = part
        self.pairs = first + torch.arange(len(part))
        self.images = _images(part, preprocess, budget)
        self.topics = np.zeros(len(part), dtype=np.int64)
        """-1 for an image that is left out."""
        self.kept: Sequence[int] = range(len(part))
        self.skipped: tuple[str, ...] = ()

    def assigned(self) -> list[str]:
        """Image and topic, as texts."""
        return [f"{key} {topic}" for key, topic in zip(self.part.keys, self.topics.tolist(), strict=True)]

    def subsample(self, size: int | None, draw: int | None) -> None:
        """Keep at most `size` images a topic; `draw` is a seed of which."""
        if size is not None:
            purpose = splits.drawn_anew(f"{self.kind} images", draw)
            self.kept = splits.first_of_each(self.topics.tolist(), self.part.keys, size, purpose)

    def of(self, topic: int) -> list[int]:
        """Positions of the kept images of a topic."""
        return [i for i in self.kept if self.topics[i] == topic]


def _images(part: CaptionedPart, preprocess: Preprocess, budget: Budget) -> ImageSet:
    rows = torch.tensor(part.rows, dtype=torch.int64)
    return ImageSet(part.source, rows, torch.zeros_like(rows), preprocess, budget)


def _find_topics(name: str, sides: list[_Side], options: CaptionOptions, measured: bool) -> tuple[str, ...]:
    """Give each image its topic; returns their names in natural order."""
    if options.column is not None:
        return _from_column(name, sides, options, measured)
    count = options.tasks or _TASKS
    if options.by in (None, "clusters"):
        _cluster(sides, count, options)
        return tuple(f"cluster {c}" for c in range(count))
    for side in sides:
        keys = side.part.keys
        row = splits.shuffled(keys, "random topics") if options.by == "random" else list(range(len(keys)))
        for topic, part in enumerate(np.array_split(np.array(row, dtype=np.int64), count)):
            side.topics[part] = topic
    return tuple(f"{options.by} {c}" for c in range(count))


def _from_column(name: str, sides: list[_Side], options: CaptionOptions, measured: bool) -> tuple[str, ...]:
    values = [side.part.topics or [] for side in sides]
    known = sorted({v for each in values for v in each}, key=lambda v: (isinstance(v, str), v))
    if len(known) < 2 and not measured:
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
            images = _images(side.part, backbone.preprocess, Budget(0))
        seen.append(images.readable() if options.skip_bad else images)
        side.skipped = seen[-1].skipped
    for side, images, nearest in zip(sides, seen, clusters(backbone, seen[0], seen[1], count), strict=True):
        number = dict(zip(images.rows.tolist(), nearest.tolist(), strict=True))
        side.topics = np.array([number.get(row, -1) for row in side.part.rows], dtype=np.int64)


def _tasks(sides: list[_Side], wanted: Sequence[tuple[str, int, int]], options: CaptionOptions) -> Iterator[Task]:
    """The tasks to be, from the name of each, the number of its caption column and that of its topic."""
    positions = [side.of(topic) for _, _, topic in wanted for side in sides]
    columns = [(side.part.captions, column) for _, column, _ in wanted for side in sides]
    lines = [[of[i][column][: options.texts] for i in at] for (of, column), at in zip(columns, positions, strict=True)]
    parts = iter(zip(positions, lines, strict=True))
    shared: dict[str, ImageSet] = {}
    languages = len({column for _, column, _ in wanted}) > 1
    for t, (name, _, _) in enumerate(wanted):
        pair = []
        for side, (chosen, texts) in zip(sides, parts, strict=False):
            at = torch.tensor(chosen, dtype=torch.int64)
            images = shared.get(side.kind) or side.images.subset(at)
            if languages and images.cached:
                # All languages show these images; what the first decodes, the others find.
                shared[side.kind] = images
            data = Captioned(images.relabelled(torch.full((len(at),), t)), side.pairs[at], texts)
            pair.append(data.readable() if options.skip_bad else data)
        yield Task(t, name, (t,), (name,), len(wanted), pair[0], pair[1])


def clusters(backbone: Backbone, train: ImageSet, test: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Cluster of every train and of every test image, int64 (n,) each: k-means on normalised features.

    The centres are those of the train images alone, found from always the same starting points; a test image belongs
    to the nearest centre. Clusters are numbered by their train images, the largest is 0.

    Args:
        backbone: of the features.
        train: images preprocessed for `backbone`.
        test: the same for the test part.
        count: how many clusters.

    Raises:
        ValueError: when the train images are too few, or too alike, for `count` clusters.
    """
    points, others = _features(backbone, train), _features(backbone, test)
    if (different := len({point.tobytes() for point in points})) < count:
        raise ValueError(f"tasks={count}: the model tells only {different} train images apart; use fewer tasks")
    centres = _centres(points, count)
    nearest = _nearest(points, centres)
    largest = np.argsort(-np.bincount(nearest, minlength=count), kind="stable")
    number = np.argsort(largest)
    return torch.from_numpy(number[nearest]), torch.from_numpy(number[_nearest(others, centres)])


@torch.no_grad()
def _features(backbone: Backbone, data: ImageSet) -> _Points:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    pieces = [torch.zeros(0, backbone.dim, dtype=torch.float32)]
    for first in range(0, len(data), _BATCH):
        batch = data.__getitems__(range(first, min(first + _BATCH, len(data))))
        key = (backbone.spec, sha256(batch["image"].numpy().data).hexdigest())
        if key not in _known:
            if len(_known) >= _REMEMBERED:
                del _known[next(iter(_known))]
            _known[key] = F.normalize(backbone({"image": batch["image"].to(device)}).float(), dim=1).cpu()
        pieces.append(_known[key])
    points: _Points = torch.cat(pieces).double().numpy()
    return points


def _centres(points: _Points, count: int) -> _Points:
    from scipy.cluster.vq import ClusterError, kmeans2  # type: ignore[import-untyped]  # here: slow to import

    best: _Points | None = None
    least = np.inf
    # Twice as often when clusters stay empty: starting points of other seeds do better.
    for seed in range(2 * _RESTARTS):
        if best is not None and seed >= _RESTARTS:
            break
        try:
            centres, nearest = kmeans2(
                points, count, iter=_LLOYD, minit="++", rng=np.random.default_rng(seed), missing="raise"
            )
        except ClusterError:
            continue
        spread = float(((points - centres[nearest]) ** 2).sum())
        if spread < least:
            best, least = centres, spread
    if best is None:
        raise ValueError(f"tasks={count}: the images do not fall into so many clusters; use fewer tasks")
    return best


def _nearest(points: _Points, centres: _Points) -> np.ndarray[Any, np.dtype[np.int64]]:
    # |x - c|² less the |x|² that all centres share
    distances = (centres**2).sum(1) - 2 * points @ centres.T
    nearest: np.ndarray[Any, np.dtype[np.int64]] = distances.argmin(1)
    return nearest
