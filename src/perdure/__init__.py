"""Teach pre-trained vision and vision-language models one task after another, without forgetting."""

from perdure.adapters.attach import Adapter, attach, detach
from perdure.adapters.lowrank import LowRank
from perdure.backbones.base import Backbone
from perdure.config import RunConfig
from perdure.learner import Core
from perdure.memory.examples import Examples
from perdure.memory.inputs import second_moments
from perdure.memory.subspace import Subspace
from perdure.memory.tensors import Tensors
from perdure.method import METHODS, Method
from perdure.objectives.base import Objective
from perdure.report import write_report
from perdure.teach import Learner
from perdure.train import TrainConfig
from perdure.types import Batch, Data, Row, Site, Stream, Task
from perdure.version import __version__

__all__ = [
    "METHODS",
    "Adapter",
    "Backbone",
    "Batch",
    "Core",
    "Data",
    "Examples",
    "Learner",
    "LowRank",
    "Method",
    "Objective",
    "Row",
    "RunConfig",
    "Site",
    "Stream",
    "Subspace",
    "Task",
    "Tensors",
    "TrainConfig",
    "__version__",
    "attach",
    "detach",
    "second_moments",
    "write_report",
]
