"""What a run retains of data that it is never taught: whatever its objective can measure on it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from perdure.core.learner import Core
from perdure.evaluation.answer_retention import AnswerRetention
from perdure.evaluation.zero_shot_retention import Retention
from perdure.types import Row, Stream


@runtime_checkable
class Shows(Protocol):
    """Data that knows which images it shows."""

    def identities(self) -> set[str]:
        """What tells them apart."""


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


def remarks(held_out: HeldOut, stream: Stream) -> list[str]:
    """What a reader of the numbers must know of each set, above all how much of it `stream` teaches.

    Images are told apart as their streams do, by path or content: one that was copied is not recognised.
    """
    taught = {each for task in stream if isinstance(task.train, Shows) for each in task.train.identities()}
    said = []
    for name, held in held_out.sets.items():
        said += [f"{name}: {remark}" for remark in held.notes.get("remarks", ())]
        shown = {each for task in held if isinstance(task.test, Shows) for each in task.test.identities()}
        if both := shown & taught:
            said.append(
                f"{name}: {len(both)} of its {len(shown)} images are taught by the stream: they are not held out"
            )
    return said
