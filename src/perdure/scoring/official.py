"""MME, MME-RealWorld and Video-MME, scored twice: as their authors' tools do with all their quirks, and guarded.

Sources: `tools/eval_tool` of MME (Fu et al., arXiv 2306.13394); `evaluation/eval_your_results.py` of MME-RealWorld
(Zhang et al., ICLR 2025, arXiv 2408.13257) and of Video-MME (Fu et al., CVPR 2025, arXiv 2405.21075) with
thanku-all/parse_answer, which it points to.

Every rule is a reading of an answer: the word or letter that it says, or nothing. `official` readings take "None" for a
no, the article for option A, an empty answer for the first option (MME-RealWorld); in Video-MME what says nothing
leaves the denominator. `guarded` readings take an answer for what it says in whatever words, and what says nothing, or
two things, is wrong. A grade's `official` is the former's score, `lenient` the latter's, and `strict` that of answers
which consist of the word or letter alone, as was asked; all from 0 to 1.

Differs: MME's tool pairs the lines of a file, two by two, so that a shuffled file is scored wrongly without a word.
Here the questions of one image are a pair, wherever they stand.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from perdure.formatting import meant
from perdure.scoring.choices import read_choice
from perdure.scoring.marks import Form, Grade, Mark, Reference, check_all, form_of, share
from perdure.scoring.normalise import normalise

Reading = Callable[[str, Reference], str]
"""What an answer says: "yes" or "no", or a capital letter; "" where it says nothing."""
Table = Callable[[Sequence[Reference], Sequence[str], Sequence[bool]], dict[str, float]]
"""Scores by name, with `overall` among them, of references, what was said, and which of them count."""

_PICTURED = ("posters", "celebrity", "scene", "landmark", "artwork", "OCR")
PERCEPTION = ("existence", "count", "position", "color", *_PICTURED)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""The subtasks of MME's two groups; each gives 200 at most."""

_MME_TOP = 200.0
_LONG = 10
"""Words beyond which an answer without a capital letter is not searched for an option's text."""
# Two commas are missing in the lists of the originals: what stands around them is one text that nobody writes.
_GLUED = ("The best option isThe correct option is", "Best answer:Best option:")
_REAL_WORLD_LEADS = ("The best answer is", "The correct answer is", "The answer is", "The answer", *_GLUED)
_VIDEO_LEADS = (*_REAL_WORLD_LEADS, "Answer:", "Option:", "The correct answer", "The correct option")


def official_yes_no(answer: str, _: Reference) -> str:
    """The first four characters, lower case: "yes" before "no", so that "None" and "snow" are no.

    Line breaks and tabs would end the line or the column in the tool's file; they are blanks.
    """
    start = re.sub(r"[\r\n\t]", " ", answer).lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""


def guarded_yes_no(answer: str, _: Reference) -> tuple[str, bool]:
    """The word yes or the word no, and not both; and whether nothing stands beside it."""
    words = normalise(answer).split()
    said = {"yes", "no"}.intersection(words)
    return (said.pop(), len(words) == 1) if len(said) == 1 else ("", False)


def official_option(answer: str, reference: Reference) -> str:
    """MME-RealWorld: the first capital from A to E, else the first option that contains the answer.

    The empty text is in every option.
    """
    said = _without_leads(answer, _REAL_WORLD_LEADS)
    if found := re.search("[ABCDE]", said):
        return found[0]
    if len(said.split()) > _LONG:
        return ""
    return next((option[1:2] for option in reference.options if said.lower() in option.lower()), "")


def official_letter(answer: str, _: Reference) -> str:
    """Video-MME: the first capital from A to D anywhere."""
    found = re.search("[ABCD]", _without_leads(answer, _VIDEO_LEADS))
    return found[0] if found else ""


def guarded_option(answer: str, reference: Reference) -> tuple[str, bool]:
    """The option that `read_choice` finds, and whether nothing stands beside it."""
    letters = _letters(reference)
    found = read_choice(answer, reference.options, letters)
    return ("", False) if found.index is None else (letters[found.index], found.alone)


