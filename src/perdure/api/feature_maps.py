"""Test features before and after each task as pictures: t-SNE (van der Maaten and Hinton, JMLR 2008)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.api.folders import tasks_with_data
from perdure.api.learner import Learner
from perdure.api.lesson_source import nothing_learnt
from perdure.core import checkpoint
from perdure.process import as_found, plain
from perdure.reporting.figures import Cloud, clouds, without_glyphs
from perdure.reporting.runs import ignore
from perdure.types import Subset, Task, Union

POINTS = 600
"""Test images in a picture, at most; an old task gives way to none, all have as many."""
_PERPLEXITY = 30
Places = np.ndarray[Any, Any]


@plain()
def draw_features(
    folder: Path, out: Path, note: Callable[[str], None] = ignore, device: str | None = None
) -> list[Path]:
    """Draw a picture a task: test features of the tasks so far as the encoder was before it, and after it.

    The model of every checkpoint is read and shown the test images, which must be at hand. Both halves of a picture are
    maps of their own, of which the second begins where the first ended; so points that keep their features keep their
    place, and distances across a map mean little.

    Args:
        folder: of a run or a taught learner.
        out: a folder for `features-<run>-<task>` as SVG, PDF and PNG; tasks are counted from 1.
        note: is told of tasks without test images, and of letters that no font here has.
        device: to compute on; None is the folder's own.

    Raises:
        ValueError: when scikit-learn or all test images are missing, examples have several rows, or the disk is full.
    """
    if find_spec("sklearn") is None:
        raise ValueError("pictures of features need scikit-learn: pip install 'perdure[figures]'")
    if not (done := checkpoint.whole(folder)):
        raise nothing_learnt(folder)
    learner = Learner.untaught(folder, device)
    if not learner.objective.one_row:
        raise ValueError(f"{folder} learns examples of several rows, which have no features to map: leave it out")
    tasks = tasks_with_data(learner, folder, done, note)
    shown = [_sampled(task, max(1, POINTS // len(tasks))) for task in tasks if len(task.test)]
    if not shown:
        raise ValueError(f"no test image of {folder} is at hand any more: there is nothing to draw")
    if lacking := without_glyphs(name for task in shown for name in task.names):
        note(f"no font here has the letters {lacking}: they are boxes in PNG and PDF, and text in SVG")
    files: list[Path] = []
    before = _features(learner, shown)
    for each in done:
        learner = Learner.untaught(folder, device)
        with as_found(learner.runtime.threads):
            checkpoint.restore(learner, each)
        after = _features(learner, shown)
        if learner.constant_encoder:  # in reduced precision only the untaught one computes in another
            before = after
        index = each.learnt - 1
        if any(task.index == index for task in shown):
            files += _draw(index, shown, before, after, out, f"features-{folder.resolve().name}-{index + 1:02}")
        before = after
    return files


def _sampled(task: Task, most: int) -> Task:
    """`task` with at most `most` of its test images, the same ones every time."""
    order = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(task.index))[:most]
    return replace(task, test=Subset(task.test, order.sort().values))


def _features(learner: Learner, tasks: Sequence[Task]) -> list[Tensor]:
    """Of each task's test images, (n, dim), of unit length."""
    found, _ = learner.features(Union([task.test for task in tasks]))
    return list(torch.split(F.normalize(found.cpu(), dim=1), [len(task.test) for task in tasks]))


def _draw(
    index: int, tasks: Sequence[Task], before: Sequence[Tensor], after: Sequence[Tensor], out: Path, name: str
) -> list[Path]:
    places = [i for i, task in enumerate(tasks) if task.index <= index]
    rows = [torch.cat([each[i] for i in places]).double().numpy() for each in (before, after)]
    if len(rows[0]) < 4:
        return []
    still = before is after
    maps = [_map(rows[0], None)]
    maps += [] if still else [_map(rows[1], maps[0])]
    old = np.concatenate([np.full(len(tasks[i].test), tasks[i].index < index) for i in places])
    labels = np.concatenate([tasks[i].test.labels.numpy() for i in places])
    newest = next(task for task in tasks if task.index == index)
    groups = [Cloud("earlier tasks", old.nonzero()[0])] if old.any() else []
    for label, title in zip(newest.classes, newest.names, strict=True):
        mine = ((labels == label) & ~old).nonzero()[0]
        groups += [Cloud(title, mine)] if len(mine) else []
    titles = ["before and after: no feature moved"] if still else ["before", "after"]
    drawing = clouds(f"Test features before and after task {index + 1}", dict(zip(titles, maps, strict=True)), groups)
    files = [out / f"{name}.{kind}" for kind in ("svg", "pdf", "png")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            drawing.save(file)
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error.strerror}): make room there, or give another --figures"
        ) from error
    return files


def _map(rows: Places, start: Places | None) -> Places:
    """Rows (n, dim) as places (n, 2); `start` is where the points stood before."""
    from sklearn.manifold import TSNE

    if np.ptp(rows, axis=0).max() < 1e-9:  # all in one place
        return np.zeros((len(rows), 2))
    # as scikit-learn does with principal components
    init = "pca" if start is None or not start.std() else (start / start[:, 0].std() * 1e-4).astype(np.float32)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    found: Places = TSNE(2, perplexity=perplexity, init=init, random_state=0).fit_transform(rows)
    return found
