"""Scores of short answers: equality, ten people's answers, multiple choice, containment, edit distance, boxes."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from perdure.scoring.choices import index_of, read_choice
from perdure.scoring.marks import Mark, PerAnswer, Reference, form_of, has_truth
from perdure.scoring.normalise import contains, has_han, normalise, one_form, vqa_normalise

_NUMBER = re.compile(r"[-+]?(?<![A-Za-z\d.])(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")  # not the 1 of x1
_OVERLAP = 0.5
_NEAR = 0.5

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; in whatever unit, the same on both sides."""


def mark_exact(answer: str, reference: Reference) -> Mark:
    """1 for an answer that equals a right one once both are normalised; lenient where it contains one."""
    form = form_of(answer, reference.answers)
    if form != "parsed":
        return Mark(0.0, 0.0, form)
    said, truths = normalise(answer), list(map(normalise, reference.answers))
    return Mark(float(said in truths), float(any(contains(said, truth) for truth in truths)))


def mark_contains(answer: str, reference: Reference) -> Mark:
    """1 for an answer that contains a right one as whole words; it rewards long answers."""
    lenient = mark_exact(answer, reference)
    return Mark(lenient.lenient, lenient.lenient, lenient.form)


def mark_vqa(answer: str, reference: Reference) -> Mark:
    """Mean over people of min(number of the others who said the same / 3, 1); lenient: the best answer contained."""
    form = form_of(answer, reference.answers)
    if form != "parsed":
        return Mark(0.0, 0.0, form)
    said = Counter(map(_vqa_form, reference.answers))
    whole = normalise(answer)
    best = max((agreement(said[t], len(reference.answers)) for t in said if contains(whole, normalise(t))), default=0.0)
    strict = agreement(said[_vqa_form(answer)], len(reference.answers))
    return Mark(strict, max(strict, best))


def agreement(same: int, people: int = 10) -> float:
    """What an answer is worth that `same` of some people gave: mean over the people left out, one after the other.

    0, 1, 2, 3, 4 of ten give 0, 0.3, 0.6, 0.9, 1; the short form min(m/3, 1) is another number.
    """
    return (same * min((same - 1) / 3, 1) + (people - same) * min(same / 3, 1)) / people


def mark_choice(answer: str, reference: Reference) -> Mark:
    """1 for the right letter or option and nothing else; lenient where the answer names it in whatever words."""
    form = form_of(answer, reference.answers)
    found = read_choice(answer, reference.options)
    if found.index is None:
        return Mark(0.0, 0.0, "unparsable" if form == "parsed" else form)
    right = found.index in {index_of(truth, reference.options) for truth in reference.answers}
    return Mark(float(right and found.alone), float(right))


def mark_anls(answer: str, reference: Reference) -> Mark:
    """Normalised Levenshtein similarity to the nearest truth, 0 below one half (Biten et al., ICCV 2019)."""
    form = form_of(answer, reference.answers)
    if form != "parsed":
        return Mark(0.0, 0.0, form)
    strict = max(similarity(answer, truth) for truth in reference.answers)
    return Mark(strict, max(strict, mark_exact(answer, reference).lenient))


def similarity(answer: str, truth: str) -> float:
    """1 - edit distance / longer length, of texts in lower case with single blanks; 0 below one half.

    Those with Chinese characters are brought to the form in which `exact` compares them.
    """
    a, b = map(_near_form, (answer, truth))
    if 2 * abs(len(a) - len(b)) > max(len(a), len(b)):
        return 0.0  # known without counting, which takes long for an answer that does not end
    near = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
    return near if near >= _NEAR else 0.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def mark_iou(answer: str, reference: Reference) -> Mark:
    """1 for a box whose intersection over union with a true one is above one half; lenient: words around the box."""
    box, alone = read_box(answer)
    if box is None:
        return Mark(0.0, 0.0, "unparsable" if answer.strip() else "empty")
    right = any(iou(box, truth) > _OVERLAP for truth, _ in map(read_box, reference.answers) if truth)
    return Mark(float(right and alone), float(right))


def read_box(text: str) -> tuple[Box | None, bool]:
    """Four numbers in a text, and whether there is nothing beside them.

    Where there are more, four in brackets count, the last ones.
    """
    plain = unicodedata.normalize("NFKC", text)
    bracketed = re.findall(r"[\[({<]([^\[\](){}<>]*)[\])}>]", plain)
    for part in (plain, *reversed(bracketed)):
        numbers = [float(number) for number in _NUMBER.findall(part)]
        if len(numbers) == 4:
            left, top, right, bottom = numbers
            return (left, top, right, bottom), part is plain and not any(map(str.isalpha, _NUMBER.sub("", plain)))
    return None, False


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where one has no area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - width * height
    return width * height / union if union > 0 else 0.0


def _near_form(text: str) -> str:
    return normalise(text) if has_han(text) else " ".join(one_form(text).lower().split())


def _vqa_form(text: str) -> str:
    return normalise(text) if has_han(text) else vqa_normalise(text)  # the evaluator knows no Chinese


def check_people(reference: Reference) -> None:
    """Raise a ValueError unless enough people answered; with fewer than four, no answer could reach 1."""
    if len(reference.answers) < 4:
        raise ValueError(
            f"score 'vqa' needs the answers of at least 4 people (VQAv2 has 10), but question "
            f"{reference.question!r} has {len(reference.answers)}: use score='exact'"
        )


def check_choice(reference: Reference) -> None:
    """Raise a ValueError unless the truth is a letter or an option."""
    has_truth(reference)
    for truth in reference.answers:
        index_of(truth, reference.options)


def check_box(reference: Reference) -> None:
    """Raise a ValueError unless the truth is four numbers, as the official rule wants."""
    for truth in reference.answers or ("",):
        if read_box(truth)[0] is None:
            raise ValueError(
                f"the truth {truth!r} is no box; give one such as '[0.1, 0.2, 0.5, 0.6]', or another score"
            )


def check_area(reference: Reference) -> None:
    """Raise a ValueError unless the truth is a box with an area: no answer overlaps another, not even the same."""
    check_box(reference)
    for truth in reference.answers:
        box, _ = read_box(truth)
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"the truth {truth!r} is a box without an area: expected left, top, right, bottom, with left < right "
                "and top < bottom; put them in this order, or leave the question out"
            )


ANSWER_SCORES: Sequence[PerAnswer] = (
    PerAnswer("exact", mark_exact, has_truth),
    PerAnswer("contains", mark_contains, has_truth),
    PerAnswer("vqa", mark_vqa, check_people),
    PerAnswer("choice", mark_choice, check_choice),
    PerAnswer("anls", mark_anls, has_truth),
    PerAnswer("iou", mark_iou, check_area),
)
"""Scores that look at answers one by one."""
