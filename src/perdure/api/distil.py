"""Finished specialists are distilled into one learner of constant size, on the pool's images or on unlabelled ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.api.given import seen_by
from perdure.api.learner import OPEN, Learner
from perdure.api.options import HELD_OUT, OF_STREAMS, check_options
from perdure.api.specialists import Specialists
from perdure.backbones.base import Backbone
from perdure.core.method import parts_of
from perdure.mechanisms.distillation import EXPERTS, EXPERTS_OF
from perdure.mechanisms.replay import ReplayBuffer
from perdure.process import as_found, plain
from perdure.streams import ImageSet
from perdure.training.config import RunConfig
from perdure.training.loop import Progress, fit_task
from perdure.training.summary import facts_of, of_all_tasks
from perdure.types import Batch, Task

_LEAST = 1e-6
"""Share that counts as none: its logarithm is taken."""


class ToldByExperts:
    """Images with labels and what experts say of each; implements `perdure.types.Data`.

    Args:
        images: labelled with columns of the student.
        said: logarithms of shares (n, classes), of each expert over its own classes.
        owners: whose each class is, int64 (classes,).
    """

    def __init__(self, images: ImageSet, said: Tensor, owners: Tensor) -> None:
        self.images, self.said, self.owners, self.labels = images, said, owners, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """`image`, `label`, and what the experts say of each."""
        rows = torch.as_tensor(positions, dtype=torch.int64)
        batch = self.images.__getitems__(positions)
        return batch | {EXPERTS: self.said[rows], EXPERTS_OF: self.owners.expand(len(rows), -1).clone()}


@plain()
def distil(
    team: Specialists,
    method: str = "lora(rank=16)",
    images: Sequence[Path] | None = None,
    backbone: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Learner:
    """One learner of constant size that answers as members of `team` do who learnt classes; it can learn on.

    Args:
        team: with a pool that holds images, unless others are given.
        method: the student's, to which `expert_distillation` is added unless it is there.
        images: files without labels: the member that each is routed to says what it shows. None takes the pool's
            images with their labels.
        backbone: the student's; None is the first member's.
        progress: who is told.
        options: of the student's training, fields of `RunConfig`.

    Raises:
        ValueError: when there is nothing to distil on, or nothing to distil; for a part that would remember images.
    """
    check_options("distil", options, RunConfig, (*OF_STREAMS, *HELD_OUT))
    able = team._some("classes", "distil")
    names = list(team.known)
    owner = {name: place for place, each in reversed(list(enumerate(able))) for name in team.members[each].known}
    first = team.members[able[0]]
    whole = method if "expert_distillation" in method else f"{method} + expert_distillation"
    config = RunConfig(stream=OPEN, backbone=backbone or first.config.backbone, method=whole, **options)
    student = Learner.of(config)
    for part in parts_of(student.method):
        if part.rehearses or any(isinstance(each, ReplayBuffer) for each in part.modules()):
            raise ValueError(
                f"{part.name} would refer to images that nothing keeps once the student is made: leave it out of "
                f"{method!r}"
            )
    if images is None:
        given, truths = _remembered(team, student.backbone)
    else:
        given = ImageSet.queries(list(images), student.backbone.preprocess)
        truths = [line[0][0] for line in team.predict(given, 1)]
    columns = {name: place for place, name in enumerate(names)}
    given = given.relabelled(torch.tensor([columns[name] for name in truths], dtype=torch.int64))
    said = torch.full((len(given), len(names)), _LEAST)
    for place, each in enumerate(able):
        learner = team.members[each]
        for row, line in enumerate(learner.predict(seen_by(given, learner.backbone))):
            for name, share in line:
                if owner[name] == place:
                    said[row, columns[name]] = max(share, _LEAST)
    owners = torch.tensor([owner[name] for name in names])
    task = Task(0, "distilled", tuple(range(len(names))), tuple(names), None, ToldByExperts(given, said.log(), owners))
    train = student.long_enough(student.usual_training(), task, "epochs" in options)
    with student.lessons, as_found(student.runtime.threads):
        student.grow(task)
        student.method.check(student, task)
        known = {name: team.members[name]._taught() for name in able}
        if all(len(known[name]) == team.members[name].learnt for name in able):
            student._hashes = {0: torch.unique(of_all_tasks([*known.values(), {0: given.hashes()}]))}
        student._facts = facts_of(fit_task(student, task, train, progress), 0.0)
    return student


def _remembered(team: Specialists, backbone: Backbone) -> tuple[ImageSet, list[str]]:
    """All images of the pool whose classes members know who are there, with the names of these."""
    images, classes = team.pool.sample(10**9, torch.Generator().manual_seed(0))
    names, known = [name for _, name in team.record["classes"]], set(team.known)
    rows = torch.tensor([row for row, c in enumerate(classes.tolist()) if names[c] in known], dtype=torch.int64)
    if not len(rows):
        raise ValueError("the pool holds no images to distil on: give more --pool-bytes, or --images of your own")
    given = ImageSet.queries(images[rows], backbone.preprocess)
    return given, [names[c] for c in classes[rows].tolist()]
