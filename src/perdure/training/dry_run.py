"""Foresight: what the descriptions of a stream's tasks rule out is refused before anything is learnt."""

from perdure.adapters.injection import detach
from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.training.config import RunConfig, make_method, make_objective
from perdure.types import Stream, Task


def foresee(config: RunConfig, backbone: Backbone, stream: Stream) -> None:
    """Grow for all tasks of `stream` as training would, by their descriptions alone.

    Args:
        config: of the run.
        backbone: as it was pre-trained, and so it is left.
        stream: its images are not read.

    Raises:
        ValueError: for what a task of `stream` would be refused with when its turn comes.
    """
    objective, method = make_objective(config.objective, config.method), make_method(config.method)
    learner = Core(backbone, objective, method, stream.scenario, config.seed)
    try:
        for task in stream:
            described = Task.described(task.describe())
            learner.grow(described)
            learner.method.check(learner, described)
    finally:
        detach(backbone)
        backbone.requires_grad_(False)
