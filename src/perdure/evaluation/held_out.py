"""What a run retains of data that it is never taught: whatever its objective can measure on it."""

from collections.abc import Sequence
from typing import Protocol

from perdure.core.learner import Core
from perdure.evaluation.answer_retention import AnswerRetention
from perdure.evaluation.zero_shot_retention import Retention
from perdure.types import Row, Stream


class HeldOut(Protocol):
    """Data that is measured and never taught."""

    sets: dict[str, Stream]
    """By name; none where nothing is held out."""

    def measure(self, learner: Core, after: int) -> list[Row]:
        """Numbers of each set, of which none is about a task; `after` says after which one, -1 before the first."""


def held_out_of(texts: Sequence[str], learner: Core, measured: bool = False) -> HeldOut:
    """What `texts` describe: questions are answered where the learner answers, else zero-shot accuracy is measured.

    Args:
        texts: streams and evaluation sets.
        learner: who is to be measured.
        measured: whether all images of a stream without a test part are; all questions always are.

    Raises:
        ValueError: when something that is described cannot be measured on this learner.
    """
    if "conversations" in learner.objective.asks:
        return AnswerRetention(texts, learner)
    return Retention(texts, learner, measured)
