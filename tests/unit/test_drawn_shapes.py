"""What a small decoder was taught with: pictures that are drawn, and what is said of them."""

import importlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("drawn_shapes")


def test_a_picture_and_its_questions_are_the_same_each_time_and_what_is_said_is_on_it(shapes: Any) -> None:
    for number in range(30):
        scene, again = shapes.draw(number), shapes.draw(number)
        assert scene.picture.tobytes() == again.picture.tobytes()
        colours = {figure.colour for figure in scene.figures}
        there = colours | {figure.shape for figure in scene.figures}
        for turn in range(6):
            _, said = shapes.KINDS["colour"](scene, random.Random(turn))
            assert colours & set(said.split())
            for kind, words in (("presence", ("yes", "right", "true")), ("absence", ("no", "wrong", "false"))):
                asked, said = shapes.KINDS[kind](scene, random.Random(turn))
                what = re.findall("|".join([*shapes.COLOURS, *shapes.SHAPES]), asked)[0]
                assert said.startswith(words) == (what in there), (asked, said)


def test_no_question_of_easy_vqa_is_asked(shapes: Any) -> None:
    package = pytest.importorskip("easy_vqa")

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+", text))

    files = Path(package.__file__).parent.glob("data/*/questions.json")
    theirs = {words(row[0]) for file in files for row in json.loads(file.read_text())}
    assert len(theirs) > 100
    assert not theirs & {words(question) for question in shapes.questions(200)}
