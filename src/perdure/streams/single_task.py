"""One more task for a learner whose stream has no end: from a folder or a file, or from what is given in Python."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from perdure.backbones.preprocess import Preprocess
from perdure.scoring import score_of
from perdure.streams.captions import captioned_data, read_tables
from perdure.streams.conversation_files import FileEntry, Reader, json_lines
from perdure.streams.conversation_rows import Columns, unanswered
from perdure.streams.conversation_stream import read_conversations
from perdure.streams.conversation_tasks import ConversationOptions, arrange_lesson
from perdure.streams.conversations import Conversation, ConversationSet
from perdure.streams.folders import Asker, read_folders, told_left_out
from perdure.streams.image_set import Captioned, ImageSet
from perdure.streams.naming import class_name, in_case_only, natural, recorded
from perdure.streams.sources import Picture, listed, told_shared
from perdure.streams.splits import divide, held_out
from perdure.streams.task_split import LabelledPart, check_classes
from perdure.streams.topics import CaptionedPart
from perdure.types import Nothing, Task

COLUMN = "captions"
_ENOUGH = 5
"""Images of a class, below which all are learnt and none is tested."""
_ENOUGH_CAPTIONED = 10
"""Images with captions, below which all are learnt."""
_SHARE = 0.15


def folder_task(
    path: str | Path,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
    skip_bad: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    asking: Asker | None = "learn",
) -> Task:
    """The task in a folder of class folders, or of `train` and `test` folders with class folders in them.

    A class the learner knows keeps its id, new ones get the next ids in the order of their names. Without a test
    folder, 15 % of the images of each class are held out (at least one) when every class has 5 or more; with fewer
    there are no test images, for each is needed to learn. The same files are held out for the same seed.

    Args:
        path: the folder.
        preprocess: what the backbone wants.
        known: name -> id of the classes learnt so far.
        index: of the task.
        skip_bad: leave unreadable images out and list them as `skipped` of the task's data.
        seed: of what is held out.
        tell: is told what is left out, which classes have nearly the same name, and how many test images are learnt.
        asking: who is told what to write where folders are arranged otherwise; None reads whatever there is.

    Raises:
        ValueError: when the folder is not as expected, or a class has no train image.
    """
    if asking and Path(path).is_file():
        raise ValueError(
            f"path={str(path)!r} is a file; give a folder of class folders, or a new learner: of captions with "
            "objective=retrieve, of questions with backbone=mllm(path=...)"
        )
    found = read_folders(Path(path), asking=asking)
    check_classes(found)
    names = recorded(found.names, known)
    ids = _numbered(names, known)

    def images(part: LabelledPart) -> ImageSet:
        labels = torch.tensor([ids[names[label]] for label in part.labels.tolist()], dtype=torch.int64)
        data = ImageSet(part.source, torch.tensor(part.rows, dtype=torch.int64), labels, preprocess)
        return data.readable() if skip_bad else data

    left_out = found.notes.get("left_out")
    shared = told_shared(found.train.source, found.test.source) if found.test else []
    for line in (*([told_left_out(left_out)] if left_out else []), *in_case_only(names, known), *shared):
        tell(line)
    train = images(found.train)
    present = set(train.labels.tolist())
    if gone := [name for name in names if ids[name] not in present]:
        raise ValueError(f"{path}: class {gone[0]!r} has no readable train image; add some or remove the folder")
    test: ImageSet | Nothing
    train, test = _hold_out(train, seed) if found.test is None else (train, images(found.test))
    title = class_name(Path(path).name or Path(path).resolve().name or "folder", "folder")
    return Task(index, title, tuple(ids[n] for n in names), tuple(names), None, train, test)


def captioned_task(
    path: str | Path,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
    column: str | None = None,
    skip_bad: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task in a parquet or JSONL file of images and captions, or a folder of them; see the stream `captions`.

    All captions of an image are learnt. Without a test part, 20 % of 10 or more images are held out, the same ones each
    time; of fewer there are no test images, for each is needed to learn.

    Args:
        path: file or folder.
        preprocess: what the backbone wants.
        known: name -> id of the topics learnt so far.
        index: of the task.
        column: of the captions; `captions` when None. Images are in the column `image`.
        skip_bad: leave unreadable images out and list them as `skipped` of the task's data.
        tell: is told how many captions an image has twice.

    Raises:
        ValueError: when the file is not as expected.
    """
    place = Path(path).expanduser().resolve()  # as it is found again, wherever from and by whatever link
    try:
        parts = read_tables(place, "image")
    except ValueError as error:
        if place.is_dir() and any(each.is_dir() for each in place.iterdir()):
            raise ValueError(
                f"{error} of captions, as objective=retrieve learns them; class folders are learnt by classify()"
            ) from error
        raise
    found = captioned_data(place.name, parts, (column or COLUMN,), None)
    for line in found.notes.get("remarks", ()):
        tell(line)
    count = len(found.train)
    if found.test is None and count < 2:
        raise ValueError(f"{path} has one image: images are told apart from each other, so give at least two")
    pair = [found.train]
    if found.test is not None or count >= _ENOUGH_CAPTIONED:
        pair = list(divide(found.train, found.test, [0] * count, "the images")[:2])
    sets = [captioned_images(each, preprocess) for each in pair]
    if skip_bad:
        sets = [data.readable() for data in sets]
    if not len(sets[0]):
        raise ValueError(f"{path} has no readable train image: add some")
    return _placed(place.stem if place.is_file() else place.name, sets, known, index)


