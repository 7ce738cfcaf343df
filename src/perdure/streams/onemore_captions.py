"""One more task of images with captions, from a file or a folder, or as they are given in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.images import Preprocess
from perdure.streams.captioned import Captioned
from perdure.streams.captions import captions as captions_stream
from perdure.streams.imageset import ImageSet
from perdure.streams.sources import Picture
from perdure.texts import pack
from perdure.types import Data, Nothing, Task

COLUMN = "captions"
_PER_TASK = 1 << 32


def captioned_task(
    path: str | Path,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
    column: str | None = None,
    skip_bad: bool = False,
) -> Task:
    """The task in a parquet or JSONL file of images and captions, or a folder of them; see the stream `captions`.

    Without a test part, 20 % of the images are held out, the same ones each time.

    Args:
        path: file or folder.
        preprocess: what the backbone wants.
        known: name -> id of the topics learnt so far.
        index: of the task.
        column: of the captions; `captions` when None. Images are in the column `image`.
        skip_bad: leave unreadable images out and list them as `skipped` of the task's data.

    Raises:
        ValueError: when the file is not as expected.
    """
    column = column or COLUMN
    plan = captions_stream(path=str(path), captions=column, by="natural", tasks=1, skip_bad=skip_bad)
    (task,) = plan(preprocess, 0).tasks
    return _placed(Path(path).stem, task.train, task.test, known, index)


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
    if isinstance(captions, str) or len(captions) != len(images):
        count = 1 if isinstance(captions, str) else len(captions)
        raise ValueError(f"captions: got {count} for {len(images)} images, expected a text, or several, for each")
    texts = [_texts(row, given) for row, given in enumerate(captions)]
    if not texts:
        raise ValueError("captions are empty: a task needs at least one image")
    shown = ImageSet.of(images, [0] * len(texts), preprocess)
    train = Captioned.around(shown, torch.arange(len(texts)), pack(texts))
    return _placed(f"captions {index + 1}", train, Nothing(), known, index)


def alike(tasks: Sequence[Task]) -> list[Task]:
    """The same tasks, their packed captions of one shape: batches of different tasks can be joined."""
    sets = [data for task in tasks for data in (task.train, task.test) if isinstance(data, Captioned)]
    most = max((data.texts.shape[1] for data in sets), default=0)
    longest = max((data.texts.shape[2] for data in sets), default=0)

    def wide(data: Data) -> Data:
        return data.moved(0, most, longest) if isinstance(data, Captioned) else data

    return [replace(task, train=wide(task.train), test=wide(task.test)) for task in tasks]


def _texts(row: int, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"captions, row {row}: got {given!r:.60}, expected a text, or several")
    return [text.strip() for text in texts]


def _placed(name: str, train: Data, test: Data, known: Mapping[str, int], index: int) -> Task:
    """A task of one topic, new to the learner, whose images are taken for those of no other task."""
    topic = max(known.values(), default=-1) + 1
    title = next(t for n in range(1, len(known) + 2) if (t := name if n == 1 else f"{name} ({n})") not in known)
    train, test = (
        data.relabelled(torch.full_like(data.labels, topic)).moved(index * _PER_TASK, *data.texts.shape[1:])
        if isinstance(data, Captioned)
        else data
        for data in (train, test)
    )
    return Task(index, title, (topic,), (title,), None, train, test)
