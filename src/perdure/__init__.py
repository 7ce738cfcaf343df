"""Teach pre-trained vision and vision-language models one task after another, without forgetting."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from perdure.version import __version__

if TYPE_CHECKING:
    from perdure.adapters.injection import Adapter, attach, detach
    from perdure.adapters.low_rank import LowRank
    from perdure.adapters.state import BufferDict
    from perdure.api.learner import Learner
    from perdure.backbones.base import Backbone
    from perdure.cli.console import Screen
    from perdure.core.learner import Core
    from perdure.core.method import METHODS, Method
    from perdure.core.objective import Objective
    from perdure.mechanisms.moments import second_moments
    from perdure.mechanisms.replay import ReplayBuffer
    from perdure.mechanisms.subspace import Subspace
    from perdure.reporting.report import write_report
    from perdure.training.config import RunConfig
    from perdure.training.loop import TrainConfig
    from perdure.types import Batch, Data, Row, Site, Stream, Task

__all__ = [
    "METHODS",
    "Adapter",
    "Backbone",
    "Batch",
    "BufferDict",
    "Core",
    "Data",
    "Learner",
    "LowRank",
    "Method",
    "Objective",
    "ReplayBuffer",
    "Row",
    "RunConfig",
    "Screen",
    "Site",
    "Stream",
    "Subspace",
    "Task",
    "TrainConfig",
    "__version__",
    "attach",
    "detach",
    "second_moments",
    "write_report",
]

_PLACES = {
    "Adapter": "perdure.adapters.injection",
    "Backbone": "perdure.backbones.base",
    "Batch": "perdure.types",
    "Core": "perdure.core.learner",
    "Data": "perdure.types",
    "ReplayBuffer": "perdure.mechanisms.replay",
    "Learner": "perdure.api.learner",
    "LowRank": "perdure.adapters.low_rank",
    "METHODS": "perdure.core.method",
    "Method": "perdure.core.method",
    "Objective": "perdure.core.objective",
    "Row": "perdure.types",
    "RunConfig": "perdure.training.config",
    "Screen": "perdure.cli.console",
    "Site": "perdure.types",
    "Stream": "perdure.types",
    "Subspace": "perdure.mechanisms.subspace",
    "Task": "perdure.types",
    "BufferDict": "perdure.adapters.state",
    "TrainConfig": "perdure.training.loop",
    "attach": "perdure.adapters.injection",
    "detach": "perdure.adapters.injection",
    "second_moments": "perdure.mechanisms.moments",
    "write_report": "perdure.reporting.report",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: what computes nothing does not wait for torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
