"""Data as people have it, and what the commands make of it: read as it is meant, or one line with what to write."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import perdure as perdure_package
from perdure import Learner

NCM = ("--backbone", "tiny()", "--method", "ncm")


def one_line(answer: Any, *said: str) -> None:
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1, answer
    for words in said:
        assert words in answer.err, answer


def classes(folder: str) -> list[str]:
    listed: list[str] = json.loads(Path(folder, "run.json").read_text())["stream"]["classes"]
    return listed


# Layouts


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("train_set", "Val"), ("TRAIN", "Test-Images")])
def test_parts_called_as_people_call_them_are_parts(train: str, test: str, perdure: Any, photos: Any) -> None:
    photos(f"d/{train}", "cat dog", 5), photos(f"d/{test}", "cat dog", 3)
    taught = perdure("learn", "d", "--into", "a", *NCM, "--json").events
    assert taught[-1]["task"]["names"] == ["cat", "dog"]
    assert perdure("run", "--stream", "images(path='d', tasks=1)", *NCM, "--out", "b").code == 0
    assert json.loads(Path("b/run.json").read_text())["stream"]["test_images"] == [6]


@pytest.mark.parametrize(
    ("folders", "learn", "stream"),
    [
        (["z/z/cat", "z/z/dog"], "only folders (cat, dog): did you mean 'perdure learn z/z'?", "did you mean path="),
        (["z/a/cat", "z/a/dog", "z/b/cat", "z/b/dog"], "one by one, as in 'perdure learn z/a'", "domain=0"),
        (["z/pets/cat", "z/farm/cow"], "hold only folders: learn them one by one", "domain=1"),
        (["z/cat/train", "z/cat/test", "z/dog/train", "z/dog/test"], "put these outermost", "put these outermost"),
        (["z/train/cat", "z/training/cat"], "mean the same: keep one", "mean the same: keep one"),
    ],
)  # fmt: skip
def test_a_layout_that_may_mean_something_else_is_refused_with_what_to_write(
    folders: list[str], learn: str, stream: str, perdure: Any, photos: Any
) -> None:
    for folder in folders:
        photos(Path(folder).parent, Path(folder).name, 3)
    one_line(perdure("learn", "z", "--into", "a", *NCM), learn)
    one_line(perdure("run", "--stream", "images(path='z', tasks=1)", *NCM, "--out", "b"), stream)


def test_a_test_folder_without_classes_is_refused(perdure: Any, photos: Any) -> None:
    photos("d/train", "cat dog")
    photos("d", "test")
    one_line(perdure("learn", "d", "--into", "a", *NCM), "'test' holds no class folders")


@pytest.mark.parametrize("link", ["d/self", "d/cat/up", "d/cat/inner/up"])
def test_a_link_to_what_holds_it_is_refused(link: str, perdure: Any, photos: Any) -> None:
    photos("d", "cat dog")
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to(Path("d").absolute())
    one_line(perdure("learn", "d", "--into", "a", *NCM), "is a link to a folder that holds it: remove the link")


def test_a_class_folder_that_is_not_utf8_is_told_before_training(perdure: Any, photos: Any) -> None:
    photos("d", "cat dog")
    Path("d/cat").rename(Path("d") / "caf\udce9")
    one_line(perdure("learn", "d", "--into", "a", *NCM), r"'caf\\xe9' is not UTF-8: rename it")
    assert not Path("a/run.json").exists()


def test_what_is_left_out_is_told_by_kind_and_what_is_linked_is_read(perdure: Any, photos: Any) -> None:
    photos("d", "cat dog", 3), photos("elsewhere", "more", 2)
    for name in ("cat/a.HEIC", "cat/b.HEIC", "dog/noending", "loose.png"):
        Path("d", name).write_bytes(b"")
    shutil.copy("d/cat/00.png", "d/cat/__upload__1.png")
    Path("d/cat/gone.png").symlink_to("nowhere")
    Path("d/dog/linked").symlink_to(Path("elsewhere/more").absolute())
    Path("d/cat/.hidden.png").write_bytes(b"")
    told = "5 files were left out: 2 .HEIC, 1 dead links, 1 images outside of class folders, 1 without ending"
    assert told in perdure("learn", "d", "--into", "a", *NCM).out
    assert told in perdure("run", "--stream", "images(path='d', tasks=2)", *NCM, "--out", "b").out
    noted = json.loads(Path("b/run.json").read_text())["stream"]
    assert sum(noted["train_images"]) + sum(noted["test_images"]) == 9
    asked = perdure("predict", "a", "d/dog", "--json")
    assert [Path(each["image"]).name for each in asked.events] == ["00.png", "01.png", "02.png", "00.png", "01.png"]
    assert "1 file was left out: 1 without ending" in asked.err


# Measuring


def test_eval_measures_all_images_that_were_not_taught_and_says_how_many(perdure: Any, photos: Any) -> None:
    photos("d", "cat dog", 10)
    assert perdure("learn", "d", "--into", "a", *NCM).code == 0
    shutil.copytree("d", "data/test")
    for file in Path("data/test").glob("*/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    for stream in ("images(path='data/test')", "images(path='data')"):
        measured = perdure("eval", "a", "--stream", stream)
        assert measured.out.startswith("20 images are measured\n"), measured
    own = perdure("eval", "a", "--stream", "images(path='d')", "--json")
    assert "4 images are measured; 16 more were taught to this learner and are left out" in own.err
    measures = {"accuracy", "accuracy_with_task_id", "task_id_accuracy", "calibration_error"}
    assert {row["metric"] for row in own.events} == measures
    shutil.copytree("data/test", "few")
    shutil.rmtree("few/dog")
    assert perdure("eval", "a", "--stream", "images(path='few')").out.startswith("10 images are measured\n")
    photos("most", "cat dog", 4)  # too few to hold one out
    assert perdure("learn", "most", "--into", "b", *NCM).code == 0
    one_line(
        perdure("eval", "b", "--stream", "images(path='most')"), "all 8 images were taught to b: measure on others"
    )


def test_predict_and_search_answer_for_the_readable_images(perdure: Any, photos: Any) -> None:
    photos("d", "cat dog", 4)
    made = ("--backbone", "tiny(text=True)", "--objective", "zeroshot", "--method", "lora(rank=2)", "--epochs", 1)
    assert perdure("learn", "d", "--into", "a", *made).code == 0
    Path("d/cat/02.png").write_bytes(b"no image")
    for words in (("predict", "a", "d/cat"), ("search", "a", "d/cat", "a cat")):
        one_line(perdure(*words), "02.png", "not an image", "or leave it out with --skip-bad")
        answered = perdure(*words, "--skip-bad", "--json")
        assert [e["image"] for e in answered.events if "02.png" in e["image"]] == []
        assert len(answered.events) == 3
        assert "1 unreadable image was left out: d/cat/02.png" in answered.err


# Tables


def write(path: str, images: list[Any], labels: list[Any], **more: list[Any]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels, **more}), path)
    return path


def encoded(photos: Callable[..., Path], count: int = 4) -> list[bytes]:
    photos("_", "one two", count)
    return [file.read_bytes() for file in sorted(Path("_").glob("*/*.png"))]


PIXELS = [[[1, 2], [3, 4]]]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (PIXELS, "holds list<"),
        ([b"x"], "holds list<"),
        ({"data": b"x"}, "holds struct<data"),
        ({"bytes": 7}, "holds struct<bytes: int64>"),
        (7, "holds int64"),
        (0.5, "holds double"),
        ("iVBORw0KGgo" + "A" * 300, "as base64 text (iVBORw0KGgoA...)"),
        ("data:image/png;base64,AAAA", "as base64 text"),
        ("https://img.example.org/0.jpg", "holds addresses (https://img.example.org/0.jpg)"),
        ({"bytes": None, "path": "s3://b/0.jpg"}, "holds addresses"),
    ],
)
def test_an_image_column_that_cannot_be_is_refused_when_the_stream_is_planned(
    image: Any, said: str, perdure: Any
) -> None:
    write("t.parquet", [image] * 4, [0, 1, 0, 1], caption=["a b"] * 4)
    asked = perdure("run", "--stream", "parquet(path='t.parquet', tasks=2)", *NCM, "--out", "x")
    one_line(asked, "t.parquet: image column 'image'", said)
    assert len(asked.err) < 400
    stream = "captions(path='t.parquet', captions='caption', tasks=1, by='natural')"
    retrieve = ("--backbone", "tiny(text=True)", "--objective", "retrieve", "--method", "lora", "--out", "y")
    one_line(perdure("run", "--stream", stream, *retrieve), "image column 'image'", said)
    if isinstance(image, str):
        Path("t.jsonl").write_text(json.dumps({"image": image, "caption": "a"}))
        one_line(perdure("run", "--stream", stream.replace("parquet", "jsonl"), *retrieve), "'image' (image=)", said)
        Path("t.csv").write_text(f"image,label,caption\n{image.replace(',', '')},cat,a\n")
        if "," not in image:
            one_line(perdure("run", "--stream", "csv(path='t.csv', tasks=1)", *NCM, "--out", "x"), said)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[1], [2], [1], [2]], "label column 'label' holds list<"),
        ([b"a", b"b", b"a", b"b"], "label column 'label' holds binary"),
        ([0.5, 1.5, 0.5, 1.5], "label column 'label' holds double"),
        ([None] * 4, "label column 'label' holds null"),
        ([1, None, 1, 2], "row 1: label column 'label' is empty"),
        (["a", "b", "", "a"], "row 2: label column 'label' is empty"),
        ([0, 1, 0, -1], "row 3: label -1 stands for no label"),
        (None, "no column 'label' (label=); did you mean 'lable'?"),
    ],
)
def test_a_label_column_that_names_no_classes_is_refused(
    labels: list[Any] | None, said: str, perdure: Any, photos: Any
) -> None:
    write("t.parquet", encoded(photos, 2), labels or [0, 1] * 2)
    if labels is None:
        pq.write_table(pq.read_table("t.parquet").rename_columns(["image", "lable"]), "t.parquet")
    one_line(perdure("run", "--stream", "parquet(path='t.parquet', tasks=2)", *NCM, "--out", "x"), "t.parquet", said)


def label_names(names: list[str]) -> dict[bytes, bytes]:
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def test_files_that_number_their_classes_differently_are_joined_by_name(perdure: Any, photos: Any) -> None:
    images = encoded(photos)
    for part, names, labels in (
        ("train", ["cat", "dog"], [0] * 4 + [1] * 4),
        ("test", ["dog", "cat"], [1] * 4 + [0] * 4),
    ):
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata(label_names(names))
        Path("d").mkdir(exist_ok=True)
        pq.write_table(table, f"d/{part}.parquet")
    assert perdure("run", "--stream", "parquet(path='d', tasks=2)", *NCM, "--out", "x").code == 0
    assert sorted(classes("x")) == ["cat", "dog"]
    assert json.loads(Path("x/summary.json").read_text())["acc"] == 1.0
    pq.write_table(pa.table({"image": images, "label": labels}), "d/train-2.parquet")  # names nothing
    one_line(
        perdure("run", "--stream", "parquet(path='d', tasks=2)", *NCM, "--out", "y"), "number the classes differently"
    )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        ({"cat": 0, "dog": 1}, ["cat", "dog"]),
        ({"0": "cat", "1": "dog"}, ["cat", "dog"]),
        ({"label": {"cat": 0, "dog": 1}, "other": ["x"]}, ["cat", "dog"]),
        (["cat"], "label 1 has no name in classes.json (1 names, from 0)"),
        ({"cat": 0.5, "dog": 1}, "expected a list of names"),
        ({"cat": 0, "dog": 0}, "expected a list of names"),
        ("cat dog", "expected a list of names"),
    ],
)
def test_names_beside_the_data_are_used_or_refused(names: Any, found: Any, perdure: Any, photos: Any) -> None:
    write("d/all.parquet", encoded(photos), [0] * 4 + [1] * 4)
    Path("d/classes.json").write_text(json.dumps(names))
    asked = perdure("run", "--stream", "parquet(path='d', tasks=2, order='natural')", *NCM, "--out", "x")
    if isinstance(found, str):
        one_line(asked, found)
    else:
        assert classes("x") == found


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_layouts_of_the_hub_and_lists_of_files_are_read(ending: str, perdure: Any, photos: Any) -> None:
    photos("img", "cat dog", 4)
    files = sorted(str(file.absolute()) for file in Path("img").glob("*/*.png"))
    labels = ["cat"] * 4 + ["dog"] * 4
    for part in ("train", "validation"):
        place = Path("hub/default") / part / f"0000.{ending}"
        if ending == "parquet":
            write(str(place), [{"bytes": Path(f).read_bytes(), "path": None} for f in files], labels)
        else:
            place.parent.mkdir(parents=True)
            place.write_text("image;label\n" + "".join(f"{f};{n}\n" for f, n in zip(files, labels, strict=True)))
    assert perdure("run", "--stream", f"{ending}(path='hub', tasks=2)", *NCM, "--out", "x").code == 0
    noted = json.loads(Path("x/run.json").read_text())["stream"]
    assert (noted["train_images"], noted["test_images"]) == ([4, 4], [4, 4])


# Order


def test_whole_numbers_are_classes_in_order_and_may_stand_in_a_file(perdure: Any, photos: Any) -> None:
    photos("d", "8 9 10 11", 3)
    Path("order.txt").write_text("11\n10\n9\n8\n")
    for out, order, found in (
        ("a", "'natural'", ["8", "9", "10", "11"]),
        ("b", "(9, 8, 11, 10)", ["9", "8", "11", "10"]),
        ("c", "'order.txt'", ["11", "10", "9", "8"]),
    ):
        assert perdure("run", "--stream", f"images(path='d', tasks=2, order={order})", *NCM, "--out", out).code == 0
        assert classes(out) == found
    one_line(
        perdure("run", "--stream", "images(path='d', tasks=2, order=(0, 1, 2, 3))", *NCM, "--out", "z"),
        "0 is not a class",
    )


def test_a_name_in_another_unicode_form_is_the_same_class_and_another_case_is_told(perdure: Any, photos: Any) -> None:
    photos("one", "caf\u00e9 dog"), photos("two", "cafe\u0301 Dog")
    assert perdure("learn", "one", "--into", "a", *NCM).code == 0
    said = perdure("learn", "two", "--into", "a").out
    assert "classes 'dog' and 'Dog' differ in upper and lower case only" in said
    names = json.loads(Path("a/task-001/manifest.json").read_text())["tasks"][-1]["names"]
    assert names == ["Dog", "caf\u00e9"]
    assert perdure("forget", "a", "cafe\u0301").code == 0  # as a file manager completes it


# Paths


@pytest.fixture
def vit(saved: Any, tmp_path: Path) -> Path:
    """A tiny ViT of transformers, in the test's folder."""
    return Path(shutil.copytree(saved["vit"], tmp_path / "vit"))


