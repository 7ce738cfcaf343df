"""What an answer is compared with, what it is worth, and what a set of answers is worth."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Form = Literal["parsed", "empty", "unparsable"]
"""Whether something could be read from an answer; what is empty or unparsable is wrong."""


@dataclass(frozen=True)
class Reference:
    """What a question has as its truth.

    Args:
        answers: right ones; ten people's in VQA, all captions of an image, one letter or option in multiple choice.
        options: texts to choose from, in the order of their letters, with or without these; none where it is open.
        question: as it was asked; some official rules look at it.
        image: name of the image's file; likewise.
        kind: the benchmark's own sort of question; likewise.
        categories: of a question of an evaluation set, in the order that its score names.
    """

    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    question: str = ""
    image: str = ""
    kind: str = ""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """What one answer is worth.

    Args:
        strict: by the score, in the form that was asked for.
        lenient: whether the truth is in the answer, in whatever form; never less than `strict`.
        form: what could be read.
        official: what the authors' tool gives it, with all its quirks; None where `strict` is their rule.
    """

    strict: float
    lenient: float
    form: Form = "parsed"
    official: float | None = None


@dataclass(frozen=True)
class Grade:
    """What a set of answers is worth: means of its marks, or scores of the whole.

    Args:
        strict: the score.
        lenient: the score of what is in the answers, whatever stands around it.
        official: what the authors' tool would print; None where `strict` is that.
        empty: share of answers without a character.
        unparsable: share of answers from which nothing could be read.
        marks: of each answer.
        remarks: what a reader of the numbers must know.
        details: further numbers of an evaluation set, by name.
    """

    strict: float
    lenient: float
    official: float | None
    empty: float
    unparsable: float
    marks: tuple[Mark, ...]
    remarks: tuple[str, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)


class Score(Protocol):
    """How answers are scored."""

    @property
    def name(self) -> str:
        """As it is chosen."""

    @property
    def top(self) -> float:
        """The highest possible value: 1, or 10 of CIDEr."""

    def check(self, reference: Reference) -> None:
        """Raise a ValueError unless the score can be asked of this truth."""

    def grade(self, answers: Sequence[str], references: Sequence[Reference]) -> Grade:
        """Score answers, one a reference."""


@dataclass(frozen=True)
class PerAnswer:
    """A score whose value is the mean over answers that are looked at one by one."""

    name: str
    mark: Callable[[str, Reference], Mark]
    check: Callable[[Reference], None]
    top: float = 1.0

    def grade(self, answers: Sequence[str], references: Sequence[Reference]) -> Grade:
        """Score answers, one a reference."""
        check_all(self, answers, references)
        return mean(tuple(map(self.mark, answers, references)))


def check_all(score: Score, answers: Sequence[str], references: Sequence[Reference]) -> None:
    """Raise a ValueError unless there is an answer to each of some references, which the score can be asked of."""
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"score {score.name!r} got {len(answers)} answers to {len(references)} questions; give one each"
        )
    for reference in references:
        score.check(reference)


def mean(marks: tuple[Mark, ...]) -> Grade:
    """The grade that consists of the means of marks."""
    official = [mark.official for mark in marks if mark.official is not None]
    return Grade(
        statistics.fmean(mark.strict for mark in marks),
        statistics.fmean(mark.lenient for mark in marks),
        statistics.fmean(official) if official else None,
        share(marks, "empty"),
        share(marks, "unparsable"),
        marks,
    )


def share(marks: Sequence[Mark], form: Form) -> float:
    """Share of answers of a form."""
    return sum(mark.form == form for mark in marks) / len(marks)


def form_of(answer: str, truths: Sequence[str] = ()) -> Form:
    """Whether there is anything in an answer in words; a truth of signs only may be answered by signs only."""
    if not answer.strip():
        return "empty"
    wordless = not any(letter.isalnum() for letter in answer)
    return "unparsable" if wordless and answer.strip() not in truths else "parsed"


def has_truth(reference: Reference) -> None:
    """Raise a ValueError where there is no truth to compare with."""
    if not any(answer.strip() for answer in reference.answers):
        raise ValueError(f"question {reference.question!r} has no right answer; give one, or leave the question out")
