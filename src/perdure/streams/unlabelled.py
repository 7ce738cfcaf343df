"""Images without labels, for a step of pre-training: of a folder, of a table, or given in Python."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.streams.captions import captioned_data, read_tables
from perdure.streams.folders import pictures, told_left_out
from perdure.streams.image_set import ImageSet
from perdure.streams.naming import class_name, role_of
from perdure.streams.single_task import captioned_images, given_captions
from perdure.streams.sources import Files, listed
from perdure.streams.splits import shuffled
from perdure.types import Task

NO_LABEL = -1
"""Of an image whose class nobody knows, or is to know."""
_OLD = 4
"""New images for each old one: a fifth of what is learnt is old."""


def unlabelled_task(
    path: str | Path,
    preprocess: Preprocess,
    index: int,
    pretext: str,
    captions: str | None = None,
    old: str | Path | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Task:
    """The step of pre-training on the images at `path`; labels that are there are ignored, and so is a `test` folder.

    Args:
        path: a folder of images, in whatever folders below; with `captions` a file of images and captions, or a folder
            of such files.
        preprocess: what the backbone wants.
        index: of the task.
        pretext: what is learnt, see `Task.pretext`.
        captions: column of the captions, where these are learnt.
        old: folder of images of the old domain, of which a quarter as many as there are new ones are mixed in.
        skip_bad: leave unreadable images out and list them as `skipped` of the task's data.
        seed: of which old ones.
        tell: is told what is ignored, and how many old images there are.

    Raises:
        ValueError: when there is no image, or the file is not as expected.
    """
    place = Path(path).expanduser()
    if captions is not None:
        found = captioned_data(place.name, read_tables(place.resolve(), "image"), (captions,), None)
        if found.test is not None:
            tell(f"{path}: its test part is not read")
        data: ImageSet = captioned_images(found.train, preprocess)
    else:
        files = _images_in(place, tell)
        if old is not None:
            known = _images_in(Path(old).expanduser(), lambda _: None)
            count = min(len(known), max(1, len(files) // _OLD))
            files += [known[row] for row in sorted(shuffled(known, f"old {seed}")[:count])]
            tell(f"{count} images of {old} are mixed in, {count / len(files):.0%} of what is learnt")
        rows = torch.arange(len(files))
        data = ImageSet(Files("/", files), rows, torch.zeros_like(rows), preprocess)
    data = _bare(data.readable() if skip_bad else data)
    if not len(data):
        raise ValueError(f"{path} has no readable image: add some")
    return _step(place.resolve().name, data, index, pretext)


def given_unlabelled(
    images: Any, captions: Sequence[str | Sequence[str]] | None, preprocess: Preprocess, index: int, pretext: str
) -> Task:
    """The step of pre-training on images given in Python, with a text, or several, for each where those are learnt."""
    if captions is not None:
        data: ImageSet = given_captions(images, captions, preprocess, {}, index).train  # type: ignore[assignment]
    else:
        images = listed(images, "images") if not isinstance(images, torch.Tensor) else images
        data = ImageSet.of(images, [NO_LABEL] * len(images), preprocess)
    if not len(data):
        raise ValueError("images are empty: pre-training needs at least one")
    return _step("images", _bare(data), index, pretext)


def _images_in(place: Path, tell: Callable[[str], None]) -> list[str]:
    """Absolute paths of the images to learn in a folder and below."""
    if not place.is_dir():
        here = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        what = "is a file" if place.is_file() else f"does not exist{meant(place.name, here)}"
        raise ValueError(f"{place} {what}: give a folder of images; for the pretext contrast() a file with captions")
    left_out: Counter[str] = Counter()
    found = pictures(place, left_out)
    parts = {file.split("/")[0] for file in found if "/" in file}
    if any(role_of(part) == "train" for part in parts):
        found = [file for file in found if role_of(file.split("/")[0]) not in ("test", "val")]
    if not found:
        raise ValueError(f"{place} has no image{f'; {told_left_out(left_out)}' if left_out else ''}; add some")
    if left_out:
        tell(told_left_out(left_out))
    if any("/" in file for file in found):
        tell(f"{place}: names of folders are no labels here, and are ignored")
    return [str(place.absolute() / file) for file in found]


def _bare(data: ImageSet) -> ImageSet:
    return data.relabelled(torch.full((len(data),), NO_LABEL, dtype=torch.int64))


def _step(name: str, data: ImageSet, index: int, pretext: str) -> Task:
    title = f"pre-training {index + 1}: {class_name(name or 'images', 'folder')}"
    return Task(index, title, (), (), None, data, pretext=pretext)
