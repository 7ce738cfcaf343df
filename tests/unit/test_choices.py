"""Options that are said word for word, and what stands beside the right one."""

import pytest

from perdure.scoring.choices import alternatives, index_of, read_choice

VITAMINS = ("Vitamin B", "Vitamin A")


@pytest.mark.parametrize(
    ("answer", "options", "index"),
    [
        ("x+y", ("x-y", "x+y"), 1),
        ("it is x + y", ("x-y", "x+y"), 1),
        ("C++", ("C", "C++", "Java"), 1),
        ("CO", ("Co", "CO"), 1),
        ("It is Vitamin A", VITAMINS, 1),
        ("Vitamin A is right", VITAMINS, 1),
        ("Vitamin A, so B", VITAMINS, 1),
        ("Vitamin A or Vitamin B", VITAMINS, None),
        ("A", VITAMINS, 0),
        ("The answer is A", VITAMINS, 0),
        ("It is both A and B", ("red", "blue", "Both A and B"), 2),
        ("I choose B because red is wrong", ("red", "blue"), 1),
        ("The answer is (B), as (A) is wrong", ("(A)", "(B)"), 1),
        ("- B", ("red", "blue"), 1),
        ("不是", ("是", "不是"), 1),
    ],
)
def test_an_option_is_read_where_it_is_said_word_for_word(
    answer: str, options: tuple[str, ...], index: int | None
) -> None:
    assert read_choice(answer, options).index == index


@pytest.mark.parametrize(
    ("truth", "options", "index", "said"),
    [
        ("x+y", ("x-y", "x+y"), 1, ["x-y", "x+y"]),
        ("C++", ("C", "C++", "Java"), 1, ["C", "C++", "Java"]),
        ("B", ("1", "2", "3"), 1, ["A", "B", "C"]),
        ("(B)", ("cat", "dog"), 1, ["(A)", "(B)"]),
        ("2", ("1", "2"), 1, ["1", "2"]),
        ("B. dog", ("A. cat", "B. dog"), 1, ["cat", "dog"]),
        ("B", ("B", "A"), 1, ["A", "B"]),
    ],
)
def test_the_right_option_and_what_stands_beside_it_have_one_form(
    truth: str, options: tuple[str, ...], index: int, said: list[str]
) -> None:
    assert index_of(truth, options) == index
    assert alternatives(truth, options) == said