def test_a_folder_works_from_anywhere_and_after_a_move(
    vit: Path, perdure: Any, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos("d", "cat dog"), photos("e", "emu fox")
    made = ("--backbone", "vision(path='vit')", "--method", "ncm")
    assert perdure("learn", "d", "--into", "a", *made).code == 0
    assert perdure("run", "--stream", "images(path='d', tasks=2)", *made, "--out", "r").code == 0
    before = perdure("predict", "a", "d/cat/00.png", "--json").events[0]["labels"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert perdure("predict", tmp_path / "a", tmp_path / "d/cat/00.png", "--json").events[0]["labels"] == before
    assert perdure("resume", tmp_path / "r").code == 0
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    vit.rename("new/model"), Path("d").rename("new/pictures")
    one_line(perdure("predict", "a", "new/pictures/cat/00.png"), "vit")
    one_line(perdure("move", "a", "nothing=new/model"), "was made with nothing in", str(vit))
    for folder in ("a", "r"):
        assert perdure("move", folder, "vit=new/model").code == 0
        assert perdure("move", folder, "d=new/pictures").code == 0
    assert perdure("predict", "a", "new/pictures/cat/00.png", "--json").events[0]["labels"] == before
    assert perdure("resume", "r").code == 0
    taught = perdure("learn", "e", "--into", "a")
    assert (taught.code, "is gone or has changed" in taught.out) == (0, False)


def test_a_backbone_that_was_resized_can_be_moved(vit: Path, perdure: Any, photos: Any) -> None:
    photos("d", "cat dog")
    perdure("learn", "d", "--into", "a", "--backbone", "vision(path='vit')", "--method", "ncm")
    side = 2 * json.loads((vit / "config.json").read_text())["image_size"]
    assert perdure("resize", "a", "--size", str(side)).code == 0
    before = perdure("predict", "a", "d/cat/00.png", "--json").events[0]["labels"]
    vit.rename("elsewhere"), Path("d").rename("pictures")
    assert perdure("move", "a", "d=pictures").code == 0  # for which no model is read: it is away still
    assert perdure("move", "a", "vit=elsewhere").code == 0
    assert perdure("predict", "a", "pictures/cat/00.png", "--json").events[0]["labels"] == before
    here = f"vision(path={str(Path('elsewhere').absolute())!r}, size={side})"
    assert perdure("show", "a", "--json").events[0]["backbone"] == here
    assert perdure("report", "a", "--out", "r.html").code == 0
    assert f"size={side}" in Path("r.html").read_text()


def test_a_place_with_an_equals_sign_moves_there_and_back_and_what_is_not_the_same_is_told(
    perdure: Any, photos: Any
) -> None:
    photos("date=1/one", "cat dog"), photos("other/one", "emu fox")
    assert perdure("learn", "date=1/one", "--into", "a", *NCM).code == 0
    one_line(perdure("move", "a", "date=1=date=2"), "'date=2' does not exist")
    Path("date=1").rename("date=2")
    there = perdure("move", "a", "date=1=date=2")
    assert (there.code, there.err) == (0, "")
    other = perdure("move", "a", "date=2=other")
    assert (other.code, "is gone or has changed since it was learnt" in other.err) == (0, True)
    back = perdure("move", "a", "other=date=2")
    assert (back.code, back.err) == (0, "")
    Path("empty").mkdir()
    one_line(perdure("move", "a", "date=2=empty"), "empty/one' does not exist: give the place where")


def test_a_move_to_another_model_is_refused(vit: Path, perdure: Any, photos: Any) -> None:
    from safetensors.torch import load_file, save_file

    photos("d", "cat dog")
    assert perdure("learn", "d", "--into", "a", "--backbone", "vision(path='vit')", "--method", "ncm").code == 0
    shutil.copytree(vit, "other")
    weights = load_file("other/model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, "other/model.safetensors", {"format": "pt"})
    before = Path("a/run.json").read_bytes()
    one_line(perdure("move", "a", "vit=other"), "is another model than a was made with")
    assert Path("a/run.json").read_bytes() == before


# Python


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda f, n: ((each for each in f), n), "images: got a generator, expected a list"),
        (lambda f, n: (f, (each for each in n)), "labels: got a generator, expected a list"),
        (lambda f, n: (dict(zip(f, n, strict=True)), n), "images: got a dict, expected a list"),
        (lambda f, n: (f, "cat"), "labels: got a str, expected a list"),
        (lambda f, n: (f, np.eye(2)[[0] * 4 + [1] * 4]), r"labels: got shape \(8, 2\), expected a name"),
        (lambda f, n: (f, [[1, 0]] * 8), r"labels, row 0: got \[1, 0\]"),
        (lambda f, n: (f, [np.array([1, 0])] * 8), "labels, row 0: got array"),
        (lambda f, n: (f, [0, 1, 0, -1] * 2), "labels, row 3: -1 stands for no label"),
        (lambda f, n: (f, [float("nan"), *n[1:]]), "labels, row 0: got nan"),
        (lambda f, n: ([np.zeros((0, 10, 3), np.uint8), *f[1:]], n), r"images, row 0: .* \(0, 10, 3\)"),
        (lambda f, n: ([*f[:7], Image.new("RGB", (0, 4))], n), "images, row 7: .* 0 × 4 pixels"),
        (lambda f, n: ([*f[:7], np.zeros((4, 4, 2), np.uint8)], n), r"images, row 7: .* \(4, 4, 2\)"),
        (lambda f, n: ([], []), "labels are empty"),
        (lambda f, n: (f, None), "labels are missing"),
        (lambda f, n: (f, ["cat"]), "expected one label an image|got 1"),
        (lambda f, n: (f, [0.5] * 8), "labels, row 0: got 0.5, expected a name or an integer"),
        (lambda f, n: (f, ["cat"] * 8), "one class only, 'cat'; a first task needs at least two"),
        (lambda f, n: ([1, 2], ["a", "b"]), "images, row 0: got a int, expected a Pillow image"),
        (lambda f, n: ("nowhere", None), "'nowhere' does not exist"),
        (lambda f, n: ("nowhere", ["a"]), "nowhere is a folder, whose sub-folders are the labels"),
    ],
)  # fmt: skip
def test_python_input_that_cannot_be_is_refused_with_its_row(
    given: Callable[..., Any], said: str, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(f) for f in sorted(photos("d", "cat dog", 4).glob("*/*.png"))]
    learner, names = Learner.create("tiny()", "ncm"), ["cat"] * 4 + ["dog"] * 4
    with pytest.raises(ValueError, match=said) as refusal:
        learner.learn(*given(files, names))
    assert "\n" not in str(refusal.value)
    assert learner.learnt == 0
    assert learner.learn(files, names).learnt == 1


