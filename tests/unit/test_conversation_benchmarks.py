"""Public benchmarks of conversations: their layouts, a few rows each, made here, and where their answers come from."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perdure.backbones.preprocess import Preprocess
from perdure.scoring import measure
from perdure.streams.conversation_benchmarks import coin, daquar, mllm_acl, mllm_dcl, ucit
from perdure.types import Stream

SIZE = Preprocess(size=8, resize=8)


def write(file: Path, what: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(what))


def paint(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (number, 0, 0)).save(file)


def task(place: Path, images: Path, name: str, files: tuple[str, str], more: dict[str, Any], tested: str = "") -> None:
    """Two train and two test entries in the authors' forms, with their images."""
    for part, file in zip(("train", "test"), files, strict=True):
        folder = f"{name}{tested if part == 'test' else ''}"
        rows: list[dict[str, Any]] = []
        for i in range(2):
            named = f"{name}/{part}/{i}.png"
            root = place / folder if images == place else images
            paint(root / named, i)
            turns = [{"from": "human", "value": f"<image>\nWhat {i}?"}, {"from": "gpt", "value": f"{name} {i}"}]
            if part == "train":
                rows.append({"id": i, "image": named, "conversations": turns})
            else:
                rows.append({"question_id": f"q{i}", "image": named, "text": f"What {i}?", **more})
        write(place / folder / file, rows)


def answered(stream: Stream) -> dict[str, tuple[str, Any, Any]]:
    """Task -> its score, by which the truth is right, and answers and options of its second test example."""
    found = {}
    for each in stream:
        assert (len(each.train), len(each.test)) == (2, 2)
        first, second = each.test.__getitems__([0, 1])["conversation"]
        if each.score != "cider":
            assert (
                measure([first.taught, second.taught], [first.reference, second.reference], each.score)["strict"] == 1
            )
        assert second.images[0].getpixel((0, 0)) == (1, 0, 0)
        found[each.name] = (each.score, second.answer, second.options)
    return found


def test_coin_reads_the_published_layout_with_answers_from_their_own_files(tmp_path: Path) -> None:
    place, images = tmp_path / "Instructions_Original", tmp_path / "cl_dataset"
    answer = {"answer": "yes"}
    names = ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCR-VQA"]
    for name in names:
        more = {"ScienceQA": {}, "TextVQA": {}, "Grounding": {"answer_bbox": [0.1, 0, 0.5, 1]}}.get(name, answer)
        task(place, images, name, ("train.json", "val.json" if name == "VQAv2" else "test.json"), more)
    people = {"data": [{"question_id": f"q{i}", "answers": ["no", *["yes"] * 9]} for i in range(2)]}
    write(images / "TextVQA" / "TextVQA_0.5.1_val.json", people)
    problems = {f"q{i}": {"choices": ["red", "blue"], "answer": 1} for i in range(2)}
    write(images / "ScienceQA" / "problems.json", problems)
    stream = coin(str(tmp_path))(SIZE, 3)
    assert answered(stream) == {
        "ScienceQA": ("coin_scienceqa", "B", ("red", "blue")),
        "TextVQA": ("coin_textvqa", ("yes", "no", *["yes"] * 8), None),
        "ImageNet": ("coin_imagenet", "yes", None),
        "GQA": ("coin_gqa", "yes", None),
        "VizWiz": ("coin_equal", "yes", None),
        "Grounding": ("coin_grounding", "[0.1, 0, 0.5, 1]", None),
        "VQAv2": ("coin_equal", "yes", None),
        "OCRVQA": ("coin_ocrvqa", "yes", None),
    }
    (two,) = coin(str(place), images=str(images), only=["GQA"], per_task=1)(SIZE, 0)
    assert (two.name, len(two.train)) == ("GQA", 1)
    for wrong in (2, -1, 30):
        write(images / "ScienceQA" / "problems.json", {"q0": {"choices": ["red", "blue"], "answer": wrong}})
        with pytest.raises(ValueError, match=rf"problems.json: of question 'q0' the answer {wrong} is no number"):
            coin(str(place), images=str(images), only=["ScienceQA"])(SIZE, 0)
    write(images / "ScienceQA" / "problems.json", problems)
    (images / "TextVQA" / "TextVQA_0.5.1_val.json").unlink()
    with pytest.raises(ValueError, match=r"add TextVQA_0.5.1_val.json"):
        coin(str(place))(SIZE, 0)
    (place / "GQA").rename(place / "GQA1")
    with pytest.raises(ValueError, match=r"has no folder 'GQA'; did you mean 'GQA1'\?; add it, or write only="):
        coin(str(place), only=["GQA"])(SIZE, 0)
    with pytest.raises(ValueError, match=r"coin has no task 'VQA'; did you mean 'VQAv2'"):
        coin(str(place), only=["VQA"])


