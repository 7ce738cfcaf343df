"""Teach pre-trained vision and vision-language models one task after another, without forgetting."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from perdure.version import __version__

if TYPE_CHECKING:
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

_PLACES = {
    "Adapter": "perdure.adapters.attach",
    "Backbone": "perdure.backbones.base",
    "Batch": "perdure.types",
    "Core": "perdure.learner",
    "Data": "perdure.types",
    "Examples": "perdure.memory.examples",
    "Learner": "perdure.teach",
    "LowRank": "perdure.adapters.lowrank",
    "METHODS": "perdure.method",
    "Method": "perdure.method",
    "Objective": "perdure.objectives.base",
    "Row": "perdure.types",
    "RunConfig": "perdure.config",
    "Site": "perdure.types",
    "Stream": "perdure.types",
    "Subspace": "perdure.memory.subspace",
    "Task": "perdure.types",
    "Tensors": "perdure.memory.tensors",
    "TrainConfig": "perdure.train",
    "attach": "perdure.adapters.attach",
    "detach": "perdure.adapters.attach",
    "second_moments": "perdure.memory.inputs",
    "write_report": "perdure.report",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: what computes nothing does not wait for torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
