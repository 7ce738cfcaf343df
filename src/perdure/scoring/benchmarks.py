"""The rules by which CoIN, UCIT and MLLM-CL score answers, as their tools do, and guarded.

Sources: the evaluation scripts of zackschen/CoIN (arXiv 2403.08350), Ghy0501/HiDe-LLaVA (UCIT, arXiv 2503.12941) and
bjzhb666/MLLM-CL (arXiv 2506.05453). `Mark.official` is what they give: an empty answer may be right there, an article
is option A, and a box loses its first and its last digit. `Mark.strict` is the same rule where something could be read
from the answer, else 0; of letters and boxes it is this library's own reading.
"""

import re
from collections.abc import Callable, Sequence

from perdure.scoring.answers import (
    agreement,
    check_box,
    check_choice,
    check_people,
    iou,
    mark_choice,
    mark_exact,
    mark_iou,
    mark_vqa,
    read_box,
)
from perdure.scoring.choices import index_of
from perdure.scoring.marks import Mark, PerAnswer, Reference, has_truth
from perdure.scoring.normalise import vqa_normalise

Rule = Callable[[str, Reference], float]

BENCHMARK_SCORES: dict[str, dict[str, str]] = {
    "coin": {
        "ScienceQA": "coin_scienceqa",
        "TextVQA": "coin_textvqa",
        "ImageNet": "coin_imagenet",
        "GQA": "coin_gqa",
        "VizWiz": "coin_equal",
        "Grounding": "coin_grounding",
        "VQAv2": "coin_equal",
        "OCRVQA": "coin_ocrvqa",
    },
    "ucit": {
        "ImageNet-R": "coin_imagenet",
        "ArxivQA": "coin_equal",
        "VizWiz": "cider",
        "IconQA": "coin_equal",
        "CLEVR": "coin_equal",
        "Flickr30k": "cider",
    },
    "mllm_dcl": {
        "RS": "mllm_cl_words",
        "Med": "mllm_cl_med",
        "AD": "mllm_cl_words",
        "Sci": "mllm_cl_sci",
        "Fin": "mllm_cl_fin",
    },
    "mllm_acl": {"OCR": "mllm_cl_ocr", "Math": "mllm_cl_math", "VP": "mllm_cl_count", "APP": "mllm_cl_app"},
}
"""The score of each task of the public benchmarks; captions by CIDEr alone, see `NOT_LOCAL`."""

NOT_LOCAL = {
    "ucit_captions": "it is the mean of seven scores, one of which (METEOR) needs Java and WordNet: use score='cider'",
    "mllm_cl_math": "a language model behind an interface judges the answers: use score='exact' or leave the task out",
    "mllm_cl_app": "answers are scored on the authors' server: leave the task out",
}
"""Official scores that cannot be computed here, and what to do."""


def _equal(answer: str, reference: Reference) -> float:
    """Upper case, nothing stripped: "A." is not "A"."""
    return float(answer.upper() == reference.answers[0].upper())


def _answered(answer: str) -> bool:
    return "Unanswerable" not in answer


def _equal_answered(answer: str, reference: Reference) -> float:
    return float(_answered(answer) and answer.lower() == reference.answers[0].lower())


def _either_in_other(answer: str, reference: Reference) -> float:
    """In either direction, so that an empty answer is right."""
    truth = reference.answers[0]
    return float(truth in answer or answer in truth)


def _without_stop(answer: str, reference: Reference) -> float:
    return float(answer.rstrip(".").lower() == reference.answers[0])


def _letter(answer: str, reference: Reference) -> float:
    """The first word of one character, in upper case: the article is option A."""
    letters = "ABCDE"
    if answer in letters and len(answer) == 1:
        said = answer
    elif answer[:1] in letters and answer[1:3] == ". ":
        said = answer[:1]
    else:
        found = re.search(r"\b(\w)\b", answer)
        said = found[1].upper() if found else ""
    valid = letters[: len(reference.options)] if reference.options else letters
    return float(
        said != "" and said in valid and letters.index(said) == index_of(reference.answers[0], reference.options)
    )


