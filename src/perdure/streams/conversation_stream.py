"""Streams of conversations from files and folders, from streams of images, and several of them in turn."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.options.ranges import checked
from perdure.options.spec import Spec, build, parse_one
from perdure.scoring import score_of
from perdure.streams.conversation_files import ENDINGS, Reader
from perdure.streams.conversation_rows import Columns
from perdure.streams.conversation_tasks import (
    ConversationOptions,
    Dialogues,
    Order,
    Part,
    arrange_conversations,
    by_topic,
)
from perdure.streams.conversations import ConversationSet, Pictures, Record
from perdure.streams.image_set import Budget, Captioned, ImageSet
from perdure.streams.naming import Role, role_of, told_role
from perdure.streams.options import REGISTRY, StreamPlan, check_order, stream
from perdure.streams.sources import Source
from perdure.streams.task_split import ordered
from perdure.types import Stream, Task


@stream(arrange_conversations)
def conversations(
    options: ConversationOptions,
    path: str | Sequence[str],
    images: str | None = None,
    score: str = "",
    by: str | None = None,
    image: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    suffix: str | None = None,
    every_turn: bool = False,
) -> Callable[[bool], Dialogues]:
    """Questions and answers about images, captions, instructions: JSON, JSONL, parquet or CSV files, one task each.

    An entry is a conversation in LLaVA's form (`image`, `conversations` of `from` and `value`), one of messages
    (`messages` of `role` and `content`), or a question (`image`, `question`, `answer`, perhaps `options`). It may show
    several images, or none. `x.train.json` and `x.test.json` are one task, as are `x/train.json` and `x/test.json`, or
    `train/x.json` and `test/x.json`. Of a task without a test part, 20 % of the images are held out with all that is
    asked about them; which ones never depends on the seed.

    Args:
        options: the common ones of conversations.
        path: a file, a folder of files or of folders of files, or a list of these, which then is the order of tasks.
        images: the folder that images' paths are relative to; None: that of each file.
        score: how answers are scored, by a name of `perdure.scoring`; "" leaves it to the objective.
        by: a column whose values are the tasks, of what is in one file or folder.
        image: column of the image, or of a list of images; `image` or `images` when None.
        question: column of the question; `question`, `text` or `prompt` when None.
        answer: column of the answer, or of a list of right ones; `answer` or `answers` when None.
        suffix: a line under each question, such as "Answer the question using a single word or phrase.".
        every_turn: learn and test each answer of a conversation, with what was said before it; else the last one.

    Raises:
        ValueError: when a file or folder is not as expected, with the file and the line.
    """
    _check_score(score)
    columns = Columns(image, question, answer, by, suffix, every_turn)
    return lambda measured: read_conversations(path, columns, images, score, options, measured)


@checked
def as_questions(*stream: Spec | str | StreamPlan, question: str = "", score: str = "exact") -> StreamPlan:
    """Any stream of labelled images as questions: `as_questions(cifar100(tasks=5), question="What is this?")`.

    The answer is the name of the image's class, with blanks for underscores. Tasks, split and classes stay as they are.

    Args:
        stream: the stream of images; in Python the question may follow it.
        question: what is asked about each image.
        score: how answers are scored, by a name of `perdure.scoring`.

    Raises:
        ValueError: when there is no question, not one stream, or one of something else than labelled images.
    """
    match stream:
        case (first, str(asked)) if not question:
            stream, question = (first,), asked
    if len(stream) != 1:
        raise ValueError(f"as_questions of {len(stream)} streams: expected one, such as as_questions(cifar100(), ...)")
    if not question.strip():
        raise ValueError(f"question={question!r}: expected a text, such as 'What is in the picture?'")
    _check_score(score)
    made = _plan_of(stream[0])

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        images = made(preprocess, seed, measured)
        names = {c: name for task in images for c, name in zip(task.classes, task.names, strict=True)}
        pictures = Pictures()

        def asked(data: Any) -> ConversationSet:
            if not isinstance(data, ImageSet) or isinstance(data, Captioned):
                raise ValueError(f"as_questions: {images.name} is no stream of labelled images; give one of these")
            return _asked(data, question.strip(), names, pictures, score)

        tasks = [replace(t, train=asked(t.train), test=asked(t.test), score=score) for t in images]
        for task in tasks:
            if isinstance(task.test, ConversationSet):
                task.test.check_score()
        notes = {**images.notes, "question": question.strip(), "conversations": _counts(tasks)}
        return replace(images, tasks=tuple(tasks), notes=notes)

    return plan


def _check_score(score: str) -> None:
    if score:
        score_of(score)


def _asked(data: ImageSet, question: str, names: Mapping[int, str], pictures: Pictures, score: str) -> ConversationSet:
    records = []
    for row, label in zip(data.rows.tolist(), data.labels.tolist(), strict=True):
        where, key = data.source.where(row), data.source.key(row)
        number = pictures.number(data.source.identity(row) or where, functools.partial(_place, data.source, row), key)
        answer = names[label].replace("_", " ")
        records.append(Record((("user", (None, question)),), (number,), (answer,), where, key))
    asked = ConversationSet(records, pictures, score=score).relabelled(data.labels)
    asked.skipped = data.skipped
    return asked


def _place(source: Source, row: int) -> tuple[Source, int]:
    return source, row


@checked
def in_turn(*streams: Spec | str | StreamPlan, order: Order | None = None) -> StreamPlan:
    """All tasks of several streams of conversations, one stream after another.

    Args:
        streams: `conversations`, `as_questions` and the like.
        order: of all tasks together: as they come when None, by the run's seed with "seed", else as of `conversations`.

    Raises:
        ValueError: when one of the streams has no conversations, or there are less than two.
    """
    if len(streams) < 2:
        raise ValueError(f"in_turn of {len(streams)} streams: expected at least 2")
    check_order(order)
    plans = [_plan_of(each) for each in streams]

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        return _joined([each(preprocess, seed, measured) for each in plans], order, seed)

    return plan


def _joined(parts: Sequence[Stream], order: Order | None, seed: int) -> Stream:
    tasks = [(part, task) for part in parts for task in part]
    plain = [task.name for _, task in tasks]
    names = [
        name if plain.count(name) == 1 else f"{part.name}: {name}" for (part, _), name in zip(tasks, plain, strict=True)
    ]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"in_turn: two tasks are called {twice[0]!r}; leave one of them out")
    budget = Budget()
    made: list[Task] = []
    first = 0
    for number, i in enumerate(ordered(names, "natural" if order is None else order, "task", seed)):
        part, task = tasks[i]
        new = {old: first + place for place, old in enumerate(task.classes)}
        train, test = (_renumbered(part.name, data, new, budget) for data in (task.train, task.test))
        made.append(Task(number, names[i], tuple(new.values()), task.names, len(tasks), train, test, task.score))
        first += len(new)
    notes = {
        "data": " + ".join(part.name for part in parts),
        "classes": [name for task in made for name in task.names],
        "conversations": _counts(made),
        "split": {"kind": "; ".join(dict.fromkeys(part.notes["split"]["kind"] for part in parts))},
        "skipped": [where for part in parts for where in part.notes["skipped"]],
        "data_sets": [part.notes for part in parts],
    }
    remarks = [line for part in parts for line in part.notes.get("remarks", ())]
    learnt, tested = (torch.cat([getattr(task, side).pairs for task in made]) for side in ("train", "test"))
    if count := int(torch.isin(tested, learnt).sum()):
        remarks.append(f"{count} of {len(tested)} test conversations show images that are learnt, in some task")
    if remarks:
        notes["remarks"] = remarks
    return Stream("in_turn", "class", tuple(made), notes)


def _counts(tasks: Sequence[Task]) -> dict[str, list[int]]:
    return {"train": [len(task.train) for task in tasks], "test": [len(task.test) for task in tasks]}


def _renumbered(name: str, data: Any, new: Mapping[int, int], budget: Budget) -> ConversationSet:
    if not isinstance(data, ConversationSet):
        raise ValueError(f"in_turn: {name} has no conversations; write as_questions({name}(...), question=...)")
    data.pictures.budget = budget  # one of its own each would be several times the memory
    return data.relabelled(torch.tensor([new[label] for label in data.labels.tolist()], dtype=torch.int64))


def _plan_of(stream: Spec | str | StreamPlan) -> StreamPlan:
    if not isinstance(stream, Spec | str):
        return stream
    plan: StreamPlan = build(parse_one(stream) if isinstance(stream, str) else stream, REGISTRY, "stream")
    return plan


def read_conversations(
    path: str | Sequence[str],
    columns: Columns,
    images: str | None,
    score: str,
    options: ConversationOptions,
    measured: bool = False,
) -> Dialogues:
    """The data set at a path or at several; options as of `conversations`, `measured` as of `find`."""
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ValueError("path=(): expected a file or a folder, or several")
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"images={images!r} is no folder; give the one that images' paths are relative to")
    places = [place for each in paths for place in find(Path(each), measured)]
    if columns.by is not None and len(places) > 1:
        names = ", ".join(place.name for place in places[:5])
        raise ValueError(f"by={columns.by!r}: the files are {len(places)} tasks already ({names}); give path= of one")
    reader = Reader(columns, None if images is None else Path(images), options.skip_bad)

    def read(files: Sequence[Path]) -> list[Record]:
        return [record for file in files for record in reader.read(file)]

    parts = [Part(each.name, read(each.train), read(each.test) if each.test else None, score) for each in places]
    reader.check_named()
    if columns.by is not None:
        parts = by_topic(parts[0])
    name = Path(paths[0]).resolve().stem if len(paths) == 1 else "conversations"
    return Dialogues(name, parts, reader.pictures, reader.left_out, len(paths) > 1, reader.remarks)


def holds_conversations(path: Path) -> bool:
    """Whether `path` is a file whose first entry is a conversation, or a question."""
    if not path.is_file() or path.suffix not in ENDINGS:
        return False
    try:
        first = next(Reader(Columns()).entries(path)).value
    except (ValueError, StopIteration):
        return False
    return isinstance(first, Mapping) and not {"conversations", "messages", "question"}.isdisjoint(first)


@dataclass
class Place:
    """The files of one task."""

    name: str
    train: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)


def find(path: Path, measured: bool = False) -> list[Place]:
    """The tasks in a file or a folder, in the order of their names.

    Args:
        path: the file or folder.
        measured: whether the data is only measured: then a test part may stand alone.

    Raises:
        ValueError: when there is nothing, or when it may mean several things.
    """
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ValueError(f"path={str(path)!r}: expected a file that ends with {', '.join(ENDINGS)}, or a folder")
        name, role = told_role(path.stem)
        return [Place(name or (path.resolve().parent.name if role else path.stem), [path])]
    if not path.is_dir():
        near = meant(path.name, [each.name for each in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ValueError(f"path={str(path)!r} does not exist{near}; give a file or a folder of files")
    files, folders = _files(path), [each for each in sorted(path.iterdir()) if each.is_dir() and _holds(each)]
    if files and folders:
        raise ValueError(
            f"path={str(path)!r} holds {files[0].name!r} beside the folder {folders[0].name!r} with such files; give "
            "path= of one of them, or a list of those that are tasks"
        )
    if files:
        return _together(path, [(file, *told_role(file.stem)) for file in files], measured)
    if any(role_of(each.name) for each in folders):
        listed = [(file, told_role(file.stem)[0], role_of(each.name)) for each in folders for file in _files(each)]
        return _together(path, listed, measured)
    places = [place for folder in folders for place in find(folder, measured)]
    if not places:
        raise ValueError(f"path={str(path)!r} holds no file that ends with {', '.join(ENDINGS)}; give another folder")
    return places


def _together(path: Path, files: Sequence[tuple[Path, str, Role | None]], measured: bool) -> list[Place]:
    """The tasks that files belong to, by the task and the role that their names say."""
    roles = [role for _, _, role in files]
    lone = sorted(filter(None, roles)) in (["test", "train"], ["train", "val"], ["test", "train", "val"])
    if lone and None not in roles:  # train_4w.json and test_3000.json: names that say more than what they are for
        files = [(file, "", role) for file, _, role in files]
    places: dict[str, Place] = {}
    tests: dict[str, dict[str, list[Path]]] = {}
    for file, name, role in files:
        place = places.setdefault(name, Place(name or path.resolve().name))
        if role in (None, "train"):
            place.train.append(file)
        else:
            tests.setdefault(name, {}).setdefault(str(role), []).append(file)
    for name, held in tests.items():
        places[name].test = held.get("test") or held["val"]
        if not places[name].train:
            if not measured:
                file = places[name].test[0]
                raise ValueError(f"{file} is a test file, and there is none to learn beside it; add it, or rename this")
            places[name].train, places[name].test = places[name].test, []
    return [places[name] for name in sorted(places)]


def _files(folder: Path) -> list[Path]:
    return [
        each for each in sorted(folder.iterdir()) if each.is_file() and each.suffix in ENDINGS and each.name[0] != "."
    ]


def _holds(folder: Path) -> bool:
    """Whether there are files of conversations in a folder, or in the folders in it."""
    if folder.name.startswith("."):
        return False
    return bool(_files(folder)) or any(each.is_dir() and _files(each) for each in folder.iterdir())
