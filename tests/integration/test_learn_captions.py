"""A learner of captions is taught file after file, or with pictures and texts in Python."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.folders import teach_folder
from perdure.api.learner import Learner
from perdure.backbones.preprocess import Preprocess
from perdure.core.checkpoint import whole
from perdure.storage.files import write_sealed
from perdure.streams import captioned_task
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet
from perdure.training.summary import read_summary

EIGHT = Preprocess(size=8, resize=8)
METHOD = "lora(rank=2, tower='both') + replay(size=6)"
MADE = (
    *("--backbone", "tiny(text=True)", "--objective", "retrieve", "--method", METHOD),
    *("--precision", "fp32", "--epochs", 2),
)


@pytest.fixture
def album(photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`album("first", "cat dog")`: first.jsonl, whose rows are pictures with two captions each."""

    monkeypatch.chdir(tmp_path)

    def make(name: str, names: str, words: str = "a {} here", column: str = "captions") -> Path:
        photos(name, names)
        rows = [
            {"image": f"{name}/{kind}/{i:02}.png", column: [words.format(kind), f"{kind} {i}"]}
            for kind in names.split()
            for i in range(8)
        ]
        file = Path(f"{name}.jsonl")
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return file

    return make


def test_file_after_file_is_learnt_and_searched(perdure: Any, album: Any) -> None:
    album("first", "cat dog")
    album("next", "emu fox", words="on this picture there is a {}, seen from afar", column="english")
    taught = perdure("learn", "first.jsonl", "--into", "x", *MADE)
    assert taught.out.splitlines()[-1] == "learnt first; ask it with: perdure search x FOLDER 'words'"
    before = json.loads(Path("x/examples.json").read_text(encoding="utf-8"))
    taught = perdure("learn", "next.jsonl", "--into", "x", "--captions", "english", "--json").events[-1]
    assert taught["task"]["names"] == ["next"]
    summary = read_summary(Path("x"))
    assert summary["score"] == "recall"
    assert all(value is not None for value in summary["matrix"][1])
    assert [task.classes for task in whole(Path("x"))[-1].tasks] == [(0,), (1,)]
    found = perdure("search", "x", "first/cat", "a cat here", "--json", "--top", 3).events
    assert len(found) == 3
    after = json.loads(Path("x/examples.json").read_text(encoding="utf-8"))
    assert [q["before"] for q in after["queries"]] == [q["before"] for q in before["queries"]]
    assert (before["learnt"], after["learnt"]) == (1, 2)
    assert after["searched"] == [0]  # before and after in the same gallery
    assert "first" in Path("x/report.html").read_text(encoding="utf-8")


def test_the_same_images_again_are_the_same_images(perdure: Any, album: Any) -> None:
    album("first", "cat dog"), album("next", "emu fox")
    Path("latest.jsonl").symlink_to("first.jsonl")
    for name in ("latest", "next", "first"):
        taught = perdure("learn", f"{name}.jsonl", "--into", "x", *MADE)
        assert taught.code == 0
        assert "gone or has changed" not in taught.out
        assert "are test images of earlier tasks" not in taught.out  # the same ones are held out again
    assert [task.names for task in whole(Path("x"))[-1].tasks] == [("first",), ("next",), ("first (2)",)]
    first, other, again = (captioned_task(f"{n}.jsonl", EIGHT, {}, i) for i, n in enumerate(("first", "next", "first")))
    assert torch.equal(first.train.pairs, again.train.pairs)
    assert torch.equal(first.test.pairs, again.test.pairs)
    every = torch.cat([data.pairs for task in (first, other) for data in (task.train, task.test)])
    assert len(torch.unique(every)) == len(every) == 32
    # a twin in the gallery must not count against its own image
    own = read_summary(Path("x"))["recall"]["union"]["i2t@10"]
    assert own[0] > 0


def test_searches_of_a_lesson_that_was_given_up_are_forgotten(perdure: Any, album: Any) -> None:
    album("first", "cat dog")
    Path("x").mkdir()
    Path("x/examples.json").write_text('{"queries": [], "searched": [0], "pictures": {}}', encoding="utf-8")
    assert perdure("learn", "first.jsonl", "--into", "x", *MADE).code == 0
    assert len(json.loads(Path("x/examples.json").read_text(encoding="utf-8"))["queries"]) == 10


def test_images_that_were_a_test_are_told(perdure: Any, album: Any) -> None:
    file = album("first", "cat dog")
    assert perdure("learn", "first.jsonl", "--into", "x", *MADE).code == 0
    file.with_name("more.jsonl").write_text("\n".join(file.read_text().splitlines()[:9]), encoding="utf-8")
    assert "are test images of earlier tasks" in perdure("learn", "more.jsonl", "--into", "x").out


