"""The classifier of an export: how scores are made of features, in words, in Python and as tensors."""

from typing import Any

from perdure.core.learner import Core
from perdure.core.method import parts_of, predicts
from perdure.core.objective import Head


def head_of(learner: Core) -> Head:
    """How the learner answers, when features and a few tensors can.

    Raises:
        ValueError: when they cannot.
    """
    head: Head = answering(learner).head(learner)
    return head


def answering(learner: Core) -> Any:
    """Who says how scores are made: the part that predicts, or else the objective.

    Raises:
        ValueError: when it does so in a way of its own that no head can hold.
    """
    part = next((part for part in parts_of(learner.method) if predicts(part)), None)
    who, hook = (learner.objective, "scores") if part is None else (part, "predict")
    if _defining(who, hook) is not _defining(who, "head"):
        raise ValueError(f"{who.name} predicts in a way that a plain head cannot; keep this learner with save")
    return who


def _defining(who: Any, name: str) -> type:
    """The class that `who` has it from."""
    return next(each for each in type(who).__mro__ if name in vars(each))
