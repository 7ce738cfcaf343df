"""One more task of images with captions, from a file or a folder, or as they are given in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.backbones.preprocess import Preprocess
from perdure.backbones.texts import pack
from perdure.streams.caption_set import Captioned
from perdure.streams.captions import gallery, read_listings
from perdure.streams.image_set import ImageSet
from perdure.streams.sources import Picture, listed
from perdure.streams.splits import SHARE, held_out
from perdure.streams.topics import Album
from perdure.types import Data, Nothing, Task

COLUMN = "captions"
_ENOUGH = 10


def captioned_task(
    path: str | Path,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
    column: str | None = None,
    skip_bad: bool = False,
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

    Raises:
        ValueError: when the file is not as expected.
    """
    place = Path(path).expanduser().resolve()  # as it is found again, wherever from and by whatever link
    found = gallery(place.name, read_listings(place, "image"), (column or COLUMN,), None)
    albums = [found.train] if found.test is None else [found.train, found.test]
    count = len(found.train)
    if found.test is None and count < 2:
        raise ValueError(f"{path} has one image: images are told apart from each other, so give at least two")
    if found.test is None and count >= _ENOUGH:
        held = held_out([0] * count, found.train.keys, SHARE, "test part")
        albums = [found.train.take(sorted({*range(count)} - {*held})), found.train.take(held)]
    sets = [_captioned(album, preprocess) for album in albums]
    if skip_bad:
        sets = [data.readable() for data in sets]
    if not len(sets[0]):
        raise ValueError(f"{path} has no readable train image: add some")
    return _placed(place.stem if place.is_file() else place.name, sets, known, index)


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
    train = Captioned.around(shown, _identities(names), pack(texts))
    return _placed(f"captions {index + 1}", [train], known, index)


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


def _identities(names: Sequence[str]) -> Tensor:
    """Numbers (n,) of images by what they are called: the same image of another task has the same one."""
    return torch.tensor([int.from_bytes(sha256(name.encode()).digest()[:8], "big") >> 1 for name in names])


def _captioned(album: Album, preprocess: Preprocess) -> Captioned:
    rows = torch.tensor(album.rows, dtype=torch.int64)
    pairs = _identities([album.source.where(row) for row in album.rows])
    return Captioned(album.source, rows, torch.zeros_like(rows), pairs, pack(album.captions[0]), preprocess)


def _placed(name: str, sets: Sequence[Captioned], known: Mapping[str, int], index: int) -> Task:
    """A task of one topic, new to the learner: what is learnt and, if there is any, what is tested."""
    topic = max(known.values(), default=-1) + 1
    title = next(t for n in range(1, len(known) + 2) if (t := name if n == 1 else f"{name} ({n})") not in known)
    train, *tested = (data.relabelled(torch.full_like(data.labels, topic)) for data in sets)
    return Task(index, title, (topic,), (title,), None, train, tested[0] if tested else Nothing())