def test_python_input_is_read_by_position_and_grey_pictures_are_pictures(
    photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    files = [str(f) for f in sorted(photos("d", "cat dog", 4).glob("*/*.png"))]
    index = range(50, 58)
    learner = Learner.create("tiny()", "ncm")
    learner.learn(pandas.Series(files, index=index), pandas.Series(["cat"] * 4 + ["dog"] * 4, index=index[::-1]))
    assert learner.known == {"cat": 0, "dog": 1}
    assert learner.predict(pandas.Series(files, index=index), top=1) == learner.predict(files, top=1)
    grey = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    for one in (grey[:, :, None], [grey[:, :, None]], [grey]):
        assert learner.predict(one) == learner.predict([Image.fromarray(grey)])


# Messages


def words_in(sources: Path) -> list[tuple[str, str]]:
    """Every text in the sources but docstrings, with its file."""
    found = []
    for file in sorted(sources.rglob("*.py")):
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) not in docs and isinstance(node, ast.JoinedStr):
                found.append((str(file.relative_to(sources)), ast.unparse(node)))
            elif id(node) not in docs and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((str(file.relative_to(sources)), node.value))
    return found


def test_no_message_names_an_option_that_its_command_lacks() -> None:
    from perdure.cli.commands import COMMANDS
    from perdure.cli.suggestions import FORMER

    flags = {name: {f"--{f.name.rstrip('_').replace('_', '-')}" for f in fields(c)} for name, c in COMMANDS.items()}
    flags = {name: {*own, *(f"--no-{each[2:]}" for each in own)} for name, own in flags.items()}  # of a switch
    flag = re.compile(r"(?<!var\()(?<![\w-])--[a-z][a-z-]*+(?!:)")  # and no variable of a style sheet
    # of the command line itself; --no- begins a switch that is off
    everywhere = set.intersection(*flags.values()) | {
        "--help",
        "--version",
        "--completion",
        "--tyro-print-completion",
        "--no-",
    }
    for file, text in words_in(Path(perdure_package.__file__).parent):
        quoted = re.compile(rf"""perdure ({"|".join(COMMANDS)})\b([^'"]*)""")
        for command, words in quoted.findall(text):
            assert set(flag.findall(words)) <= flags[command] | {"--help"}, (file, text)
        known = everywhere | set(FORMER).union(*flags.values())
        if file.startswith(("streams/", "backbones/", "images.py", "memory/", "adapters/")):
            known = everywhere  # read by all commands, of which none but --json is an option of each
        assert set(flag.findall(quoted.sub("", text))) <= known, (file, text)
