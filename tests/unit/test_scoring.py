"""Scores of answers and captions against the evaluators' figures and hand calculation."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perdure.scoring import SCORES, Reference, common_top, measure, score_of
from perdure.scoring.answers import agreement
from perdure.scoring.captions import words
from perdure.scoring.choices import read_choice
from perdure.scoring.normalise import normalise, vqa_normalise

TOY = [
    (["a dog runs on grass", "the dog is running"], "a dog runs on grass"),
    (["a red bus on the street", "a bus drives by"], "a red car on the street"),
    (["two cats sleep on a sofa", "cats sleeping"], "two dogs"),
]
COLOURS = Reference(("B",), ("(A) red", "(B) blue", "(C) two cars"))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The dog.", "dog"),
        ("a", "a"),  # an article alone is an answer: the letter, or the word
        ("None", "0"),
        ("Three apples", "3 apples"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("-3", "minus 3"),
        ("“red”", "red"),
        ("**Yes**", "yes"),
        ("ＲＥＤ　ｃａｒ！", "red car"),
        ("三十五只。", "35只"),
        ("二〇二四年", "2024年"),
        ("一亿二千万", "120000000"),
        ("１,２００ 个", "1200个"),
        ("温度是-3度", "温度是负3度"),
        ("3-5度", "3 5度"),
        ("3.5 千克", "3.5千克"),
        ("“红色”，对吗？", "红色对吗"),
    ],
)
def test_answers_are_compared_in_one_form(text: str, form: str) -> None:
    assert normalise(text) == form
    assert normalise(form) == form, "the form of a form is itself"


def test_the_vqa_evaluator_keeps_its_oddities() -> None:
    assert vqa_normalise("don't - stop") == "don't stop"  # a hyphen beside a blank is deleted
    assert vqa_normalise("black-white") == "black white"
    assert vqa_normalise("1,000 a-b") == "1000 ab"  # everywhere, where digits are grouped
    assert vqa_normalise("3. 5.") == "3 5"
    assert vqa_normalise("." * 40) == "." * 8  # a flag passed as a count
    assert vqa_normalise("-3") == "3"


@pytest.mark.parametrize(("same", "worth"), list(enumerate([0, 0.3, 0.6, 0.9, *[1] * 7])))
def test_an_answer_of_ten_people_is_worth_what_the_others_say(same: int, worth: float) -> None:
    assert agreement(same) == pytest.approx(worth)
    people = ["two"] * same + [f"other {i}" for i in range(10 - same)]
    assert measure(["2."], [people], "vqa")["strict"] == pytest.approx(worth)


@pytest.mark.parametrize(
    ("score", "answer", "truth", "strict", "lenient"),
    [
        ("exact", "The red.", "red", 1, 1),
        ("exact", "It is red", "red", 0, 1),
        ("exact", "hundred", "red", 0, 0),
        ("exact", "颜色是hundred", "red", 0, 0),
        ("exact", "颜色是red。", "red", 0, 1),
        ("exact", "有十三只", "3", 0, 0),
        ("exact", "有三只", "3", 0, 1),
        ("exact", "是-3度", "3", 0, 0),
        ("exact", "3.5米", "3", 0, 0),
        ("exact", "３", "三", 1, 1),
        ("exact", "blue", ["red", "Blue"], 1, 1),
        ("contains", "a red car", "red", 1, 1),
        ("anls", "12 May", "12 may", 1, 1),
        ("anls", "13 may", "12 may", 5 / 6, 5 / 6),
        ("anls", "xyz", "abc", 0, 0),
        ("anls", "三", "3", 1, 1),
        ("anls", "“出口”。", "出口", 1, 1),
        ("anls", "北京路", "北京街", 2 / 3, 2 / 3),
        ("anls", "the date is 12 may", "12 may", 0, 1),
        ("iou", "[0.1, 0.1, 0.5, 0.5]", "[0.1,0.1,0.5,0.5]", 1, 1),
        ("iou", "The box is [0.1, 0.1, 0.5, 0.5].", "[0.1,0.1,0.5,0.5]", 0, 1),
        ("iou", "[0.1, 0.1, 0.5, 0.3]", "[0.1,0.1,0.5,0.5]", 0, 0),  # exactly one half
        ("iou", "[0.5, 0.5, 0.1, 0.1]", "[0.1,0.1,0.5,0.5]", 0, 0),  # corners exchanged
        ("vqa", "I see a dog", ["dog"] * 10, 0, 1),
    ],
)
def test_an_answer_gets_a_strict_and_a_lenient_mark(
    score: str, answer: str, truth: str | list[str], strict: float, lenient: float
) -> None:
    found = measure([answer], [truth], score)
    assert (found["strict"], found["lenient"]) == pytest.approx((strict, lenient))


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("B", 1, 1),
        ("(b).", 1, 1),
        ("（Ｂ）蓝", 0, 1),
        ("blue", 1, 1),
        ("B. blue", 1, 1),
        ("The answer is (B), as a car shows", 0, 1),
        ("答案是B", 0, 1),
        ("it is blue", 0, 1),
        ("A", 0, 0),
        ("A blue car", 0, 1),  # the article is no option
        ("A or B", 0, 0),
        ("red or blue", 0, 0),
        ("I see nothing", 0, 0),
    ],
)
def test_a_choice_is_read_from_what_was_said(answer: str, strict: float, lenient: float) -> None:
    found = measure([answer], [COLOURS], "choice")
    assert (found["strict"], found["lenient"]) == (strict, lenient)


@pytest.mark.parametrize("score", sorted(SCORES))
def test_what_is_empty_or_unparsable_is_wrong_and_counted(score: str) -> None:
    references = _any_references(score)
    found = measure(["", " \n", "…", "?!"], references, score)
    assert (found["strict"], found["lenient"]) == pytest.approx((0, 0), abs=1e-5)
    assert (found["empty"], found["unparsable"]) == (0.5, 0.5)


@given(st.lists(st.text() | st.sampled_from(["B", "red", "三百", "[1,2,3,4]", "-", "yes"]), min_size=2, max_size=2))
@example(["万亿", "百零"])
@example(["一" + "亿" * 999, "Answer" + "." * 999])
def test_no_text_breaks_a_score_or_makes_the_strict_mark_the_better_one(answers: list[str]) -> None:
    for score in SCORES:
        found = measure(answers, _any_references(score)[:2], score)
        assert all(math.isfinite(value) for value in found.values()), score
        assert 0 <= found["strict"] <= found["lenient"] + 1e-12 <= SCORES[score].top + 1e-9, score


def test_caption_scores_equal_those_of_pycocoevalcap() -> None:
    references, captions = [each for each, _ in TOY], [caption for _, caption in TOY]
    cider = score_of("cider").grade(captions, [Reference(tuple(each)) for each in references])
    assert cider.strict == pytest.approx(2.5566, abs=5e-5)
    assert [mark.strict for mark in cider.marks] == pytest.approx([5.4019, 1.9139, 0.3539], abs=5e-5)
    bleu = [measure(captions, references, name)["strict"] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu")]
    assert bleu == pytest.approx([0.8462, 0.7696, 0.6969, 0.6066], abs=5e-5)
    rouge = score_of("rouge").grade(captions, [Reference(tuple(each)) for each in references])
    assert rouge.strict == pytest.approx(0.6876, abs=5e-5)
    assert [mark.strict for mark in rouge.marks] == pytest.approx([1.0, 0.8333, 0.2293], abs=5e-5)


def test_the_lenient_caption_score_is_that_of_the_best_sentence() -> None:
    found = measure([f"Sure! {caption}. I hope that helps." for _, caption in TOY], [each for each, _ in TOY], "cider")
    assert found["lenient"] == pytest.approx(2.5566, abs=5e-5)
    assert found["strict"] < 1.2


def test_cider_of_one_image_is_said_to_mean_nothing() -> None:
    grade = score_of("cider").grade(["a dog"], [Reference(("a dog",))])
    assert grade.strict == 0
    assert "one image" in grade.remarks[0]


def test_chinese_captions_are_scored_by_character() -> None:
    assert words("一只狗，在 grass 上。") == ("一", "只", "狗", "在", "grass", "上")
    marked = [
        "「一只」狗～在〈grass〉上",
        "『一只』狗、在ＧＲＡＳＳ上！",
        "一只狗（在 grass 上）",
        "一_只狗／在grass﹏上",
    ]
    for each in marked:
        assert words(each) == words("一只狗在grass上")
    assert words("３．５米，cat，dog’s t-shirt") == ("3.5", "米", "cat", "dog", "'s", "t-shirt")
    assert words("「A dog」~ ３") == ("「", "a", "dog", "」", "~", "３")  # English as the reference has it
    assert measure(["一只黑狗"], [["一只狗"]], "bleu_1")["strict"] == pytest.approx(3 / 4)
    # Longest common subsequence 3: precision 3/4, recall 1, beta 1.2.
    assert measure(["一只黑狗"], [["一只狗"]], "rouge")["strict"] == pytest.approx(2.44 * 0.75 / (1 + 1.44 * 0.75))


@pytest.mark.parametrize(
    ("score", "answer", "reference", "official", "strict"),
    [
        ("coin_equal", "A.", Reference(("A",)), 0, 0),
        ("coin_imagenet", "", Reference(("dog",)), 1, 0),
        ("coin_imagenet", "do", Reference(("dog",)), 1, 1),
        ("coin_scienceqa", "a dog", Reference(("A",), ("x", "y")), 1, 0),
        ("coin_grounding", "[1.0, 0.1, 1.5, 0.5]", Reference(("[1.0,0.1,1.5,0.5]",)), 0, 1),
        ("mllm_cl_words", "none", Reference(("no",)), 1, 1),
        ("mllm_cl_words", "there is none", Reference(("no",)), 1, 1),
        ("mllm_cl_words", "there isno way", Reference(("no",)), 1, 1),
        ("mllm_cl_fin", " Ri.se", Reference(("rise",)), 1, 1),
        ("mllm_cl_count", "12", Reference(("1",)), 1, 1),
        ("mllm_cl_med", "Unanswerable: liver", Reference(("liver",)), 0, 0),
        ("mllm_cl_sci", "texas,ohio", Reference(("ohio,utah",), question="Which states are red?"), 0.5, 0.5),
    ],
)
def test_rules_of_the_benchmarks_keep_their_oddities(
    score: str, answer: str, reference: Reference, official: float, strict: float
) -> None:
    found = measure([answer], [reference], score)
    assert (found["official"], found["strict"]) == (official, strict)


@pytest.mark.parametrize(
    ("score", "references", "said"),
    [
        ("cidre", ["a"], "unknown score 'cidre'; did you mean 'cider'?"),
        ("mllm_cl_app", ["a"], "cannot be computed here: answers are scored on the authors' server"),
        ("exact", [""], "has no right answer"),
        ("exact", ["a", "b"], "got 1 answers to 2 questions"),
        ("vqa", ["a"], "at least 4 people"),
        ("choice", [Reference(("F",), ("(A) red",))], "the right answer 'F' of a multiple-choice question"),
        ("iou", ["left"], "the truth 'left' is no box"),
        ("mme", ["Maybe"], "the truth is ('Maybe',); expected one of YES, NO"),
        ("mme", ["Yes"], "the categories are (); expected subtask"),
        ("mme", [Reference(("Yes",), categories=("colour",))], "unknown subtask 'colour'; did you mean 'color'?"),
    ],
)
def test_a_score_that_cannot_be_asked_is_refused_in_one_line(
    score: str, references: list[Reference | str], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(said)}[^\n]*$"):
        measure(["x"], references, score)


def test_scores_of_different_scales_have_no_mean() -> None:
    assert common_top(["exact", "choice"]) == 1
    with pytest.raises(ValueError, match=r"exact \(to 1\), cider \(to 10\)"):
        common_top(["exact", "cider"])


def test_letters_alone_are_read_where_the_options_are_not_known() -> None:
    assert [read_choice(text).index for text in ("D", "(j)", "K", "Is it A?")] == [3, 9, None, 0]


def test_a_box_without_an_area_is_no_truth_but_of_the_official_rule() -> None:
    for truth in ("[50, 60, 10, 20]", "[1, 2, 1, 4]"):
        with pytest.raises(ValueError, match="is a box without an area: expected left, top, right, bottom"):
            measure([truth], [truth], "iou")
        assert measure([truth], [Reference((truth,))], "coin_grounding")["official"] == 0


def _any_references(score: str) -> list[Reference]:
    """Four references that the score can be asked of."""
    options = ("(A) red", "(B) blue", "(C) two cars", "(D) none")
    if score == "mme":
        return [
            Reference(("Yes",), image=image, categories=("count",)) for image in ("1.png", "1.png", "2.png", "2.png")
        ]
    if score == "mme_realworld":
        return [Reference(("B",), options, categories=("Perception", "Monitoring", "count"))] * 4
    if score == "video_mme":
        return [Reference(("B",), options, categories=("short", "Knowledge", "Law", "OCR Problems"))] * 4
    if score in ("choice", "coin_scienceqa"):
        return [Reference(("B",), options)] * 4
    if score in ("iou", "coin_grounding"):
        return [Reference(("[1, 2, 3, 4]",))] * 4
    if score in ("vqa", "coin_textvqa"):
        return [Reference(("red",) * 10)] * 4
    return [Reference(("red car", "a red car on the street"))] * 4
