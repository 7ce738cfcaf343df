"""Foresight: what the descriptions of a stream's tasks rule out is refused before anything is learnt."""

from typing import Protocol, runtime_checkable

from perdure.adapters.attach import detach
from perdure.backbones.base import Backbone
from perdure.config import RunConfig, make_method, make_objective
from perdure.learner import Core
from perdure.method import parts_of
from perdure.types import Stream, Task


@runtime_checkable
class Checked(Protocol):
    """A part of a method that can tell, once all parts have grown for a task, whether it can do anything in it."""

    def check(self, learner: Core, task: Task) -> None:
        """Raise `ValueError` for what cannot be, or would have no effect; depends on descriptions only."""


def foresee(config: RunConfig, backbone: Backbone, stream: Stream) -> None:
    """Grow for all tasks of `stream` as training would, by their descriptions alone.

    Args:
        config: of the run.
        backbone: as it was pre-trained, and so it is left.
        stream: its images are not read.

    Raises:
        ValueError: for what a task of `stream` would be refused with when its turn comes.
    """
    learner = Core(backbone, make_objective(config.objective), make_method(config.method), stream.scenario, config.seed)
    try:
        for task in stream:
            described = Task.described(task.describe())
            learner.grow(described)
            for part in parts_of(learner.method):
                if isinstance(part, Checked):
                    part.check(learner, described)
    finally:
        detach(backbone)
        backbone.requires_grad_(False)
