"""Words that a text encoder cannot read are told, and those that it can read are not."""

from typing import Any

import pytest

from perdure.backbones.clip import pocket
from perdure.backbones.scripts import unread_scripts


@pytest.fixture(scope="module")
def reader() -> Any:
    return pocket()


@pytest.mark.parametrize("text", ["a red car", "naïve café", "12 + 34", "", "Überraschung"])
def test_words_in_the_script_of_the_weights_are_read(text: str, reader: Any) -> None:
    assert reader.unread([text]) == []


@pytest.mark.parametrize(
    ("text", "script", "why"),
    [("一辆红色的汽车", "Chinese", "Latin script only"), ("красная машина", "Cyrillic", "byte by byte")],
)
def test_words_in_another_script_are_told_with_the_reason(text: str, script: str, why: str, reader: Any) -> None:
    (line,) = reader.unread(["a car", text, text])
    assert script in line
    assert why in line


def test_what_a_tokenizer_does_not_know_is_told_and_a_token_a_letter_is_reading() -> None:
    vocabulary = {"猫": 5, "狗": 6}
    tokens = lambda word: [vocabulary.get(letter, 1) for letter in word]  # noqa: E731
    assert list(unread_scripts(["猫狗"], tokens, 1)) == []
    (line,) = unread_scripts(["猫鸟"], tokens, 1)
    assert "does not know '猫鸟'" in line