def test_ucit_takes_all_captions_of_the_test_images_in_file_order(tmp_path: Path) -> None:
    place, images = tmp_path / "instructions", tmp_path / "datasets"
    names = {"ArxivQA": "4w", "CLEVR-Math": "4w", "Flickr30k": "brief_4w", "IconQA": "", "ImageNet-R": "", "VizWiz": ""}
    for name, size in names.items():
        files = (f"train_{size}.json" if size else "train.json", "test_3000.json")
        task(place, images, name, files, {} if name in ("Flickr30k", "VizWiz") else {"answer": "A"})
        if name in ("Flickr30k", "VizWiz"):
            captions = [
                {"image_id": i + 1, "caption": f"{text} {i}"} for i in range(2) for text in ("a dot", "one dot")
            ]
            write(place / name / "val_coco_type_3000.json", {"images": [], "annotations": captions})
    found = answered(ucit(str(tmp_path))(SIZE, 0))
    assert list(found) == ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR", "Flickr30k"]
    assert found["Flickr30k"] == found["VizWiz"] == ("cider", ("a dot 1", "one dot 1"), None)
    assert found["CLEVR"] == ("coin_equal", "A", None)


def test_mllm_cl_reads_domains_and_the_abilities_that_a_rule_scores(tmp_path: Path) -> None:
    domains, abilities = tmp_path / "DCL", tmp_path / "ACL"
    for name in ("RS", "Med", "AD", "Sci", "Fin"):
        task(domains, domains, name, ("train.json", "test.json"), {"answer": "yes"})
    write(domains / "task5Router_train20.json", [])
    found = answered(mllm_dcl(str(domains))(SIZE, 0))
    assert [score for score, _, _ in found.values()] == [
        f"mllm_cl_{rule}" for rule in ("words", "med", "words", "sci", "fin")
    ]
    sci = mllm_dcl(str(domains), only=["Sci"])(SIZE, 0).tasks[0].test.__getitems__([0])["conversation"][0]
    assert (sci.names, sci.reference.image) == (("Sci/test/0.png",), "Sci/test/0.png")
    for name in ("OCR", "VP"):
        task(abilities, abilities, name, ("train.json", "test.json"), {"answer": "2", "answer_type": "Digits"}, "_test")
    stream = mllm_acl(str(abilities))(SIZE, 0)
    assert answered(stream) == {"OCR": ("mllm_cl_ocr", "2", None), "VP": ("mllm_cl_count", "2", None)}
    assert stream.tasks[0].test.__getitems__([0])["conversation"][0].kind == "Digits"
    assert [line.partition(" ")[0] for line in stream.notes["remarks"]] == ["Math", "APP"]
    for name in ("Math", "APP"):
        with pytest.raises(ValueError, match=f"'{name}' of mllm_acl is not here: .*leave the task out"):
            mllm_acl(str(abilities), only=[name])


def test_daquar_is_three_kinds_of_question_about_the_same_images(tmp_path: Path) -> None:
    questions = ["what is on the wall", "how many chairs are there", "what is the colour of the bed"]
    for name, first in (("train", 0), ("test", 10)):
        cells = []
        for i in range(first, first + 3):
            paint(tmp_path / "x.png", i)
            cells.append({"bytes": (tmp_path / "x.png").read_bytes(), "path": f"{i}.png"})
        answers = [["photo_frame, light", "3", "red"]] * 3
        table = {"image": cells, "questions": [questions] * 3, "answers": answers, "image_id": ["a", "b", "c"]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    stream = daquar(str(tmp_path), order="natural")(SIZE, 0)
    asked = {each.name: each.test.__getitems__([0])["conversation"][0] for each in stream}
    assert {name: each.answer for name, each in asked.items()} == {
        "colours": "red",
        "counting": "3",
        "objects": "photo frame, light",
    }
    assert stream.notes["train_images"] == [3, 3, 3]
