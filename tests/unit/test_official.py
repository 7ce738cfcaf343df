"""MME, MME-RealWorld and Video-MME: what the authors' tools read from answers, what we read, and what comes of it."""

import random
from collections.abc import Sequence

import pytest

from perdure.scoring import Grade, Reference, measure, score_of
from perdure.scoring.official import guarded_option, guarded_yes_no, official_letter, official_option, official_yes_no

LONG = "because the dog ran over the street and then it jumped into the lake"
REAL_OPTIONS = (
    "(A) red",
    "(B) blue",
    "(C) two cars",
    "(D) none",
    "(E) The image does not feature the color",
)
REAL = Reference(("B",), REAL_OPTIONS, categories=("Perception", "Monitoring", "vehicle/color"))
VIDEO = Reference(("C",), ("A. Matches.", "B. Candles.", "C. Lamps.", "D. Torches."))


@pytest.mark.parametrize(
    ("answer", "official", "guarded"),
    [
        ("Yes", "yes", "yes"),
        ("Yes, there is.", "yes", "yes"),
        ("The answer is yes", "", "yes"),
        ("  yes", "", "yes"),
        ("y", "", ""),
        ("yes and no", "yes", ""),
        ("None", "no", ""),
        ("Nobody there", "no", ""),
        ("snow", "no", ""),
        ("Not visible", "no", ""),
        ("I know", "", ""),
        ("", "", ""),
        ("\nYes", "yes", "yes"),
    ],
)
def test_mme_reads_yes_and_no(answer: str, official: str, guarded: str) -> None:
    reference = Reference(("Yes",))
    assert (official_yes_no(answer, reference), guarded_yes_no(answer, reference)[0]) == (official, guarded)


@pytest.mark.parametrize(
    ("answer", "official", "guarded"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(C)", "C", "C"),
        ("The best answer is: D", "D", "D"),
        ("Answer: C", "C", "C"),
        ("Best answer: C", "B", "C"),
        ("Definitely C", "D", "C"),
        ("The answer is (B) Candles", "B", "B"),
        ("A dog is shown, so C", "A", "C"),
        (LONG.capitalize(), "B", ""),
        ("c", "", "C"),
        ("None of the above", "", ""),
        ("", "", ""),
    ],
)
def test_video_mme_reads_letters(answer: str, official: str, guarded: str) -> None:
    assert (official_letter(answer, VIDEO), guarded_option(answer, VIDEO)[0]) == (official, guarded)


@pytest.mark.parametrize(
    ("answer", "official", "guarded"),
    [
        ("B", "B", "B"),
        ("(E)", "E", "E"),
        ("Answer: B", "A", "B"),
        ("Best answer: C", "B", "C"),
        ("blue", "B", "B"),
        ("the", "E", ""),
        ("", "A", ""),
        (" ", "A", ""),
        ("It is red", "", "A"),
        (LONG, "", ""),
    ],
)
def test_mme_realworld_reads_letters_and_takes_nothing_for_a(answer: str, official: str, guarded: str) -> None:
    assert (official_option(answer, REAL), guarded_option(answer, REAL)[0]) == (official, guarded)


def test_chinese_options_are_read_with_their_own_brackets() -> None:
    reference = Reference(("B",), ("（A）红色", "（B）蓝色", "（C）两辆车", "（D）无", "（E）图片中没有该颜色"))
    answers = ("（B）", "答案是B。", "蓝色", "最佳答案为：Ｂ")
    assert [guarded_option(answer, reference)[0] for answer in answers] == ["B"] * 4
    assert [official_option(answer, reference) for answer in answers] == ["B", "B", "B", ""]


def _mme(pairs: Sequence[str], subtask: str = "existence") -> tuple[list[Reference], list[str]]:
    """A Yes and a No question of each image; R is answered rightly, W wrongly, O by neither."""
    said = {"R": ("Yes", "No"), "W": ("No", "Yes"), "O": ("maybe", "maybe")}
    references = [
        Reference((truth,), question=f"{i}?", image=f"{i}.png", categories=(subtask,))
        for i, _ in enumerate(pairs)
        for truth in ("Yes", "No")
    ]
    return references, [said[right][at] for pair in pairs for at, right in enumerate(pair)]


