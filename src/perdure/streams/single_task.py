"""One more task for a learner whose stream has no end: from a folder, or from images given in Python."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from perdure.backbones.preprocess import Preprocess
from perdure.streams.folders import Asking, labelled, parts, told_left_out
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.naming import class_name, in_case_only, natural, recorded
from perdure.streams.sources import Files, Picture, listed
from perdure.streams.splits import held_out
from perdure.types import Data, Nothing, Task

_ENOUGH = 5
_SHARE = 0.15


def folder_task(
    path: str | Path,
    preprocess: Preprocess,
    known: Mapping[str, int],
    index: int,
    skip_bad: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    asking: Asking | None = "learn",
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
        tell: is told what is left out, and which classes have nearly the same name.
        asking: see `perdure.streams.folders.labelled`.

    Raises:
        ValueError: when the folder is not as expected, or a class has no train image.
    """
    folder, test_folder, left_out = parts(Path(path))
    read = labelled(folder, asking=asking)
    left_out.update(read.left_out)
    names = recorded(natural({name for name, _, _ in read.rows}), known)
    title = class_name(Path(path).name or Path(path).resolve().name or "folder", "folder")
    ids = _numbered(names, known)
    train = _set(folder, read.rows, ids, preprocess)
    _all_present(str(path), names, ids, train)
    test: ImageSet | Nothing = Nothing()
    if test_folder is not None:
        tested = labelled(test_folder, asking=asking)
        left_out.update(tested.left_out)
        if strange := sorted(set(recorded({name for name, _, file in tested.rows if file}, ids)) - set(names)):
            raise ValueError(f"{path}: class {strange[0]!r} is in test but not in train; add train images or remove it")
        test = _set(test_folder, tested.rows, ids, preprocess)
    for line in (*([told_left_out(left_out)] if left_out else []), *in_case_only(names, known)):
        tell(line)
    if skip_bad:
        train = train.readable()
        _all_present(str(path), names, ids, train)
        test = test.readable() if isinstance(test, ImageSet) else test
    if test_folder is None:
        train, test = _hold_out(train, seed)
    return Task(index, title, tuple(ids[n] for n in names), tuple(names), None, train, test)


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


def _numbered(names: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    following = max(known.values(), default=-1) + 1
    new = [name for name in names if name not in known]
    return {**{n: known[n] for n in names if n in known}, **{n: following + i for i, n in enumerate(new)}}


def _set(root: Path, rows: Sequence[tuple[str, str, str]], ids: Mapping[str, int], preprocess: Preprocess) -> ImageSet:
    real = [(name, file) for name, _, file in rows if file]
    labels = torch.tensor([ids[name] for name in recorded([name for name, _ in real], ids)], dtype=torch.int64)
    return ImageSet(Files(root, [file for _, file in real]), torch.arange(len(real)), labels, preprocess, Budget())


def _all_present(path: str, names: Sequence[str], ids: Mapping[str, int], train: Data) -> None:
    present = set(train.labels.tolist())
    if empty := [name for name in names if ids[name] not in present]:
        raise ValueError(f"{path}: class {empty[0]!r} has no readable train image; add some or remove the folder")


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
