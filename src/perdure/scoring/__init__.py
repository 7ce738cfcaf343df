"""How answers in words are scored, without a model: short answers, captions, and the public evaluation sets."""

from collections.abc import Iterable, Sequence

from perdure.formatting import meant
from perdure.scoring.answers import ANSWER_SCORES
from perdure.scoring.benchmarks import BENCHMARK_SCORES, NOT_LOCAL, RULES
from perdure.scoring.captions import CAPTION_SCORES
from perdure.scoring.marks import Form, Grade, Mark, Reference, Score
from perdure.scoring.official import EVALUATION_SCORES

_ALL: tuple[Score, ...] = (*ANSWER_SCORES, *CAPTION_SCORES, *RULES, *EVALUATION_SCORES)
SCORES = {score.name: score for score in _ALL}
"""All scores, by the name with which they are chosen."""


def measure(
    answers: Sequence[str], references: Sequence[Reference | str | Sequence[str]], score: str
) -> dict[str, float]:
    """What a set of answers is worth, as numbers by name.

    Args:
        answers: one a reference.
        references: what is right; a text, or several, stand for a question without options.
        score: a name of `SCORES`.

    Returns:
        `strict`, `lenient`, `empty`, `unparsable`, all as `Grade` says; `official` where the authors' tool gives
        another number than `strict`; and the details of an evaluation set, such as `official/perception`.

    Raises:
        ValueError: for an unknown score, and for a reference or a number of answers that it cannot be asked of.
    """
    grade = score_of(score).grade(answers, list(map(_reference, references)))
    official = {} if grade.official is None else {"official": grade.official}
    shares = {"empty": grade.empty, "unparsable": grade.unparsable}
    return {"strict": grade.strict, "lenient": grade.lenient, **official, **shares, **grade.details}


def _reference(given: Reference | str | Sequence[str]) -> Reference:
    if isinstance(given, Reference):
        return given
    return Reference((given,) if isinstance(given, str) else tuple(given))


def score_of(name: str) -> Score:
    """The score of that name.

    Raises:
        ValueError: for an unknown name, and for an official score that cannot be computed here.
    """
    if name in NOT_LOCAL:
        raise ValueError(f"score={name!r} cannot be computed here: {NOT_LOCAL[name]}")
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}{meant(name, SCORES)}; there are: {', '.join(SCORES)}")
    return SCORES[name]


def common_top(names: Iterable[str]) -> float:
    """The highest value of scores that are to be averaged.

    Raises:
        ValueError: when they have different scales, such as accuracy (to 1) and CIDEr (to 10): their mean says nothing.
    """
    tops = {name: score_of(name).top for name in names}
    if len(set(tops.values())) > 1:
        shown = ", ".join(f"{name} (to {top:g})" for name, top in tops.items())
        raise ValueError(f"scores of different scales have no mean: {shown}; compare each with its own start instead")
    return next(iter(tops.values()), 1.0)


__all__ = [
    "BENCHMARK_SCORES",
    "SCORES",
    "Form",
    "Grade",
    "Mark",
    "Reference",
    "Score",
    "common_top",
    "measure",
    "score_of",
]