def test_few_images_are_all_learnt_and_one_is_refused(perdure: Any, album: Any) -> None:
    lines = album("first", "cat dog").read_text().splitlines()
    Path("two.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    Path("one.jsonl").write_text(lines[0], encoding="utf-8")
    task = captioned_task("two.jsonl", EIGHT, {}, 0)
    assert (len(task.train), len(task.test)) == (2, 0)
    assert len(torch.unique(task.train.pairs)) == 2
    said = perdure("learn", "one.jsonl", "--into", "x", *MADE)
    assert said.code == 2
    assert "one.jsonl has one image: images are told apart from each other, so give at least two" in said.err


def test_all_captions_of_an_image_are_learnt(album: Any) -> None:
    rows = [json.loads(line) for line in album("first", "cat dog").read_text().splitlines()]
    many = [row | {"captions": [f"{i} {row['image']}" for i in range(7)]} for row in rows]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
    assert len(captioned_task("many.jsonl", EIGHT, {}, 0).train.texts[0]) == 7


class Stops(Quiet):
    """A machine that fails in the third step."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if step == 3:
            raise OSError("the power is out")


def test_a_lesson_that_was_stopped_goes_on_with_the_same_column(perdure: Any, album: Any) -> None:
    album("first", "cat dog")
    options = {"backbone": "tiny(text=True)", "objective": "retrieve", "method": "lora(rank=2, tower='both')"}
    config = RunConfig(stream="", **options, epochs=2, precision="fp32", batch_size=4, save_every=1)
    with pytest.raises(OSError, match="power"):
        teach_folder(Path("first.jsonl"), Path("x"), config, {}, Stops())
    assert not whole(Path("x"))
    source = Path("x/task-000/source.json")
    written = source.read_text(encoding="utf-8")
    source.write_text(written.replace('"captions": "captions"', '"captions": "english"'), encoding="utf-8")
    assert "x/task-000/source.json is damaged: its content does not" in perdure("resume", "x").err
    write_sealed(source, json.loads(source.read_text(encoding="utf-8")))
    said = perdure("learn", "first.jsonl", "--into", "x")
    assert said.code == 2
    assert "and now the captions' columns differ" in said.err
    source.write_text(written, encoding="utf-8")
    assert perdure("learn", "first.jsonl", "--into", "x", "--captions", "captions").code == 0
    assert len(whole(Path("x"))) == 1


def test_a_changed_caption_is_another_data_set(perdure: Any, album: Any) -> None:
    file = album("first", "cat dog")
    album("next", "emu fox")
    made = [part if part != METHOD else "lora(rank=2)" for part in MADE]
    assert perdure("learn", "first.jsonl", "--into", "x", *made).code == 0
    file.write_text(file.read_text(encoding="utf-8").replace("cat 0", "kitten 0"), encoding="utf-8")
    taught = perdure("learn", "next.jsonl", "--into", "x")
    assert "first.jsonl is gone or has changed since it was learnt (task 1)" in taught.out
    assert read_summary(Path("x"))["matrix"][1][0] is None


def test_what_has_no_effect_is_refused(perdure: Any, album: Any, photos: Any) -> None:
    album("first", "cat dog"), photos("classes", "cat dog")
    said = perdure("learn", "classes", "--into", "y", "--backbone", "tiny()", "--captions", "english")
    assert said.code == 2
    assert "--captions english has no effect with classify" in said.err
    said = perdure("learn", "first.jsonl", "--into", "x", *MADE, "--captions", "english")
    assert said.code == 2
    assert "english" in said.err
    assert "captions" in said.err
    assert not Path("x/run.json").exists()
    said = perdure("learn", "classes", "--into", "x", *MADE)
    assert said.code == 2
    assert "holds no .parquet, .jsonl or .csv file" in said.err
    assert "of captions, as objective=retrieve learns them" in said.err
    said = perdure("learn", "first.jsonl", "--into", "x", "--backbone", "tiny()")
    assert "is a file; give a folder of class folders, or a new learner: of captions with" in said.err


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()


def test_captions_are_taught_in_python(tmp_path: Path) -> None:
    learner = Learner.create("tiny(text=True)", METHOD, "retrieve", epochs=1, precision="fp32", batch_size=4)
    learner.learn(pictures(8, 0), captions=[f"thing {i}" for i in range(8)])
    learner.learn(pictures(6, 1), captions=[[f"another, longer thing {i}", "second"] for i in range(6)])
    assert learner.known == {"captions 1": 0, "captions 2": 1}
    pairs = torch.cat([task.train.pairs for task in learner.tasks])
    assert len(torch.unique(pairs)) == 14
    learner.save(tmp_path / "it")
    again = Learner.load(tmp_path / "it")
    assert again.search(pictures(8, 0), "thing 3") == learner.search(pictures(8, 0), "thing 3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": ["a"] * 4}, r"labels have no effect with retrieve, which learns captions: give captions="),
        ({}, r"captions are missing: give a text, or several, for each image"),
        ({"images": "cat.jpg", "captions": ["a"]}, r"cat.jpg is no parquet or JSONL file .* as a list, \['cat.jpg'\]"),
        ({"images": pictures(1, 0), "captions": ["a"]}, r"captions: one image only; images are told apart"),
        ({"captions": ["a", "b"]}, r"captions: got 2 for 4 images, expected a text, or several, for each"),
        ({"captions": "a cat"}, r"captions: got 'a cat', expected a list with a text, or several, for each image"),
        ({"captions": ["a", "b", "", "d"]}, r"captions, row 2: got '', expected a text, or several"),
        ({"captions": ["a", "b", [], "d"]}, r"captions, row 2: got \[\], expected a text, or several"),
    ],
)
def test_wrong_captions_are_named(given: dict[str, Any], message: str) -> None:
    learner = Learner.create("tiny(text=True)", "lora(rank=2)", "retrieve", precision="fp32")
    with pytest.raises(ValueError, match=message):
        learner.learn(**{"images": pictures(4, 0)} | given)


def test_captions_for_a_learner_of_classes_are_refused() -> None:
    learner = Learner.create("tiny(text=True)", "lora(rank=2)", precision="fp32")
    with pytest.raises(ValueError, match=r"captions have no effect with classify, .*: give labels=\["):
        learner.learn(pictures(4, 0), labels=list("abab"), captions=["a"] * 4)
