"""From the conversations of a data set to the tasks of a stream: split, subsample, order."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.options.ranges import Count, Seed, check_fields, without_effect
from perdure.streams.conversations import ConversationSet, Pictures, Record
from perdure.streams.options import check_order
from perdure.streams.splits import SHARE, check_drawn, digest, drawn_anew, first_of_each, held_out
from perdure.streams.task_split import ordered
from perdure.types import Stream, Task

Order = str | Seed | Sequence[str | Seed]


@dataclass(frozen=True)
class ConversationOptions:
    """How conversations become tasks.

    Args:
        only: names of the tasks to keep; all when None.
        order: of the tasks: None (by the run's seed; where they are written in an order, in that), "seed" (by the
            run's), "natural", an integer seed, all names as a list, or a file with a name a line.
        per_task: at most so many train conversations a task. Which ones depends neither on the run's seed nor on the
            order; fewer are a subset of more.
        test_per_task: the same for test conversations.
        draw: a seed of which train conversations `per_task` keeps; None is as 0.
        skip_bad: leave conversations out whose images are missing or unreadable, and list them; otherwise they are an
            error when they are met.
        share_images: allow that the same image is learnt and tested, in different conversations.
    """

    only: Sequence[str] | None = None
    order: Order | None = None
    per_task: Count | None = None
    test_per_task: Count | None = None
    draw: Seed | None = None
    skip_bad: bool = False
    share_images: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_order(self.order)
        if self.per_task is None:
            without_effect("without per_task", draw=self.draw)


@dataclass
class Part:
    """The conversations of one task; `test` is None where the data does not say what is tested."""

    name: str
    train: list[Record]
    test: list[Record] | None = None
    score: str = ""


@dataclass
class Dialogues:
    """A data set of conversations, task by task in their natural order.

    `written`: in an order that means something; `published`: its split is its authors', who may share images.
    """

    name: str
    parts: list[Part]
    pictures: Pictures
    left_out: list[str] = field(default_factory=list)
    written: bool = False
    remarks: list[str] = field(default_factory=list)
    published: bool = False


def arrange_conversations(
    found: Dialogues, options: ConversationOptions, preprocess: Preprocess, seed: int, measured: bool = False
) -> Stream:
    """The stream of tasks.

    Args:
        found: the data set.
        options: how its conversations become tasks.
        preprocess: not looked at: a language model reads images in its own way.
        seed: the run's; orders the tasks, nothing else.
        measured: whether nothing is learnt and everything tested.

    Raises:
        ValueError: when the data set and the options do not fit together.
    """
    kept, share = _chosen(found, options), options.share_images or found.published
    if measured:
        divided = [_Divided([], part.train if part.test is None else part.test) for part in found.parts]
        kept, kind = [i for i in kept if divided[i].tested], "all of it is measured"
    else:
        divided, kind = _split(found.parts, share)
    parts, divided = [found.parts[i] for i in kept], [divided[i] for i in kept]
    remarks = [*found.remarks, *_shared(parts, divided, share)]
    names = [part.name for part in parts]
    order = "natural" if options.order is None and found.written else options.order
    chosen = ordered(names, order, "task", seed)
    sets = []
    for number, i in enumerate(chosen):
        learnt, tested = divided[i]
        make = functools.partial(_set, found, parts[i], number, options, measured)
        sets.append((make(learnt, options.per_task, "train"), make(tested, options.test_per_task, "test")))
    check_drawn(options.draw, sum(len(learnt) for learnt, _ in sets), sum(len(each.learnt) for each in divided))
    tasks = tuple(
        Task(number, names[i], (number,), (names[i],), len(parts), learnt, tested, parts[i].score)
        for number, (i, (learnt, tested)) in enumerate(zip(chosen, sets, strict=True))
    )
    digests = [digest(sorted(f"{names[i]} {each.key}" for i in chosen for each in divided[i][k])) for k in (0, 1)]
    notes: dict[str, Any] = {
        "data": found.name,
        "classes": [names[i] for i in chosen],
        "train_images": [learnt.images() for learnt, _ in sets],
        "test_images": [tested.images() for _, tested in sets],
        "conversations": {"train": [len(learnt) for learnt, _ in sets], "test": [len(tested) for _, tested in sets]},
        "split": {"kind": kind, "train_sha256": digests[0], "test_sha256": digests[1]},
        "skipped": [*found.left_out, *(where for pair in sets for data in pair for where in data.skipped)],
    }
    if remarks:
        notes["remarks"] = remarks
    return Stream(found.name, "class", tasks, notes)


def arrange_lesson(
    found: Dialogues, options: ConversationOptions, least: int
) -> tuple[ConversationSet, ConversationSet | None]:
    """What is learnt and what is tested of a data set of one task, for a learner whose stream has no end.

    Args:
        found: the data set.
        options: of which `skip_bad` is looked at.
        least: of fewer images nothing is held out, for each is needed to learn.

    Raises:
        ValueError: when it has several tasks, or nothing to learn.
    """
    if len(found.parts) > 1:
        names = ", ".join(part.name for part in found.parts[:5])
        raise ValueError(f"{found.name} holds {len(found.parts)} tasks ({names}): teach them one after another")
    (part,) = found.parts
    few = part.test is None and len(set(_groups(part.train, False))) < least
    (divided,) = [_Divided(part.train, [])] if few else _split([part], False)[0]
    _shared([part], [divided], False)
    train = _set(found, part, 0, options, False, divided.learnt, None, "train")
    train.skipped = (*found.left_out, *train.skipped)
    return train, None if few else _set(found, part, 0, options, False, divided.tested, None, "test")


def by_topic(part: Part) -> list[Part]:
    """A task for each topic that the records of a part name, in the order of their names."""
    topics = sorted({each.topic for each in (*part.train, *(part.test or ()))})

    def of(records: list[Record], topic: str) -> list[Record]:
        return [each for each in records if each.topic == topic]

    return [
        Part(topic, of(part.train, topic), None if part.test is None else of(part.test, topic), part.score)
        for topic in topics
    ]


class _Divided(NamedTuple):
    learnt: list[Record]
    tested: list[Record]


def _chosen(found: Dialogues, options: ConversationOptions) -> list[int]:
    """Positions of the tasks to keep."""
    names = [part.name for part in found.parts]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{found.name}: two tasks are called {twice[0]!r}; rename one")
    for name in options.only or ():
        if name not in names:
            raise ValueError(f"only: {found.name} has no task {name!r}{meant(name, names)}; it has: {', '.join(names)}")
    return [i for i, name in enumerate(names) if options.only is None or name in options.only]


def _set(
    found: Dialogues,
    part: Part,
    label: int,
    options: ConversationOptions,
    measured: bool,
    records: list[Record],
    size: int | None,
    which: str,
) -> ConversationSet:
    if size is not None:
        purpose = drawn_anew(f"{which} conversations", None if which == "test" else options.draw)
        kept = first_of_each([0] * len(records), [each.key for each in records], size, purpose)
        records = [records[i] for i in kept]
    data = ConversationSet(records, found.pictures, label, part.score)
    if which == "test":
        data.check_score()
    if options.skip_bad:
        data = data.readable()
    if not len(data) and not (measured and which == "train"):
        remedy = "give a test file, or write share_images=True" if records == [] and part.test is None else "add some"
        raise ValueError(f"{found.name}: task {part.name!r} has no {which} conversation; {remedy}")
    return data


def _split(parts: Sequence[Part], share_images: bool) -> tuple[list[_Divided], str]:
    """What each part learns and tests: as given, else a share of the images, and all that is asked about them."""
    divided = [_Divided(list(part.train), list(part.test or ())) for part in parts]
    whole = [i for i, part in enumerate(parts) if part.test is None]
    if not whole:
        return divided, "given"
    rows = [(i, record) for i in whole for record in parts[i].train]
    groups = _groups([record for _, record in rows], share_images)
    tasks: dict[int, set[int]] = {}
    keys: dict[int, str] = {}
    for (i, record), group in zip(rows, groups, strict=True):
        tasks.setdefault(group, set()).add(i)
        keys[group] = min(keys.get(group, record.key), record.key)
    numbers = list(tasks)
    held = held_out([tuple(sorted(tasks[n])) for n in numbers], [keys[n] for n in numbers], SHARE, "test part")
    tested = {numbers[i] for i in held}
    for i in whole:
        mine = [(record, group in tested) for (task, record), group in zip(rows, groups, strict=True) if task == i]
        divided[i] = _Divided([r for r, test in mine if not test], [r for r, test in mine if test])
    shown = not share_images and any(record.images for _, record in rows)
    kind = f"{SHARE:.0%} of the {'images' if shown else 'conversations'} held out"
    return divided, kind if len(whole) == len(parts) else f"given; where not, {kind}"


def _groups(records: Sequence[Record], apart: bool) -> list[int]:
    """A number for each record, the same where two are of one dialogue, or connected by images unless kept `apart`."""
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str | int, int] = {}
    for i, record in enumerate(records):
        connected: list[str | int] = [record.where, *(() if apart else record.images)]
        for shared in connected:
            a, b = sorted((root(i), root(first.setdefault(shared, i))))
            parent[b] = a
    return [root(i) for i in range(len(records))]


def _shared(parts: Sequence[Part], divided: Sequence[_Divided], allowed: bool) -> list[str]:
    """A remark for each task whose test shows images that are learnt, in it or in another; refused unless allowed."""
    taught = {
        image: part.name for part, (train, _) in zip(parts, divided, strict=True) for r in train for image in r.images
    }
    remarks = []
    for part, (_, test) in zip(parts, divided, strict=True):
        both = [(record, image) for record in test for image in record.images if image in taught]
        if both and not allowed:
            record, image = both[0]
            raise ValueError(
                f"{record.where}: an image of this test conversation is also learnt, in task {taught[image]!r}; remove "
                "it from one of the two, or write share_images=True"
            )
        if both:
            count = len({id(record) for record, _ in both})
            remarks.append(f"task {part.name!r}: {count} of {len(test)} test conversations show images that are learnt")
    return remarks