@pytest.mark.parametrize(
    ("pairs", "score"),
    [
        (["RR", "RW"], 125),
        (["RR", "RR", "WW"], 100 * 4 / 3),
        (["RW"] * 30, 50),  # always "Yes"
        (["RR"] * 20, 200),
        (["OR"], 50),
    ],
)
def test_mme_adds_accuracy_and_that_of_pairs(pairs: list[str], score: float) -> None:
    references, answers = _mme(pairs)
    order = random.Random(0).sample(range(len(answers)), len(answers))
    for places in (range(len(answers)), order):  # a shuffled file is worth the same
        found = measure([answers[i] for i in places], [references[i] for i in places], "mme")
        for rule in ("official", "guarded"):
            assert found[f"{rule}/existence"] == found[f"{rule}/perception"] == pytest.approx(score)
        assert found["official"] == found["strict"] == found["lenient"] == pytest.approx(score / 200)


def test_mme_sums_perception_and_cognition_and_says_what_is_not_there() -> None:
    parts = [_mme(["RR"], "OCR"), _mme(["RW"], "color"), _mme(["RR", "RW"], "code_reasoning")]
    references, answers = [r for part in parts for r in part[0]], [a for part in parts for a in part[1]]
    grade = score_of("mme").grade(answers, references)
    sums = [
        grade.details[f"guarded/{name}"] for name in ("perception", "cognition", "total", "color/acc", "color/acc+")
    ]
    assert sums == pytest.approx([250, 125, 375, 0.5, 0])
    assert grade.lenient == pytest.approx(375 / 600)
    assert "existence" in grade.remarks[0]
    assert "OCR" not in grade.remarks[0]
    assert grade.details["guarded/says/yes"] == 6 / 8


def test_mme_refuses_an_image_without_two_questions() -> None:
    references, answers = _mme(["RR", "RR"])
    with pytest.raises(ValueError, match=r"2 questions of each image, but '1\.png' of 'existence' has 1"):
        measure(answers[:3], references[:3], "mme")


def test_a_guarded_yes_is_strict_only_without_words_around_it() -> None:
    references = _mme(["RR"])[0]
    found = measure(["The answer is yes", "No."], references, "mme")
    assert [found[name] for name in ("official", "lenient", "strict")] == pytest.approx([50 / 200, 1, 50 / 200])


def _real(rows: Sequence[tuple[str, str, str, str]]) -> Grade:
    references = [
        Reference((truth,), REAL_OPTIONS, categories=(task, subtask, "c")) for task, subtask, truth, _ in rows
    ]
    return score_of("mme_realworld").grade([answer for *_, answer in rows], references)


def test_mme_realworld_weighs_by_questions_and_by_subtasks() -> None:
    grade = _real(
        [
            ("Perception", "Monitoring", "B", "B"),
            ("Perception", "Monitoring", "B", "B"),
            ("Perception", "Monitoring", "B", "E"),
            ("Perception", "Remote Sensing", "A", ""),  # right by the tool
            ("Reasoning", "Monitoring", "A", "A dog"),  # right by the tool
        ]
    )
    expected = {
        "official/overall": 4 / 5,
        "official/Perception": 3 / 4,
        "official/Perception/Monitoring": 2 / 3,
        "official/Perception/Monitoring/c": 2 / 3,
        "official/Perception/avg_c": (2 / 3 + 1) / 2,
        "official/answered": 5,
        "official/says/E": 1 / 5,
        "guarded/overall": 2 / 5,
        "guarded/Perception/avg_c": (2 / 3 + 0) / 2,
        "guarded/Reasoning": 0,
        "guarded/answered": 3,
    }
    assert {name: grade.details[name] for name in expected} == pytest.approx(expected)
    assert (grade.official, grade.lenient, grade.strict, grade.empty, grade.unparsable) == (0.8, 0.4, 0.4, 0.2, 0.2)


def test_what_video_mme_cannot_read_leaves_the_official_denominator_only() -> None:
    rows = [
        ("short", "Law", "A", "A"),
        ("short", "Law", "A", "it is not known"),
        ("short", "Food", "A", "B"),
        ("long", "Food", "A", "…"),
    ]
    references = [
        Reference((truth,), ("A. x", "B. y", "C. z", "D. w"), categories=(duration, "Life Record", sub, "OCR Problems"))
        for duration, sub, truth, _ in rows
    ]
    grade = score_of("video_mme").grade([answer for *_, answer in rows], references)
    expected = {
        "official/overall": 1 / 2,
        "official/short": 1 / 2,
        "official/long": 0,  # nothing was answered
        "official/sub_category/Law": 1,
        "official/short/domain/Life Record": 1 / 2,
        "official/questions": 4,
        "official/answered": 2,
        "guarded/overall": 1 / 4,
        "guarded/short": 1 / 3,
        "guarded/sub_category/Law": 1 / 2,
        "guarded/long/task_type/OCR Problems": 0,
    }
    assert {name: grade.details[name] for name in expected} == pytest.approx(expected)
    assert "medium" in grade.remarks[0]