def conversation_task(
    path: str | Path,
    known: Mapping[str, int],
    index: int,
    images: str | None = None,
    score: str = "",
    skip_bad: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task in a file of conversations, or a folder with `train` and `test`; see the stream `conversations`.

    Without a test part, 20 % of 10 or more images are held out with all that is asked about them, the same ones each
    time; of fewer there are no test images.

    Args:
        path: a JSON, JSONL, parquet or CSV file, or a folder of such files that are one task.
        known: name -> id of the tasks learnt so far.
        index: of the task.
        images: the folder that images' paths are relative to; None: that of each file.
        score: how answers are scored; "" leaves it to the objective.
        skip_bad: leave out what shows images that are missing or unreadable, as `skipped` of the task's data.
        tell: is told which files show no image.

    Raises:
        ValueError: when the file is not as expected, with its line.
    """
    if score:
        score_of(score)
    place = Path(path).expanduser().resolve()
    options = ConversationOptions(skip_bad=skip_bad)
    found = read_conversations(str(place), Columns(), images, score, options)
    for line in found.remarks:
        tell(line)
    train, test = arrange_lesson(found, options, _ENOUGH_CAPTIONED)
    return replace(_placed(found.parts[0].name, [train, *([test] if test else [])], known, index), score=score)


def given_conversations(
    conversations: Sequence[Any], known: Mapping[str, int], index: int, tell: Callable[[str], None] = lambda _: None
) -> Task:
    """The task of conversations given in Python; all of them are learnt, none held out.

    Args:
        conversations: entries as they stand in files, an image as a path or a Pillow image.
        known: name -> id of the tasks learnt so far.
        index: of the task.
        tell: is told where none shows an image, though it has what is not read.

    Raises:
        ValueError: when one is not as expected, with its position.
    """
    entries = [FileEntry(value, f"number {i}", i) for i, value in enumerate(listed(conversations, "conversations"))]
    reader = Reader(Columns())
    records = reader.records_of(entries, "conversations", f"given {index}", Path())
    if not records:
        raise ValueError("conversations are empty: a task needs at least one")
    for line in reader.remarks:
        tell(line)
    return _placed(f"conversations {index + 1}", [ConversationSet(records, reader.pictures)], known, index)


def questions(text: str, name: str) -> list[Conversation]:
    """What is asked in entries as files of conversations hold them, one a line; answers need not stand there.

    Args:
        text: the lines; images' paths are relative to the folder that we are in.
        name: what they stand in, for messages.

    Raises:
        ValueError: when one is not as expected, with its line.
    """
    reader = Reader(Columns())
    records = reader.records_of(json_lines(name, text), name, name, Path(), lambda entry, _: unanswered(entry))
    return list(ConversationSet(records, reader.pictures).__getitems__(range(len(records)))["conversation"])


def given_task(
    images: Sequence[Picture] | Tensor,
    labels: Sequence[str | int] | Tensor,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
) -> Task:
    """The task of images given in Python; all of them are learnt, none held out.

    Args:
        images: Pillow images, paths, uint8 arrays (H, W, 3), or a uint8 tensor (n, 3, H, W).
        labels: a name (or a number, which becomes one) for each image.
        preprocess: what the backbone wants.
        known: name -> id of the classes learnt so far.
        index: of the task.

    Raises:
        ValueError: when an image or label has another form, or their numbers differ.
    """
    if isinstance(labels, Tensor | np.ndarray) and labels.ndim != 1:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected a name or an integer for each image; of one row of "
            "scores an image give labels.argmax(1)"
        )
    found = listed(labels, "labels")
    values: list[Any] = list(found.tolist() if isinstance(found, Tensor | np.ndarray) else found)
    for row, value in enumerate(values):
        fits = isinstance(value, str) or (isinstance(value, SupportsIndex) and np.ndim(value) == 0)  # type: ignore[arg-type]
        if isinstance(value, bool) or not fits or value == "":
            raise ValueError(f"labels, row {row}: got {value!r:.60}, expected a name or an integer")
        if not isinstance(value, str) and value < 0:
            raise ValueError(f"labels, row {row}: {value} stands for no label; leave the image out")
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError("labels mix names and integers; give one kind")
    if not values:
        raise ValueError("labels are empty: a task needs at least one image")
    texts = [class_name(str(value), f"labels, row {row}:") for row, value in enumerate(values)]
    texts = recorded(texts, known)
    names = natural(texts)
    ids = _numbered(names, known)
    train = ImageSet.of(images, [ids[text] for text in texts], preprocess)
    title = f"{index}: {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "")
    return Task(index, title, tuple(ids[n] for n in names), tuple(names), None, train, Nothing())


def given_captions(
    images: Sequence[Picture] | Tensor,
    captions: Sequence[str | Sequence[str]],
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
) -> Task:
    """The task of images and captions given in Python; all of them are learnt, none held out.

    Args:
        images: Pillow images, paths, uint8 arrays (H, W, 3), or a uint8 tensor (n, 3, H, W).
        captions: a text, or several, for each image.
        preprocess: what the backbone wants.
        known: name -> id of the topics learnt so far.
        index: of the task.

    Raises:
        ValueError: when an image or caption has another form, or their numbers differ.
    """
    if isinstance(captions, str):
        raise ValueError(f"captions: got {captions!r:.60}, expected a list with a text, or several, for each image")
    captions, images = listed(captions, "captions"), listed(images, "images")
    if len(captions) != len(images):
        raise ValueError(
            f"captions: got {len(captions)} for {len(images)} images, expected a text, or several, for each"
        )
    texts = [_texts(row, given) for row, given in enumerate(captions)]
    if not texts:
        raise ValueError("captions are empty: a task needs at least one image")
    shown = ImageSet.of(images, [0] * len(texts), preprocess)
    names = [
        str(Path(image).expanduser().resolve()) if isinstance(image, str | Path) else f"given {index} {row}"
        for row, image in enumerate(images)
    ]
    train = Captioned(shown, _identities(names), texts)
    return _placed(f"captions {index + 1}", [train], known, index)


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, with a number where it is taken: "jan (2)"."""
    return next(t for n in range(1, len(taken) + 2) if (t := name if n == 1 else f"{name} ({n})") not in taken)


def _numbered(names: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    following = max(known.values(), default=-1) + 1
    new = [name for name in names if name not in known]
    return {**{n: known[n] for n in names if n in known}, **{n: following + i for i, n in enumerate(new)}}


def _hold_out(data: ImageSet, seed: int) -> tuple[ImageSet, ImageSet | Nothing]:
    labels = data.labels.tolist()
    if min(Counter(labels).values()) < _ENOUGH:
        return data, Nothing()
    keys = [data.source.key(row) for row in data.rows.tolist()]
    held = torch.tensor(held_out(labels, keys, _SHARE, f"held out {seed}"), dtype=torch.int64)
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[held] = False
    test = data.subset(held)
    test.skipped = ()
    return data.subset(kept.nonzero().flatten()), test


def _texts(row: int, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"captions, row {row}: got {given!r:.60}, expected a text, or several")
    return [text.strip() for text in texts]


def _identities(names: Sequence[str]) -> Tensor:
    """Numbers (n,) of images by what they are called: the same image of another task has the same one."""
    return torch.tensor([int.from_bytes(sha256(name.encode()).digest()[:8], "big") >> 1 for name in names])


def captioned_images(part: CaptionedPart, preprocess: Preprocess) -> Captioned:
    """The images of a part with their captions, not decoded yet."""
    rows = torch.tensor(part.rows, dtype=torch.int64)
    images = ImageSet(part.source, rows, torch.zeros_like(rows), preprocess)
    pairs = _identities([part.source.where(row) for row in part.rows])
    return Captioned(images, pairs, [texts for texts, *_ in part.captions])


def _placed(
    name: str, sets: Sequence[Captioned] | Sequence[ConversationSet], known: Mapping[str, int], index: int
) -> Task:
    """A task of one topic, new to the learner: what is learnt and, if there is any, what is tested."""
    topic = max(known.values(), default=-1) + 1
    title = free_name(name, known)
    train, *tested = (data.relabelled(torch.full_like(data.labels, topic)) for data in sets)
    return Task(index, title, (topic,), (title,), None, train, tested[0] if tested else Nothing())