@dataclass(frozen=True)
class EvaluationScore:
    """The score of a public evaluation set.

    Args:
        name: as it is chosen.
        categories: what `Reference.categories` must hold, in this order.
        firsts: the values of the first of them.
        official: the reading of the authors' tool.
        guarded: our own, with whether the answer consists of nothing else.
        table: makes scores of what was said.
        drops: whether the official score leaves out what says nothing.
        top: the highest value of the grade's numbers.
    """

    name: str
    categories: tuple[str, ...]
    firsts: tuple[str, ...]
    official: Reading
    guarded: Callable[[str, Reference], tuple[str, bool]]
    table: Table
    drops: bool = False
    top: float = 1.0

    def check(self, reference: Reference) -> None:
        """Raise a ValueError unless the reference is one of this evaluation set."""
        asked = f"score {self.name!r}, question {reference.question!r}"
        known = tuple(_letters(reference)) or ("YES", "NO")
        if len(reference.answers) != 1 or _truth(reference) not in known:
            raise ValueError(f"{asked}: the truth is {reference.answers!r}; expected one of {', '.join(known)}")
        if len(reference.categories) != len(self.categories):
            named = ", ".join(self.categories)
            raise ValueError(f"{asked}: the categories are {reference.categories!r}; expected {named}")
        if (first := reference.categories[0]) not in self.firsts:
            near, there = meant(first, self.firsts), ", ".join(self.firsts)
            raise ValueError(f"{asked}: unknown {self.categories[0]} {first!r}{near}; there are: {there}")

    def grade(self, answers: Sequence[str], references: Sequence[Reference]) -> Grade:
        """Score answers, one a reference."""
        check_all(self, answers, references)
        official = list(map(self.official, answers, references))
        read = list(map(self.guarded, answers, references))
        guarded, strict = [said for said, _ in read], [said if alone else "" for said, alone in read]
        all_count = [True] * len(answers)
        answered = [bool(said) or not self.drops for said in official]
        tables = {
            "official": self.table(references, official, answered) | _said(official),
            "guarded": self.table(references, guarded, all_count) | _said(guarded),
        }
        marks = tuple(
            Mark(_right(r, s), _right(r, g), _form(answer, g), _right(r, o))
            for r, answer, s, g, o in zip(references, answers, strict, guarded, official, strict=True)
        )
        return Grade(
            self.table(references, strict, all_count)["overall"],
            tables["guarded"]["overall"],
            tables["official"]["overall"],
            share(marks, "empty"),
            share(marks, "unparsable"),
            marks,
            self._absent(references),
            {f"{rule}/{name}": value for rule, table in tables.items() for name, value in table.items()},
        )

    def _absent(self, references: Sequence[Reference]) -> tuple[str, ...]:
        here = {reference.categories[0] for reference in references}
        absent = ", ".join(first for first in self.firsts if first not in here)
        return (f"{self.name} without {absent}: all sums and means are of what is there",) if absent else ()


def mme_table(references: Sequence[Reference], said: Sequence[str], _: Sequence[bool]) -> dict[str, float]:
    """100 x (accuracy + share of images with two right answers) of each subtask, 0 to 200, and their sums.

    Raises:
        ValueError: for an image that does not have exactly two questions.
    """
    images: dict[tuple[str, str], list[float]] = defaultdict(list)
    for reference, word in zip(references, said, strict=True):
        images[reference.categories[0], reference.image].append(_right(reference, word))
    pairs: dict[str, list[float]] = defaultdict(list)
    for (subtask, image), right in images.items():
        if len(right) != 2:
            raise ValueError(f"MME asks 2 questions of each image, but {image!r} of {subtask!r} has {len(right)}")
        pairs[subtask].append(sum(right))
    scores: dict[str, float] = {}
    for subtask, right_of in pairs.items():
        accuracy, both = statistics.fmean(right_of) / 2, right_of.count(2) / len(right_of)
        scores |= {subtask: 100 * (accuracy + both), f"{subtask}/acc": accuracy, f"{subtask}/acc+": both}
    sums = {
        name: sum(scores[subtask] for subtask in there)
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
        if (there := pairs.keys() & set(group))
    }
    total = sum(sums.values())
    return {"overall": total / (_MME_TOP * len(pairs)), "total": total, **sums, **scores}