def _cut_box(answer: str, reference: Reference) -> float:
    """Without its brackets, its first and its last character, so that "1.0, ..." begins with .0."""
    plain = answer.removeprefix(" ").replace("[", "").replace("]", "")[1:-1]
    try:
        left, top, right, bottom = map(float, plain.split(","))
    except ValueError:
        return 0.0
    truth, _ = read_box(reference.answers[0])
    return float(truth is not None and iou((left, top, right, bottom), truth) > 0.5)


def _people(answer: str, reference: Reference) -> float:
    """VQA accuracy with the tokeniser of M4C, which drops commas and question marks and cuts off 's."""

    def form(text: str) -> str:
        return vqa_normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())

    said = form(answer)
    return agreement(sum(form(truth) == said for truth in reference.answers), len(reference.answers))


def _words(answer: str, reference: Reference) -> float:
    """A truth of several words is searched as characters, one of one word beside a blank or before a full stop."""
    said, truth = answer.lower(), reference.answers[0].lower()
    if " " not in truth:
        truth = truth.replace(".", "")
        if " " in said:
            return float(
                _answered(answer) and any(f in said for f in (f" {truth}", f"{truth} ", f"{truth}.", f"{truth},"))
            )
    return float(_answered(answer) and truth in said)


def _substring(answer: str, reference: Reference) -> float:
    return float(_answered(answer) and reference.answers[0].lower() in answer.lower())


def _blankless(answer: str, reference: Reference) -> float:
    return float(_answered(answer) and answer.lower().replace(" ", "").replace(".", "") == reference.answers[0].lower())


def _science(answer: str, reference: Reference) -> float:
    """By the source that the image's file name begins with; of maps, the share of the states that were listed."""
    said, truth = answer.lower(), reference.answers[0].lower()
    if not _answered(answer):
        return 0.0
    if reference.image.split("/")[-1].split("_")[0] in {"AI2D", "TQA", "VQA", "SciVerse"}:
        return float(said == truth)
    if "Which states" in reference.question:
        states, listed = truth.split(","), said.split(",")
        return sum(state in listed for state in states) / len(states)
    return float(truth in said)


def _ocr(answer: str, reference: Reference) -> float:
    formula = reference.kind == "Handwritten Mathematical Expression Recognition"

    def form(text: str) -> str:
        return text.strip().replace(" ", "").replace("\n", "") if formula else text.lower().strip().replace("\n", "")

    return float(any(form(truth) in form(answer) for truth in reference.answers))


def _count(answer: str, reference: Reference) -> float:
    """Without blanks, line breaks and full stops: "1" is in "12"."""

    def form(text: str) -> str:
        return re.sub(r"[ \n.]", "", text.lower().strip())

    return float(form(reference.answers[0]) in form(answer))


def _guarded(name: str, rule: Rule) -> PerAnswer:
    """The rule, where anything could be read; lenient where the truth is in the answer."""

    def mark(answer: str, reference: Reference) -> Mark:
        ours, official = mark_exact(answer, reference), rule(answer, reference)
        strict = official if ours.form == "parsed" else 0.0
        return Mark(strict, max(strict, ours.lenient), ours.form, official)

    return PerAnswer(name, mark, has_truth)


def _beside(
    name: str, rule: Rule, ours: Callable[[str, Reference], Mark], check: Callable[[Reference], None]
) -> PerAnswer:
    """The library's own score, with the rule's value beside it."""

    def mark(answer: str, reference: Reference) -> Mark:
        read = ours(answer, reference)
        return Mark(read.strict, read.lenient, read.form, rule(answer, reference))

    return PerAnswer(name, mark, check)


RULES: Sequence[PerAnswer] = (
    _guarded("coin_equal", _equal),
    _guarded("coin_ocrvqa", _equal_answered),
    _guarded("coin_imagenet", _either_in_other),
    _guarded("coin_gqa", _without_stop),
    _beside("coin_scienceqa", _letter, mark_choice, check_choice),
    _beside("coin_grounding", _cut_box, mark_iou, check_box),
    _beside("coin_textvqa", _people, mark_vqa, check_people),
    _guarded("mllm_cl_words", _words),
    _guarded("mllm_cl_med", _substring),
    _guarded("mllm_cl_fin", _blankless),
    _guarded("mllm_cl_sci", _science),
    _guarded("mllm_cl_ocr", _ocr),
    _guarded("mllm_cl_count", _count),
)
"""The rules that can be computed here."""
