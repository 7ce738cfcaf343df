"""How sure a learner is against how often it is right: images set apart from training, and what they are for."""

import dataclasses
from collections.abc import Sequence

import torch

from perdure.core.learner import Core, derived_seed
from perdure.core.temperature import calibration_error
from perdure.streams import ImageSet
from perdure.types import Row, Stream, Task

ERROR, AFTER = "calibration_error", "calibration_error_calibrated"


def set_apart(
    learner: Core, task: Task, share: float | None = None, option: str = "calibrate"
) -> tuple[Task, ImageSet | None]:
    """`task` as `learner` trains on it, and the images that are set apart: a share of each class, and never all of it.

    Which images it is depends on the seed and the number of the task only, so a run that goes on takes the same. None
    where none are asked for, or the task is known by its description only.

    Args:
        learner: who learns `task`.
        task: with its data.
        share: of the images of each class; None is what the learner sets apart to be calibrated.
        option: what asks for it.

    Raises:
        ValueError: when there are no classes, or none has an image to spare.
    """
    if task.pretext:
        return task, None
    share = learner.calibrate if share is None else share
    asked = f"{option}={share:g}" if option == "calibrate" else option.removesuffix("_share")
    if share and "classes" not in learner.objective.asks:
        raise ValueError(f"{asked} has no effect where no classes are scored: leave it out")
    if not share or not isinstance(task.train, ImageSet):
        return task, None
    generator = torch.Generator().manual_seed(derived_seed(learner.seed, task.index, option))
    labels = task.train.labels
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        mine = (labels == label).nonzero().flatten()
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        taken[mine[torch.randperm(len(mine), generator=generator)[:count]]] = True
    if not taken.any():
        raise ValueError(
            f"task {task.number}: {asked} needs a class of 2 images or more, one of them to train on: leave "
            "it out, or give more images"
        )
    rest, apart = (~taken).nonzero().flatten(), taken.nonzero().flatten()
    return dataclasses.replace(task, train=task.train.subset(rest)), task.train.subset(apart)


def apart(
    learner: Core, stream: Stream, shares: Sequence[float] | None = None, option: str = "calibrate"
) -> tuple[Stream, dict[int, ImageSet]]:
    """`stream` as `learner` trains on it, and what is set apart of each task, by a share each; see `set_apart`."""
    split = [set_apart(learner, task, shares[task.index] if shares else None, option) for task in stream]
    held = {task.index: images for task, images in split if images is not None}
    return (dataclasses.replace(stream, tasks=tuple(task for task, _ in split)) if held else stream), held


def fit(learner: Core, held: ImageSet | None) -> None:
    """Fit the learner's temperature to images that the task just learnt has set apart; nothing for None."""
    if held is None:
        return
    with learner.inference():
        scores = learner.scores_of(held)
    learner.temperature.learn(scores, learner.objective.columns(held.labels.to(scores.device)))


def errors(learner: Core, tasks: Sequence[Task]) -> list[Row]:
    """Calibration error of what `predict` says on all test images, and of what it says calibrated."""
    with learner.inference():
        found = [learner.scores_of(learner.cache.test(task.test)).float() for task in tasks if len(task.test)]
    labels = [task.test.labels for task in tasks if len(task.test)]
    if not labels:
        return []
    scores, target = torch.cat(found).cpu(), learner.objective.columns(torch.cat(labels).cpu())
    wanted = {ERROR: scores}
    if learner.temperature:
        wanted[AFTER] = scores / learner.temperature.value
    return [Row(learner.learnt - 1, None, name, calibration_error(each, target)) for name, each in wanted.items()]
