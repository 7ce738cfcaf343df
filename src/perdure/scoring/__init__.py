"""How answers in words are scored, without a model: short answers, captions, and the public evaluation sets."""

from collections.abc import Iterable

from perdure.formatting import meant
from perdure.scoring.answers import ANSWER_SCORES
from perdure.scoring.captions import CAPTION_SCORES
from perdure.scoring.marks import Form, Grade, Mark, Reference, Score
from perdure.scoring.official import BENCHMARK_SCORES, NOT_LOCAL, OFFICIAL_SCORES

_ALL: tuple[Score, ...] = (*ANSWER_SCORES, *CAPTION_SCORES, *OFFICIAL_SCORES)
SCORES = {score.name: score for score in _ALL}
"""All scores, by the name with which they are chosen."""


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
    "score_of",
]
