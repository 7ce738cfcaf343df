"""Streams of images with captions: what is read, how it is divided, and what is refused."""

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from perdure.backbones.preprocess import Preprocess
from perdure.backbones.tiny import tiny
from perdure.options.spec import Spec
from perdure.streams import Captioned, ImageSet, build_stream, captioned_task
from perdure.streams.karpathy import _read_hub
from perdure.streams.options import CaptionOptions
from perdure.streams.topics import clusters
from perdure.types import Stream

EIGHT = Preprocess(8, 8)
EMBED = "tiny(dim=8, size=8)"


def png(value: int) -> bytes:
    """A grey picture; the reading of a batch gives `value` back."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(out, "png")
    return out.getvalue()


def table(path: Path, count: int, first: int = 0, step: int = 1, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count * step, step)
    given = {"captions": [[f"number {i}", f"it is {i}"] for i in numbers]} | columns
    cells = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers]} | given
    pq.write_table(pa.table(cells), path)
    return path


def tables(root: Path, train: int = 20, test: int = 10, **more: Any) -> Path:
    table(root / "train-0.parquet", train, **{k: v[:train] for k, v in more.items()})
    table(root / "test-0.parquet", test, 100, **{k: v[train:] for k, v in more.items()})
    return root


def shades(root: Path) -> Path:
    """Dark to bright pictures: train 0, 20, ..., 220 and test 7, 47, ..., 207."""
    table(root / "train-0.parquet", 12, 0, 20)
    table(root / "test-0.parquet", 6, 7, 40)
    return root


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def pictures(root: Path, count: int, first: int = 0) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (root / f"{i}.png").write_bytes(png(i))
    return [f"{i}.png" for i in range(first, first + count)]


def build(which: str, /, seed: int = 0, preprocess: Preprocess = EIGHT, **options: Any) -> Stream:
    return build_stream(
        Spec(which, tuple((k, str(v) if isinstance(v, Path) else v) for k, v in options.items())), preprocess, seed
    )


def whole(data: Any) -> dict[str, torch.Tensor]:
    return dict(data.__getitems__(range(len(data))))


def values(data: Any) -> list[int]:
    return whole(data)["image"][:, 0, 0, 0].tolist()


def texts(data: Any) -> list[list[str]]:
    return [list(each) for each in whole(data)["text"]]


def refused(which: str, /, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(which, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_image_comes_with_its_own_captions(tmp_path: Path) -> None:
    stream = build("captions", path=tables(tmp_path), by="random", tasks=4)
    assert len(stream) == 4
    for task in stream:
        for data in (task.train, task.test):
            assert texts(data) == [[f"number {i}", f"it is {i}"] for i in values(data)]
            assert set(whole(data)["label"].tolist()) == set(task.classes)


def test_images_have_as_many_texts_as_were_written(tmp_path: Path) -> None:
    long = [["a"], ["b", "ü" * 9], *([["c"]] * 4)]
    stream = build("captions", path=tables(tmp_path, 4, 2, captions=long), by="natural", tasks=2)
    assert texts(stream.tasks[0].train) + texts(stream.tasks[1].train) in (long[:4], long[2:4] + long[:2])


def test_no_image_of_train_is_one_of_test_and_pairs_are_identities(tmp_path: Path) -> None:
    stream = build("captions", path=tables(tmp_path), by="random", tasks=2)
    learnt = [p for task in stream for p in task.train.pairs.tolist()]
    tested = [p for task in stream for p in task.test.pairs.tolist()]
    assert len(set(learnt)) == 20
    assert len(set(tested)) == 10
    assert not set(learnt) & set(tested)


def test_the_first_captions_are_kept_each_text_once_with_a_count_of_the_others(tmp_path: Path) -> None:
    given = [[" text 0 "], ["a", "b ", "a"], ["a", "a", "b", "c"], ["d"], ["e"], ["f", "f"]]
    stream = build("captions", path=tables(tmp_path, 4, 2, captions=given), by="natural", tasks=1, texts=2)
    (task,) = stream
    assert texts(task.train) == [["text 0"], ["a", "b"], ["a", "b"], ["d"]]
    assert stream.notes["captions"] == {"train": [6], "test": [2]}
    assert stream.notes["remarks"] == ["3 captions stand twice at the same image: each text of an image counts once"]
    said: list[str] = []
    captioned_task(tmp_path, EIGHT, {}, 0, tell=said.append)
    assert said == stream.notes["remarks"]


def test_a_caption_may_be_one_text(tmp_path: Path) -> None:
    path = tables(tmp_path, 4, 2, captions=[f" text {i} " for i in range(6)])
    assert texts(build("captions", path=path, by="natural", tasks=1).tasks[0].train)[1] == ["text 1"]


def test_subset_and_pickled_copy_keep_captions_beside_their_images(tmp_path: Path) -> None:
    data = build("captions", path=tables(tmp_path), by="natural", tasks=1).tasks[0].train
    assert isinstance(data, Captioned)
    for each in (data.subset(torch.tensor([5, 2])), pickle.loads(pickle.dumps(data)).subset(torch.tensor([5, 2]))):
        assert values(each) == [5, 2]
        assert texts(each) == [["number 5", "it is 5"], ["number 2", "it is 2"]]
        assert each.pairs.tolist() == [5, 2]


def test_seed_orders_the_topics_and_changes_nothing_else(tmp_path: Path) -> None:
    path = tables(tmp_path)
    streams = [build("captions", seed, path=path, by="random", tasks=5) for seed in range(4)]
    assert len({tuple(t.name for t in stream) for stream in streams}) > 1
    assert len({str(sorted((t.name, values(t.train)) for t in stream)) for stream in streams}) == 1
    for stream in streams:
        assert [task.classes for task in stream] == [(t,) for t in range(5)]
    natural = build("captions", 3, path=path, by="random", tasks=5, order="natural")
    assert [task.names for task in natural] == [(f"random {i}",) for i in range(5)]


def test_random_topics_are_even_and_natural_ones_follow_the_rows(tmp_path: Path) -> None:
    path = tables(tmp_path)
    mixed = build("captions", path=path, by="random", tasks=3, order="natural")
    assert mixed.notes["train_images"] == [7, 7, 6]
    assert values(mixed.tasks[0].train) != list(range(7))
    rows = build("captions", path=path, by="natural", tasks=3, order="natural")
    assert [values(task.train) for task in rows] == [[*range(7)], [*range(7, 14)], [*range(14, 20)]]
    assert values(rows.tasks[2].test) == [107, 108, 109]


def test_column_makes_one_task_a_value(tmp_path: Path) -> None:
    path = tables(tmp_path, scene=["sea", "city"] * 10 + ["sea", "city"] * 5)
    stream = build("captions", path=path, by="scene", order=["sea", "city"])
    assert [task.names for task in stream] == [("sea",), ("city",)]
    assert values(stream.tasks[0].train) == [*range(0, 20, 2)]
    assert "tasks=3" in refused("captions", path=path, by="scene", tasks=3)


def test_fewer_images_a_task_are_a_subset_of_more(tmp_path: Path) -> None:
    path = tables(tmp_path)
    chosen = []
    for size in (2, 4):
        stream = build("captions", path=path, by="random", tasks=3, per_task=size, test_per_task=1)
        assert stream.notes["train_images"] == [size] * 3
        assert stream.notes["test_images"] == [1] * 3
        chosen.append({v for task in stream for v in values(task.train)})
    assert chosen[0] < chosen[1]


def test_clusters_gather_images_that_look_alike_whatever_the_seed(tmp_path: Path) -> None:
    dark = [i % 2 == 0 for i in range(18)]
    for name, count, first in (("train", 12, 0), ("test", 6, 12)):
        shown = [3 * (i % 5) if dark[i] else 240 + i % 9 for i in range(first, first + count)]
        cells = {"image": [png(v) for v in shown], "captions": [f"number {i}" for i in range(first, first + count)]}
        pq.write_table(pa.table(cells), tmp_path / f"{name}.parquet")
    found = []
    for seed in range(3):
        stream = build("captions", seed, path=tmp_path, tasks=2, embed=EMBED)
        for task in stream:
            assert len({v < 128 for v in values(task.train) + values(task.test)}) == 1
        found.append({task.name: values(task.train) for task in stream})
        assert sum(stream.notes["train_images"]) == 12
        assert stream.notes["split"]["topics_sha256"]
    assert found[0] == found[1] == found[2]


def test_clusters_are_those_of_the_train_images_whatever_is_tested() -> None:
    def grey(*shown: int) -> ImageSet:
        pictures = torch.tensor(shown, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        return ImageSet.of(pictures.contiguous(), [0] * len(shown), EIGHT)

    model, train = tiny(dim=8, size=8), grey(0, 10, 20, 30, 200, 210, 220)
    for tested in ((5, 25, 205), (205, *(100 + i for i in range(60)))):
        nearest, others = clusters(model, train, grey(*tested), 2)
        assert nearest.tolist() == [0, 0, 0, 0, 1, 1, 1], "the larger cluster comes first"
        assert others[tested.index(205)] == 1
    assert clusters(model, train, grey(5, 25, 205), 2)[1].tolist() == [0, 0, 1]


def test_more_clusters_than_different_images_are_refused(tmp_path: Path) -> None:
    cells = {"image": [png(9)] * 10, "captions": ["one"] * 10}
    pq.write_table(pa.table(cells), tmp_path / "all.parquet")
    said = refused("captions", path=tmp_path / "all.parquet", tasks=2, embed=EMBED)
    assert said == "tasks=2: the model tells only 1 train images apart; use fewer tasks"


def test_cluster_features_are_those_of_the_embedding_models_own_preprocessing(tmp_path: Path) -> None:
    path = shades(tmp_path)
    small = build("captions", path=path, tasks=2, embed=EMBED)
    large = build("captions", path=path, tasks=2, embed=EMBED, preprocess=Preprocess(12, 12))
    assert small.notes["split"] == large.notes["split"]
    assert whole(large.tasks[0].train)["image"].shape[2:] == (12, 12)


def test_several_caption_columns_are_languages_of_the_same_images(tmp_path: Path) -> None:
    path = tables(tmp_path, 6, 3, en=[f"dog {i}" for i in range(9)], zh=[[f"狗 {i}", "只"] for i in range(9)])
    for seed in range(3):
        stream = build("captions", seed, path=path, captions=("en", "zh"))
        assert [task.names for task in stream] == [("en",), ("zh",)]
    assert stream.scenario == "domain"
    first, second = (task.train for task in stream)
    assert first.pairs.tolist() == second.pairs.tolist()
    assert values(first) == values(second)
    assert texts(first)[2] == ["dog 2"]
    assert texts(second)[2] == ["狗 2", "只"]
    assert len(whole(first)["text"]) == len(whole(second)["text"])
    assert [t.name for t in build("captions", path=path, captions=("zh", "en"), order=["en", "zh"])] == ["en", "zh"]


def test_languages_share_what_is_decoded(tmp_path: Path) -> None:
    rows = [{"image": name, "en": "dog", "zh": "狗"} for name in pictures(tmp_path, 6)]
    path = lines(tmp_path / "all.jsonl", rows)
    first, second = (task.train for task in build("captions", path=path, captions=("en", "zh")))
    shown = values(first)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert values(second) == shown


def test_json_lines_name_images_relative_to_their_file(tmp_path: Path) -> None:
    names = pictures(tmp_path / "shown", 6)
    rows = [{"image": f"shown/{name}", "captions": [name, "dieß\u2028と"]} for name in names]
    lines(tmp_path / "train.jsonl", rows[:4])
    lines(tmp_path / "val.jsonl", rows[4:])
    stream = build("captions", path=tmp_path, by="natural", tasks=1)
    assert values(stream.tasks[0].train) == [0, 1, 2, 3]
    assert values(stream.tasks[0].test) == [4, 5]
    assert texts(stream.tasks[0].test) == [["4.png", "dieß\u2028と"], ["5.png", "dieß\u2028と"]]


def test_rows_with_one_path_are_one_image(tmp_path: Path) -> None:
    names = pictures(tmp_path, 5)
    rows = [{"image": name, "captions": f"{name} {k}"} for k in range(3) for name in names]
    stream = build("captions", path=lines(tmp_path / "all.jsonl", rows), by="natural", tasks=1)
    (task,) = stream
    assert stream.notes["train_images"] == [4]
    assert len(task.test) == 1
    assert texts(task.train) == [[f"{v}.png {k}" for k in range(3)] for v in values(task.train)]


def test_encoded_images_are_one_only_where_path_and_bytes_agree(tmp_path: Path) -> None:
    image = [{"bytes": png(v), "path": "0.png"} for v in (1, 2, 1, 3, 4, 5)]
    captions = [f"row {i}" for i in range(6)]
    pq.write_table(pa.table({"image": image, "captions": captions}), tmp_path / "all.parquet")
    (task,) = build("captions", path=tmp_path / "all.parquet", by="natural", tasks=1)
    found = dict(zip(values(task.train) + values(task.test), texts(task.train) + texts(task.test), strict=True))
    assert found == {1: ["row 0", "row 2"], 2: ["row 1"], 3: ["row 3"], 4: ["row 4"], 5: ["row 5"]}


def test_image_in_train_and_test_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    row = {"image": "0.png", "captions": "a"}
    lines(tmp_path / "train.jsonl", [row])
    lines(tmp_path / "test.jsonl", [{"image": "1.png", "captions": "a"}, row])
    assert "image '0.png' is in train and in test" in refused("captions", path=tmp_path, by="random", tasks=1)


def test_skip_bad_leaves_out_damaged_images_in_every_way_of_dividing(tmp_path: Path) -> None:
    path = shades(tmp_path)
    cells = pq.read_table(path / "train-0.parquet").to_pydict()
    cells["image"][3] = {"bytes": b"broken", "path": "3.png"}
    pq.write_table(pa.table(cells | {"other": cells["captions"]}), path / "train-0.parquet")
    tested = pq.read_table(path / "test-0.parquet")
    pq.write_table(tested.append_column("other", tested["captions"]), path / "test-0.parquet")
    ways: tuple[dict[str, Any], ...] = (
        {"by": "random", "tasks": 2},
        {"tasks": 2, "embed": EMBED},
        {"tasks": 2, "embed": EMBED, "preprocess": Preprocess(12, 12)},
        {"captions": ("captions", "other")},
    )
    for way in ways:
        stream = build("captions", path=path, skip_bad=True, **way)
        (skipped,) = stream.notes["skipped"]
        assert skipped.endswith("train-0.parquet, row 3")
        for task in stream:
            assert 60 not in values(task.train)
            assert texts(task.train) == [[f"number {v}", f"it is {v}"] for v in values(task.train)]
    assert "row 3" in refused("captions", path=path, tasks=2, embed=EMBED)


def test_a_task_without_images_is_refused_with_a_way_out(tmp_path: Path) -> None:
    said = refused("captions", path=tables(tmp_path, 6, 1), by="natural", tasks=2)
    assert "task 'natural 1' has no test image; use fewer tasks" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "caption"}, "has no column 'caption' (captions=); did you mean 'captions'?"),
        ({"image": "img"}, "has no column 'img' (image=); did you mean 'image'?"),
        ({"by": "cluster"}, "by='cluster'"),
        ({"by": "cluster"}, "did you mean 'clusters'?"),
        ({"by": "captions"}, "expected a name or an integer"),
        ({"order": "neutral"}, "did you mean 'natural'?"),
        ({"by": "random", "order": ["random 1", "randm 0"], "tasks": 2}, "did you mean 'random 0'?"),
        ({"embed": "tinny()"}, "unknown backbone 'tinny'; did you mean 'tiny'?"),
        ({"captions": ("en", "zh"), "by": "random"}, "by='random' has no effect"),
        ({"captions": ("en", "zh"), "tasks": 2}, "tasks=2 has no effect"),
        ({"captions": ("en", "zh"), "embed": EMBED}, f"embed={EMBED!r} has no effect"),
        ({"by": "random", "embed": EMBED}, f"embed={EMBED!r} has no effect with by='random'"),
        ({"captions": ("en", "en")}, "captions=('en', 'en')"),
        ({"path": "nowhere"}, "does not exist"),
        ({"path": "."}, "holds no .parquet, .jsonl or .csv file"),
    ],
)
def test_wrong_option_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert message in refused("captions", **{"path": tables(tmp_path)} | options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it cannot be read as JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"image": "0.png"}', "line 2: column 'captions' is empty; expected a caption, or a list of captions"),
        ('{"image": "0.png", "captions": 3}', "line 2: column 'captions' is 3"),
        ('{"image": "0.png", "captions": [" "]}', "line 2: column 'captions' has no caption"),
        ('{"captions": "a"}', "line 2: column 'image' (image=) is None; expected the path of an image"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    pictures(tmp_path, 1)
    file = tmp_path / "all.jsonl"
    file.write_text('{"image": "0.png", "captions": "a"}\n' + line, encoding="utf-8")
    assert message in refused("captions", path=file, by="natural", tasks=1)


def karpathy(root: Path, name: str = "flickr30k", folder: str = "images", filepath: str | None = None) -> Path:
    """Numbers 0-7 are train, 8 and 9 restval, 10 and 11 val, 12 and 13 test."""
    pictures(root / folder / (filepath or ""), 14)
    split = ["train"] * 8 + ["restval"] * 2 + ["val"] * 2 + ["test"] * 2
    images = [
        {
            "filename": f"{i}.png",
            "split": split[i],
            "cocoid": 1000 + i,
            "sentences": [{"raw": f"{k} {i}. "} for k in range(6)],
        }
        | ({"filepath": filepath} if filepath else {})
        for i in range(14)
    ]
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": images}))
    return root


@pytest.mark.parametrize("folder", ["", "images", "flickr30k-images"])
def test_karpathys_file_gives_his_split(tmp_path: Path, folder: str) -> None:
    for path in (karpathy(tmp_path, folder=folder), tmp_path / "dataset_flickr30k.json"):
        (task,) = build("flickr30k", path=path, by="natural", tasks=1)
        assert values(task.train) == [*range(10)]
        assert values(task.test) == [12, 13]
        assert texts(task.test) == [[f"{k} {i}." for k in range(5)] for i in (12, 13)]


def test_table_with_a_split_column_is_divided_by_it(tmp_path: Path) -> None:
    split = ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    path = table(tmp_path / "test-0.parquet", 10, split=split, caption=[[f"number {i}"] for i in range(10)])
    cells = pq.read_table(path).drop_columns("captions")
    pq.write_table(cells, path)
    (task,) = build("flickr30k", path=tmp_path, by="natural", tasks=1)
    assert values(task.train) == [*range(5)]
    assert texts(task.test) == [["number 7"], ["number 8"], ["number 9"]]


def test_hub_data_set_is_divided_by_its_split_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    split = ["test", "train", "val", "train", "test", "train"]
    table(tmp_path / "data" / "test.parquet", 6, split=split)
    found = _read_hub(str(tmp_path / "data"), CaptionOptions())
    assert found.train.rows == [1, 3, 5]
    assert found.test is not None
    assert found.test.captions == [[["number 0", "it is 0"]], [["number 4", "it is 4"]]]
    assert found.test.source.read(4).getpixel((0, 0)) == (4, 4, 4)


def test_coco_goes_by_the_super_category_of_the_largest_object(tmp_path: Path) -> None:
    path = karpathy(tmp_path, "coco", "images", "val2014")
    kinds = [{"id": 1, "supercategory": "animal"}, {"id": 2, "supercategory": "food"}]
    objects = []
    for i in range(14):
        big, small = (1, 2) if i % 2 else (2, 1)
        objects.append({"image_id": 1000 + i, "category_id": small, "area": 5, "segmentation": [[1, 2]]})
        objects.append({"image_id": 1000 + i, "category_id": big, "area": 50.5})
        objects.append({"image_id": 1000 + i, "category_id": small, "area": 5000, "iscrowd": 1})
    (path / "annotations").mkdir()
    kept = [each for each in objects if each["image_id"] != 1003]
    facts = {"categories": kinds, "annotations": kept}
    (path / "annotations" / "instances_val2014.json").write_text(json.dumps(facts))
    stream = build("coco", path=path, by="supercategory", order="natural")
    assert [task.names for task in stream] == [("animal",), ("food",)]
    assert [values(task.train) for task in stream] == [[1, 5, 7, 9], [0, 2, 4, 6, 8]]
    assert [values(task.test) for task in stream] == [[13], [12]]
    assert stream.notes["images_without_objects"] == 1


def test_missing_parts_of_coco_are_named(tmp_path: Path) -> None:
    path = karpathy(tmp_path, "coco")
    assert "needs COCO's instances_*.json" in refused("coco", path=path, by="supercategory")
    assert "did you mean 'supercategory'?" in refused("coco", path=path, by="supercategories")
    for file in (path / "images").iterdir():
        file.unlink()
    assert "does not hold 0.png; put the images beside the JSON file" in refused("coco", path=path)
    (path / "dataset_coco.json").write_text('{"images": [{"filename": "x"}]}')
    assert "expected Karpathy's form" in refused("coco", path=path)


def test_invented_captions_name_what_is_shown() -> None:
    stream = build("captions_synthetic", captions=3)
    words = Counter(line for task in stream for data in (task.train, task.test) for line in texts(data)[0])
    assert stream.notes["captions"]["train"] == [36] * 3
    assert set(words.values()) == {2}, "the first test image shows the thing of the first train image"
    for task in stream:
        learnt, tested = (whole(data)["image"].float() for data in (task.train, task.test))
        assert (learnt[:6] - tested).square().mean() < (learnt[6:] - tested).square().mean() / 2
        assert not set(task.train.pairs.tolist()) & set(task.test.pairs.tolist())


def test_invented_languages_show_the_same_images() -> None:
    first, second, _ = build("captions_synthetic", scenario="domain")
    assert torch.equal(whole(first.train)["image"], whole(second.train)["image"])
    assert first.train.pairs.tolist() == second.train.pairs.tolist()
    assert first.train.texts != second.train.texts
    assert "test_per_task=13: expected at most per_task=12" in refused("captions_synthetic", test_per_task=13)