def accuracies(
    cells: Callable[[tuple[str, ...]], Iterable[str]],
    references: Sequence[Reference],
    said: Sequence[str],
    counts: Sequence[bool],
) -> dict[str, float]:
    """Share of right answers of each cell, weighted by questions; 0 where none counts, as the tools print it.

    Args:
        cells: names of the cells in which a question of some categories counts.
        references: the truths.
        said: what was read from the answers.
        counts: which of them count.
    """
    right: dict[str, float] = defaultdict(float)
    counted: Counter[str] = Counter()
    for reference, word, counting in zip(references, said, counts, strict=True):
        for cell in ("overall", *cells(reference.categories)):
            counted[cell] += counting
            right[cell] += counting * _right(reference, word)
    return {cell: right[cell] / max(n, 1) for cell, n in counted.items()}


def real_world_table(references: Sequence[Reference], said: Sequence[str], counts: Sequence[bool]) -> dict[str, float]:
    """Accuracies by task, subtask and category, and of each task the unweighted mean over its subtasks (Avg-C)."""

    def cells(categories: tuple[str, ...]) -> list[str]:
        return ["/".join(categories[:depth]) for depth in (1, 2, 3)]

    scores = accuracies(cells, references, said, counts)
    subtasks: dict[str, set[str]] = defaultdict(set)
    for reference in references:
        subtasks[reference.categories[0]].add("/".join(reference.categories[:2]))
    return scores | {f"{task}/avg_c": statistics.fmean(scores[c] for c in of) for task, of in subtasks.items()}


def video_table(references: Sequence[Reference], said: Sequence[str], counts: Sequence[bool]) -> dict[str, float]:
    """Accuracies by duration, and by domain, sub-category and task type, of each duration and of all."""

    def cells(categories: tuple[str, ...]) -> list[str]:
        duration, *others = categories
        facets = [f"{name}/{value}" for name, value in zip(VIDEO_CATEGORIES[1:], others, strict=True)]
        return [duration, *facets, *(f"{duration}/{facet}" for facet in facets)]

    return accuracies(cells, references, said, counts)


VIDEO_CATEGORIES = ("duration", "domain", "sub_category", "task_type")

EVALUATION_SCORES: Sequence[EvaluationScore] = (
    EvaluationScore("mme", ("subtask",), PERCEPTION + COGNITION, official_yes_no, guarded_yes_no, mme_table),
    EvaluationScore(
        name="mme_realworld",
        categories=("task", "subtask", "category"),
        firsts=("Perception", "Reasoning"),
        official=official_option,
        guarded=guarded_option,
        table=real_world_table,
    ),
    EvaluationScore(
        name="video_mme",
        categories=VIDEO_CATEGORIES,
        firsts=("short", "medium", "long"),
        official=official_letter,
        guarded=guarded_option,
        table=video_table,
        drops=True,
    ),
)
"""Scores of evaluation sets; `perdure.streams.evaluation_sets` reads their questions."""


def _without_leads(answer: str, leads: Iterable[str]) -> str:
    said = answer.strip()
    for lead in leads:
        said = said.replace(lead, "")
    return said


def _letters(reference: Reference) -> str:
    return ascii_uppercase[: len(reference.options)]


def _truth(reference: Reference) -> str:
    return reference.answers[0].strip().upper()


def _right(reference: Reference, said: str) -> float:
    return float(said.upper() == _truth(reference))


def _form(answer: str, said: str) -> Form:
    return "parsed" if said else "empty" if form_of(answer) == "empty" else "unparsable"


def _said(said: Sequence[str]) -> dict[str, float]:
    """How many questions there are and how many were answered, and the share that each answer has of all.

    What is said more and more often, "yes" or E, is the first sign of forgetting.
    """
    shares = {f"says/{word}": n / len(said) for word, n in sorted(Counter(said).items()) if word}
    return {"questions": len(said), "answered": sum(map(bool, said)), **shares}
