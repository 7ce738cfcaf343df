"""Streams: what is found on disk, how it becomes tasks, and what is said when it cannot."""

import io
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from perdure.backbones.preprocess import Preprocess, UnreadableImage
from perdure.options.spec import Spec
from perdure.streams import STREAMS, Budget, ImageSet, build_stream, folder_task, given_task
from perdure.streams.sources import Files, Parquet
from perdure.types import Nothing, Stream

EIGHT = Preprocess(8, 8)
FRUIT = ("apple", "fig", "kiwi", "plum")


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (10, 8), (value % 256, 40, 90))


def png(value: int) -> bytes:
    stream = io.BytesIO()
    picture(value).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, classes: tuple[str, ...] = FRUIT, count: int = 5, first: int = 0) -> Path:
    """Class folders; the red channel of each image is its number."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(first + c * count + i).save(root / name / f"{i}.png")
    return root


def split_folder(root: Path, classes: tuple[str, ...] = FRUIT, test: str = "test") -> Path:
    folder(root / "train", classes)
    folder(root / test, classes, count=2, first=100)
    return root


def table(path: Path, labels: list[Any], **columns: list[Any]) -> Path:
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels} | columns), path)
    return path


def tables(root: Path, **columns: list[Any]) -> Path:
    """Four classes of five train and two test rows."""
    table(root / "train.parquet", [i % 4 for i in range(20)], **{k: (v * 20)[:20] for k, v in columns.items()})
    table(root / "test.parquet", [i % 4 for i in range(8)], **{k: (v * 20)[:8] for k, v in columns.items()})
    return root


def build(which: str, /, seed: int = 0, preprocess: Preprocess = EIGHT, **options: Any) -> Stream:
    written = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return build_stream(Spec(which, tuple(written.items())), preprocess, seed)


def refused(message: str, which: str, /, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        build(which, **options)
    assert "\n" not in str(raised.value)


def reds(data: Any) -> list[int]:
    return data.__getitems__(range(len(data)))["image"][:, 0, 4, 4].tolist()


# Images in a set


def test_set_gives_the_images_and_labels_asked_for_in_that_order(tmp_path: Path) -> None:
    data = build("images", path=split_folder(tmp_path / "d"), tasks=1, order="natural").tasks[0].train
    batch = data.__getitems__([19, 0, 7, 7])
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 4, 4].tolist() == [19, 0, 7, 7]
    assert batch["label"].tolist() == [3, 0, 1, 1]
    assert batch["label"].dtype == torch.int64


def test_decoded_images_are_kept_and_cannot_be_changed_through_a_batch(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    data = build("images", path=root, tasks=1).tasks[0].train
    first = data.__getitems__([0, 1])["image"]
    assert data.cached
    for file in root.rglob("*.png"):
        file.unlink()
    again = data.__getitems__([0, 1])["image"]
    assert torch.equal(first, again)
    again.zero_()
    assert torch.equal(first, data.__getitems__([0, 1])["image"])


def test_set_beyond_the_budget_gives_the_same_images_from_disk(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    files = Files(root, [f"{c}/{i}.png" for c in FRUIT for i in range(5)])
    kept, streamed = (
        ImageSet(files, torch.arange(20), torch.arange(20), EIGHT, Budget(size))
        for size in (20 * 3 * 64, 20 * 3 * 64 - 1)
    )
    assert kept.cached
    assert not streamed.cached
    assert reds(kept) == reds(streamed) == list(range(20))


def test_sets_share_one_budget(tmp_path: Path) -> None:
    files = Files(folder(tmp_path / "d"), [f"apple/{i}.png" for i in range(5)])
    budget = Budget(int(1.5 * 5 * 3 * 64))
    sets = [ImageSet(files, torch.arange(5), torch.arange(5), EIGHT, budget) for _ in range(2)]
    assert [data.cached for data in sets] == [True, False]


def test_pickled_set_is_small_and_gives_the_same_images(tmp_path: Path) -> None:
    for stream in (
        build("images", path=folder(tmp_path / "d"), tasks=1),
        build("parquet", path=tables(tmp_path), tasks=1),
    ):
        data = stream.tasks[0].train
        images = reds(data)
        text = pickle.dumps(data)
        assert len(text) < 8000
        assert reds(pickle.loads(text)) == images


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a machine of one core
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_reads_the_same_with_and_without_workers(tmp_path: Path, workers: int) -> None:
    data = build("parquet", path=tables(tmp_path), tasks=1).tasks[0].train
    loader = DataLoader(data, batch_size=8, num_workers=workers, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    loaded = [value for batch in loader for value in batch["image"][:, 0, 4, 4].tolist()]
    assert loaded == list(range(20))


def test_position_outside_of_the_set_is_refused(tmp_path: Path) -> None:
    data = build("images", path=folder(tmp_path / "d"), tasks=1).tasks[0].train
    for position in (-1, len(data)):
        with pytest.raises(IndexError):
            data.__getitems__([position])


@pytest.mark.parametrize("form", ["pillow", "array", "path", "tensor", "tensors"])
def test_images_from_python_come_out_as_they_went_in(form: str, tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(3)]
    arrays = [np.asarray(p) for p in pictures]
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    for i, p in enumerate(pictures):
        p.save(tmp_path / f"{i}.png")
    given: Any = {
        "pillow": pictures,
        "array": arrays,
        "path": [tmp_path / f"{i}.png" for i in range(3)],
        "tensor": stacked,
        "tensors": list(stacked),
    }[form]
    data = ImageSet.of(given, [4, 5, 6], EIGHT)
    assert reds(data) == [0, 1, 2]
    assert data.labels.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], r"torch\.float32 tensor of shape \(2, 3, 8, 8\), expected torch\.uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0, 1], r"expected torch\.uint8 \(n, 3, H, W\)"),
        ([picture(0), np.zeros((8, 8, 3))], [0, 1], r"row 1: got a float64 array"),
        ([picture(0), 7], [0, 1], "row 1: got a int"),
        ([picture(0)], [0, 1], "got 2 for 1 images"),
        ([picture(0)], [0.5], r"labels, row 0: got 0\.5, expected an integer"),
        ([picture(0)], ["cat"], "labels, row 0: got 'cat'"),
        ([picture(0)], torch.tensor([0.5]), r"labels: got torch\.float32"),
    ],
)
def test_images_or_labels_of_another_form_are_refused_by_row(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet.of(images, labels, EIGHT)


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_damaged_image_is_named_and_those_of_its_set_are_counted(form: str, tmp_path: Path) -> None:
    root = split_folder(tmp_path / "d")
    for i in (1, 3):
        (root / "train" / "fig" / f"{i}.png").write_bytes(b"no image")
    cells = [{"bytes": png(i) if i not in (5, 7) else b"no image", "path": None} for i in range(8)]
    for name in ("train-0", "train-1", "test"):
        pq.write_table(pa.table({"image": cells, "label": [0, 1] * 4}), tmp_path / f"{name}.parquet")
    which, path = {"folder": ("images", root), "parquet": ("parquet", tmp_path)}[form]
    data = build(which, path=path, tasks=1, order="natural").tasks[0].train
    said = {
        "folder": r"of 20 images 2 are unreadable: cannot read image .*fig.3\.png: not an image .*; replace or remove",
        "parquet": r"of 16 images 4 are unreadable: cannot read image .*train-1\.parquet, row 5: ",
    }[form]
    with pytest.raises(UnreadableImage, match=said):
        data.__getitems__([{"folder": 8, "parquet": 13}[form]])


def test_empty_cell_is_an_unreadable_image_with_its_row(tmp_path: Path) -> None:
    images = [None, *({"bytes": png(i), "path": None} for i in range(7))]
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), tmp_path / "a.parquet")
    stream = build("parquet", path=tmp_path / "a.parquet", tasks=1, skip_bad=True)
    assert stream.notes["skipped"] == [f"{tmp_path / 'a.parquet'}, row 0"]


def test_skip_bad_leaves_out_damaged_images_and_lists_them(tmp_path: Path) -> None:
    root = split_folder(tmp_path / "d")
    (root / "train" / "fig" / "3.png").write_bytes(b"no image")
    (root / "test" / "kiwi" / "0.png").write_bytes(png(1)[:40])
    stream = build("images", path=root, tasks=2, order="natural", skip_bad=True)
    assert stream.tasks[0].train.skipped == (str(root / "train/fig/3.png"),)  # type: ignore[attr-defined]
    assert stream.notes["skipped"] == [str(root / "train/fig/3.png"), str(root / "test/kiwi/0.png")]
    assert reds(stream.tasks[0].train) == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert stream.notes["train_images"] == [9, 10]
    assert stream.notes["test_images"] == [4, 3]


def test_skip_bad_refuses_a_class_of_which_nothing_is_left(tmp_path: Path) -> None:
    root = split_folder(tmp_path / "d")
    for file in (root / "train" / "fig").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="class 'fig' has no readable train image"):
        build("images", path=root, tasks=2, skip_bad=True)


# Folders


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_folders_are_used_as_they_are(tmp_path: Path, test: str) -> None:
    stream = build("images", path=split_folder(tmp_path / "d", test=test), tasks=2, order="natural")
    assert [task.names for task in stream] == [("apple", "fig"), ("kiwi", "plum")]
    assert [task.classes for task in stream] == [(0, 1), (2, 3)]
    assert [task.total for task in stream] == [2, 2]
    assert reds(stream.tasks[1].train) == list(range(10, 20))
    assert reds(stream.tasks[1].test) == [104, 105, 106, 107]
    assert stream.notes["split"]["kind"] == "given"


@pytest.mark.parametrize("which", ["images", "parquet"])
def test_without_test_part_the_same_fifth_of_each_class_is_tested_for_every_seed_and_place(
    which: str, tmp_path: Path
) -> None:
    tested, splits = [], []
    for seed in range(3):
        root = tmp_path / f"d{seed}"
        path = folder(root, count=10) if which == "images" else table(root / "all.parquet", [i % 4 for i in range(40)])
        stream = build(which, seed=seed, path=path, tasks=2)
        for task in stream:
            assert torch.bincount(task.train.labels)[list(task.classes)].tolist() == [8, 8]
            assert torch.bincount(task.test.labels)[list(task.classes)].tolist() == [2, 2]
            assert not set(reds(task.train)) & set(reds(task.test))
        tested.append(sorted(value for task in stream for value in reds(task.test)))
        splits.append(stream.notes["split"])
    assert tested[0] == tested[1] == tested[2]
    assert splits[0] == splits[1] == splits[2]


def test_another_file_changes_the_recorded_split(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    before = build("images", path=root, tasks=2).notes["split"]
    (root / "fig" / "0.png").rename(root / "fig" / "x.png")
    assert build("images", path=root, tasks=2).notes["split"] != before


@pytest.mark.parametrize(("level", "parts"), [(0, ("sea/cat", "sea/dog", "air/cat", "air/dog")), (1, None)])
def test_domain_is_read_from_its_level_of_folders(tmp_path: Path, level: int, parts: Any) -> None:
    for part in parts or ("cat/sea", "dog/sea", "cat/air", "dog/air"):
        folder(tmp_path, (part,))
    stream = build("images", path=tmp_path, scenario="domain", domain=level, order="natural")
    assert [task.name for task in stream] == ["air", "sea"]
    assert [task.classes for task in stream] == [(0, 1), (0, 1)]
    assert stream.tasks[0].names == stream.tasks[1].names == ("cat", "dog")
    assert [len(task.train) for task in stream] == [8, 8]
    assert stream.candidates(stream.tasks[0], 0) == (0, 1)


def test_classes_called_train_and_test_are_classes(tmp_path: Path) -> None:
    stream = build("images", path=folder(tmp_path / "d", ("car", "train", "test")), tasks=3)
    assert sorted(stream.notes["classes"]) == ["car", "test", "train"]


def test_hidden_files_are_left_aside_and_files_that_are_no_images_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / ".cache").mkdir()
    (root / "fig" / "notes.txt").write_text("hello")
    (root / "fig" / "._0.png").write_bytes(b"")
    stream = build("images", path=root, tasks=2)
    assert sum(stream.notes["train_images"]) == 16
    assert stream.notes["left_out"] == {".txt": 1}


def test_missing_folder_is_named_with_a_near_one(tmp_path: Path) -> None:
    folder(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"fotos' does not exist; did you mean 'photos'\?"):
        build("images", path=tmp_path / "fotos")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "is empty; expected a folder for each class"),
        (lambda root: folder(root, ("a",)) and (root / "a").rename(root.parent / "d2"), "is empty"),
        (lambda root: root.mkdir() or picture(0).save(root / "a.png"), r"holds 'a\.png' but no folder"),
        (lambda root: (root / "cat").mkdir(parents=True), "has class folders .* but no image"),
        (lambda root: folder(root) and (root / "gnu").mkdir(), "class 'gnu' has no train image"),
        (lambda root: split_folder(root) and folder(root / "test", ("gnu",)), r"class 'gnu' is in test \(5 images\)"),
        (lambda root: folder(root / "test"), "holds 'test' but no 'train'"),
        (lambda root: folder(root / "train") and folder(root / "tset"), "holds 'train' beside tset"),
        (lambda root: root.write_text("x"), "is a file; give a folder of class folders"),
    ],
)
def test_folder_that_is_no_data_set_is_explained(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "d")
    for read in (
        partial(build, "images", path=tmp_path / "d", tasks=2),
        lambda: folder_task(tmp_path / "d", EIGHT, {}, 0),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            read()
        assert "\n" not in str(raised.value)


def test_one_class_is_a_task_but_no_stream(tmp_path: Path) -> None:
    assert folder_task(folder(tmp_path / "d", ("fig",)), EIGHT, {}, 0).names == ("fig",)
    with pytest.raises(ValueError, match="only one class, 'fig'; a stream needs at least 2"):
        build("images", path=tmp_path / "d", tasks=2)


# The same image in train and test


def linked(root: Path) -> str:
    split_folder(root)
    for name in FRUIT[:2]:
        (root / "test" / name / "0.png").unlink()
        (root / "test" / name / "0.png").symlink_to(root / "train" / name / "1.png")
    return "images"


def listed_twice(root: Path) -> str:
    folder(root, FRUIT[:2])
    files = [f"{name}/{i}.png" for i in range(5) for name in FRUIT[:2]]
    for part, rows in (("train", files[:8]), ("test", files[6:])):
        (root / f"{part}.csv").write_text("\n".join(["image,label", *(f"{row},{row[0]}" for row in rows)]))
    return "csv"


def stored_twice(root: Path) -> str:
    table(root / "train.parquet", [0, 1] * 4)
    cells = [{"bytes": png(v), "path": f"{i}.png"} for i, v in ((6, 6), (7, 7), (0, 99), (20, 1))]
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 2}), root / "test.parquet")
    return "parquet"


@pytest.mark.parametrize(("make", "tested"), [(linked, 8), (listed_twice, 4), (stored_twice, 4)])
def test_images_that_are_learnt_and_tested_are_told_with_their_number(make: Any, tested: int, tmp_path: Path) -> None:
    (told,) = build(make(tmp_path / "d"), path=tmp_path / "d", tasks=2).notes["remarks"]
    assert told.startswith(f"2 of {tested} test images are train images too")
    if make is linked:
        said: list[str] = []
        folder_task(tmp_path / "d", EIGHT, {}, 0, tell=said.append)
        assert said == [told]
    assert "remarks" not in build("images", path=split_folder(tmp_path / "other"), tasks=2).notes


# Parquet


def test_parquet_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", [0, 1, 0])
    table(tmp_path / "train-1.parquet", [1, 0, 1])
    table(tmp_path / "test.parquet", [0, 1])
    stream = build("parquet", path=tmp_path, tasks=2, order="natural")
    assert reds(stream.tasks[0].train) == [0, 2, 1]
    assert reds(stream.tasks[1].train) == [1, 0, 2]
    assert stream.tasks[0].train.where(2) == f"{tmp_path / 'train-1.parquet'}, row 1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["bytes", "path", "struct path", "large"])
def test_image_column_may_hold_bytes_or_paths(tmp_path: Path, form: str) -> None:
    for i in range(8):
        picture(i).save(tmp_path / f"{i}.png")
    images: Any = {
        "bytes": [png(i) for i in range(8)],
        "path": [f"{i}.png" for i in range(8)],
        "struct path": [{"bytes": None, "path": f"{i}.png"} for i in range(8)],
        "large": pa.array([png(i) for i in range(8)], pa.large_binary()),
    }[form]
    for name in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), tmp_path / f"{name}.parquet")
    stream = build("parquet", path=tmp_path, tasks=1, order="natural")
    assert reds(stream.tasks[0].train) == list(range(8))


ABCD = list("abcd")


@pytest.mark.parametrize(
    ("columns", "beside", "known", "expected"),
    [
        ({"label": ["kiwi", "fig", "plum", "apple"]}, None, None, list(FRUIT)),
        ({"class_name": list(FRUIT)}, None, None, list(FRUIT)),
        ({"label_name": list(FRUIT)}, None, None, list(FRUIT)),
        ({"title": list(FRUIT), "class_name": ABCD}, None, "title", list(FRUIT)),
        ({}, list(FRUIT), None, list(FRUIT)),
        ({}, {"label": list(FRUIT)}, None, list(FRUIT)),
        ({}, {"lab": list(FRUIT), "other": ["x"]}, None, list(FRUIT)),
        ({}, {"info": {"features": {"label": {"names": list(FRUIT), "_type": "ClassLabel"}}}}, None, list(FRUIT)),
        ({}, None, None, ["0", "1", "2", "3"]),
        ({"class_name": ["crane", "fig", "crane", "plum"]}, None, None, ["crane (0)", "fig", "crane (2)", "plum"]),
    ],
)
def test_classes_are_called_as_label_column_classes_json_or_schema_say(
    columns: dict[str, list[str]], beside: Any, known: str | None, expected: list[str], tmp_path: Path
) -> None:
    for file in tables(tmp_path, **columns).iterdir():
        if isinstance(beside, dict) and "info" in beside:  # as the `datasets` library writes it
            content = pq.read_table(file).replace_schema_metadata({"huggingface": json.dumps(beside)})
            pq.write_table(content, file)
    (tmp_path / "classes.json").write_text(json.dumps(beside)) if beside and "info" not in beside else None
    named = {"names": known} if known else {}
    assert build("parquet", path=tmp_path, tasks=2, order="natural", **named).notes["classes"] == expected


def test_domain_column_makes_one_task_a_domain(tmp_path: Path) -> None:
    root = tables(tmp_path, place=[0, 0, 0, 0, 1, 1, 1, 1], place_name=["sea"] * 4 + ["air"] * 4)
    stream = build("parquet", path=root, scenario="domain", domain="place", order=["air", "sea"])
    assert [task.name for task in stream] == ["air", "sea"]
    assert [task.classes for task in stream] == [(0, 1, 2, 3)] * 2
    assert reds(stream.tasks[0].train) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_files_beyond_memory_are_read_through_a_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = Parquet([tables(tmp_path / "d") / "train.parquet"], "image", memory=10)
    data = ImageSet(source, torch.arange(20), torch.arange(20), EIGHT)
    assert reds(data) == list(range(20))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {"label": "lable"}, r"no column 'lable' \(label=\); did you mean 'label'\?"),
        ({}, {"image": "img"}, r"no column 'img' \(image=\); did you mean 'image'\?"),
        ({}, {"names": "title"}, "no column 'title'"),
        ({"title": ["x", "y", "x", "x", "z"]}, {"names": "title"}, "does not give each label one name"),
        ({"score": [0.5]}, {"label": "score"}, r"train\.parquet: label column 'score' holds double; expected"),
        ({"kind": [1, 2, None]}, {"label": "kind"}, r"train\.parquet, row 2: label column 'kind' is empty"),
        ({}, {"scenario": "domain"}, r"needs domain=\.\.\."),
        ({"place": [0, 1]}, {"scenario": "domain", "domain": "plaze"}, r"no column 'plaze' .*did you mean 'place'"),
        ({"place": [0]}, {"scenario": "domain", "domain": "place"}, "only one domain, '0'"),
        ({"place": [0, 1]}, {"domain": "place"}, "no effect with scenario='class'"),
        ({"place": [0, 1]}, {"scenario": "domain", "domain": "place", "tasks": 3}, "tasks=3: .* here 2"),
        ({}, {"tasks": 5}, "tasks=5: there are only 4 classes; write tasks=4 or fewer"),
        ({}, {}, r"tasks=10 \(the default\): there are only 4 classes"),
        ({}, {"increments": (2, 1)}, r"increments=\(2, 1\): they sum to 3, but there are 4 classes"),
        ({}, {"increments": (2, 2), "tasks": 3}, "tasks=3, but increments"),
        ({}, {"order": "natual"}, "did you mean 'natural'"),
        ({}, {"order": ["0", "1", "2", "7"]}, "no class '7'"),
        ({}, {"order": [0, 1, 2, 4]}, "4 is not a class; there are 0-3"),
        ({}, {"order": [0, 1, 2, 2]}, "class '2' twice"),
        ({}, {"order": [0, 1, 2]}, "leaves out the class '3'"),
        ({}, {"scenario": "clas"}, "did you mean 'class'"),
        ({}, {"colour": 1}, "no option 'colour'"),
    ],
)
def test_wrong_option_is_explained_in_one_line(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    refused(message, "parquet", path=tables(tmp_path / "d", **columns), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "holds no .parquet file"),
        (lambda d: (d / "train.parquet").write_text("x"), "is not a parquet file"),
        (lambda d: (table(d / "train.parquet", [0, 1]), table(d / "test.parquet", [0, 2])), "class '2' is in test"),
        (lambda d: (table(d / "train.parquet", [0, 1]), table(d / "test.parquet", ["0"])), "integers in one part"),
        (lambda d: table(d / "a.parquet", [3, 3, 3]), "only one class, '3'"),
        (lambda d: (table(d / "train.parquet", [0, 1]), table(d / "test.parquet", [1])), "has no test image"),
        (lambda d: table(d / "a.parquet", pa.array([], pa.int64())), "no rows"),
    ],
)
def test_parquet_folder_that_is_no_data_set_is_explained(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    refused(message, "parquet", path=tmp_path, tasks=2, order="natural")


# The datasets library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_hub_reads_a_folder_as_parquet_does_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tables(tmp_path / "d", class_name=list(FRUIT))
    ours, theirs = (
        build("parquet", path=root, tasks=2, order="natural"),
        build("hub", name=root, tasks=2, order="natural"),
    )
    assert ours.tasks == theirs.tasks
    assert [reds(t.train) for t in ours] == [reds(t.train) for t in theirs]
    assert [reds(t.test) for t in ours] == [reds(t.test) for t in theirs]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("cache")
def test_hub_without_test_part_holds_out_a_fifth_and_a_missing_part_is_named(tmp_path: Path) -> None:
    stream = build("hub", name=tables(tmp_path / "d"), test=None, tasks=2)
    assert (stream.notes["train_images"], stream.notes["test_images"]) == ([8, 8], [2, 2])
    refused(r"no part 'tests'; did you mean 'test'\?; its parts: train, test", "hub", name=tmp_path / "d", test="tests")


@pytest.mark.usefixtures("cache")
def test_hub_name_that_does_not_exist_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("cannot load data set 'nobody/nothing'", "hub", name="nobody/nothing")


# Data sets by name


def test_cub_is_read_from_its_original_folder(tmp_path: Path) -> None:
    files = [f"{i:03}.Bird_{i}/{k}.png" for i in (1, 2) for k in range(3)]
    for i, file in enumerate(files):
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "images" / file)
    (tmp_path / "images.txt").write_text("".join(f"{i + 1} {file}\n" for i, file in enumerate(files)))
    (tmp_path / "train_test_split.txt").write_text("".join(f"{i + 1} {int(i % 3 > 0)}\n" for i in range(6)))
    stream = build("cub200", path=tmp_path, tasks=2, order="natural")
    assert stream.notes["classes"] == ["Bird 1", "Bird 2"]
    assert [reds(t.train) for t in stream] == [[1, 2], [4, 5]]
    assert [reds(t.test) for t in stream] == [[0], [3]]


@pytest.fixture
def domainnet(tmp_path: Path) -> Path:
    lines: dict[str, list[str]] = {}
    for d, domain in enumerate(("sketch", "clipart", "real")):
        for c, name in enumerate(FRUIT):
            for k in range(3):
                file = f"{domain}/{name}/{k}.png"
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                picture(d * 12 + c * 3 + k).save(tmp_path / file)
                lines.setdefault(f"{domain}_{'train' if k else 'test'}.txt", []).append(f"{file} {c}")
    for name, each in lines.items():
        (tmp_path / name).write_text("\n".join(each) + "\n")
    return tmp_path


def test_domainnet_is_a_task_for_each_domain_or_mixes_them_in_five_tasks_of_classes(domainnet: Path) -> None:
    stream = build("domainnet", path=domainnet, protocol="domain", order="natural")
    assert stream.scenario == "domain"
    assert [task.name for task in stream] == ["clipart", "real", "sketch"]
    assert {task.names for task in stream} == {FRUIT}
    assert reds(stream.tasks[2].test) == [0, 3, 6, 9]
    stream = build("domainnet", path=domainnet, tasks=2, order="natural")
    assert stream.scenario == "class"
    assert [task.names for task in stream] == [FRUIT[:2], FRUIT[2:]]
    assert sorted(reds(stream.tasks[0].test)) == [0, 3, 12, 15, 24, 27]
    refused(r"tasks=5 \(the default\): there are only 4 classes", "domainnet", path=domainnet)


def test_cifar_reads_a_local_folder_in_either_naming_of_columns(tmp_path: Path) -> None:
    content = {"img": [png(i) for i in range(8)], "fine_label": [0, 1] * 4}
    for name in ("train", "test"):
        pq.write_table(pa.table(content), tmp_path / f"{name}.parquet")
    assert build("cifar100", path=tmp_path, tasks=2).notes["train_images"] == [4, 4]
    assert build("cifar100", path=tables(tmp_path / "e"), tasks=2).notes["train_images"] == [10, 10]


def test_imagenet_r_gets_a_split_and_has_no_domains(tmp_path: Path) -> None:
    stream = build("imagenet_r", path=folder(tmp_path / "d", count=10), tasks=2)
    assert stream.notes["train_images"] == [16, 16]
    refused("imagenet_r has no domains", "imagenet_r", path=tmp_path / "d", scenario="domain")


def test_easy_vqa_has_24_classes_whose_colour_is_in_the_image() -> None:
    pytest.importorskip("easy_vqa")
    stream = build("easy_vqa", preprocess=Preprocess(64, 64), tasks=24, per_class=5)
    shown = {}
    for task in stream:
        image = task.train.__getitems__(range(len(task.train)))["image"]
        # The shape's pixels are those unlike the background, which is nearly white.
        shape = [each[:, each.float().mean(0) < 200].float().median(1).values for each in image]
        shown.setdefault(task.names[0].split()[0], []).extend(shape)
    assert len(shown) == 8
    assert len(stream.notes["classes"]) == 24
    for colour in ("red", "green", "blue"):
        for pixel in shown[colour]:
            assert ("red", "green", "blue")[int(pixel.argmax())] == colour


def test_missing_demo_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    refused(r"pip install 'perdure\[demo\]'", "easy_vqa")


# Synthetic


def test_synthetic_pictures_depend_on_the_seed_only_and_take_the_size_the_backbone_wants() -> None:
    first, again, other = (build("synthetic", seed=s, preprocess=Preprocess(24, 24)) for s in (0, 0, 1))
    assert reds(first.tasks[1].train) == reds(again.tasks[1].train)
    assert reds(first.tasks[1].train) != reds(other.tasks[1].train)
    assert reds(first.tasks[1].train) != reds(first.tasks[1].test)
    assert first.tasks[0].train.__getitems__([0])["image"].shape == (1, 3, 24, 24)


def test_synthetic_classes_can_be_told_apart() -> None:
    stream = build("synthetic", preprocess=Preprocess(16, 16))
    for task in stream:
        train, test = (d.__getitems__(range(len(d))) for d in (task.train, task.test))
        means = torch.stack([train["image"][train["label"] == c].float().mean(0).flatten() for c in task.classes])
        nearest = torch.cdist(test["image"].float().flatten(1), means).argmin(1) + task.classes[0]
        assert torch.equal(nearest, test["label"])


def test_synthetic_domains_show_the_same_classes_differently() -> None:
    stream = build("synthetic", preprocess=Preprocess(16, 16), scenario="domain", noise=0.0)
    assert [task.classes for task in stream] == [(0, 1, 2)] * 3
    assert reds(stream.tasks[0].train)[:1] != reds(stream.tasks[1].train)[:1]


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"noise": -1.0}, {"tasks": 1, "classes_per_task": 1}, {"size": 0}])
def test_impossible_synthetic_stream_is_refused_by_name(wrong: dict[str, Any]) -> None:
    refused(list(wrong)[-1], "synthetic", **wrong)


# One more task


def test_one_more_task_keeps_the_ids_of_known_classes(tmp_path: Path) -> None:
    task = folder_task(folder(tmp_path / "june", ("fig", "lime", "date")), EIGHT, {"apple": 0, "fig": 4}, 3)
    assert task.index == 3
    assert task.name == "june"
    assert task.total is None
    assert dict(zip(task.names, task.classes, strict=True)) == {"date": 5, "fig": 4, "lime": 6}
    assert set(task.train.labels.tolist()) == {4, 5, 6}


def test_one_more_task_holds_out_some_of_each_class_the_same_ones_each_time(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", count=20)
    first, again = (folder_task(root, EIGHT, {}, 0) for _ in range(2))
    assert torch.bincount(first.test.labels).tolist() == [3, 3, 3, 3]
    assert reds(first.test) == reds(again.test)
    assert reds(folder_task(root, EIGHT, {}, 0, seed=1).test) != reds(first.test)
    assert sorted(reds(first.train) + reds(first.test)) == list(range(80))


def test_one_more_task_of_few_images_learns_them_all_and_a_test_folder_is_tested(tmp_path: Path) -> None:
    few = folder_task(folder(tmp_path / "few", count=4), EIGHT, {}, 0)
    assert len(few.train) == 16
    assert isinstance(few.test, Nothing)
    divided = folder_task(split_folder(tmp_path / "divided"), EIGHT, {}, 0)
    assert (len(divided.train), len(divided.test)) == (20, 8)


def test_one_more_task_lists_skipped_images(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "fig" / "0.png").write_bytes(b"no image")
    task = folder_task(root, EIGHT, {}, 0, skip_bad=True)
    assert task.train.skipped == (str(root / "fig/0.png"),)  # type: ignore[attr-defined]
    assert len(task.train) + len(task.test) == 19


def test_task_from_python_numbers_new_names_after_the_known_ones_and_integers_by_value() -> None:
    task = given_task([picture(i) for i in range(3)], ["fig", "date", "fig"], EIGHT, {"date": 7}, 2)
    assert dict(zip(task.names, task.classes, strict=True)) == {"date": 7, "fig": 8}
    assert task.train.labels.tolist() == [8, 7, 8]
    task = given_task([picture(i) for i in range(3)], [10, 2, 10], EIGHT, {}, 0)
    assert task.names == ("2", "10")
    assert task.train.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [[0.5, 1, 2], ["a", "", "b"], ["a", 1, "b"], [True, False, True]])
def test_task_from_python_refuses_labels_that_are_no_names(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="labels"):
        given_task([picture(i) for i in range(3)], labels, EIGHT, {}, 0)


# The mini-language


def test_every_stream_lists_its_options_for_the_mini_language() -> None:
    import inspect

    for name, factory in STREAMS.items():
        parameters = inspect.signature(factory).parameters
        assert "options" not in parameters, name
        assert {"tasks", "scenario", "only", "order", "question", "shots"} & set(parameters), name
        assert factory.__doc__, name


def test_stream_is_built_from_text(tmp_path: Path) -> None:
    text = f"parquet(path={str(tables(tmp_path))!r}, tasks=2, order='natural')"
    assert len(build_stream(text, EIGHT, 0)) == 2
    assert len(build_stream(text, EIGHT, 0, tasks=4)) == 4


def test_unknown_stream_gets_a_near_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'cifar100'"):
        build_stream("cifar10()", EIGHT, 0)


def test_files_that_do_not_even_begin_like_images_are_left_out_without_an_attempt_to_decode_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, opened, real = folder(tmp_path / "d", FRUIT[:2]), [], Image.open
    for i in range(20):
        (root / "fig" / f"bad{i}.jpg").touch()
    (root / "fig" / "torn.png").write_bytes(next(root.rglob("*.png")).read_bytes()[:40])

    def noted(source: Any, *rest: Any, **how: Any) -> Image.Image:
        opened.append(str(source))
        return real(source, *rest, **how)

    monkeypatch.setattr(Image, "open", noted)
    task = folder_task(root, EIGHT, {}, 0, skip_bad=True)
    assert (len(task.train) + len(task.test), len(task.train.skipped)) == (10, 21)
    assert [each for each in opened if "bad" in each] == []
    assert any("torn" in each for each in opened)
