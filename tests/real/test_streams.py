"""Streams of real data sets."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from perdure.backbones.preprocess import Preprocess
from perdure.streams import build_stream

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data sets are not there: {DATA}")


@needs_data
def test_cifar100_is_ten_tasks_of_balanced_classes() -> None:
    path = str(DATA / "cifar100")
    stream = build_stream("cifar100(tasks=10, per_class=100)", Preprocess(32, 32), 0, path=path)
    assert stream.notes["train_images"] == [1000] * 10
    assert stream.notes["test_images"] == [1000] * 10
    batch = stream.tasks[3].train.__getitems__(range(1000))
    assert torch.bincount(batch["label"])[30:].tolist() == [100] * 10
    assert 60 < batch["image"].float().mean() < 190


@needs_data
def test_cifar100_by_name_and_as_parquet_are_the_same_stream() -> None:
    text = f"parquet(path={str(DATA / 'cifar100')!r}, label='fine_label', tasks=20)"
    named = build_stream("cifar100(tasks=20)", Preprocess(32, 32), 5, path=str(DATA / "cifar100"))
    assert build_stream(text, Preprocess(32, 32), 5).tasks == named.tasks
    assert "aquarium_fish" in named.notes["classes"]


@needs_data
def test_coarse_labels_take_their_names_from_classes_json() -> None:
    text = f"parquet(path={str(DATA / 'cifar100')!r}, label='coarse_label', tasks=5)"
    stream = build_stream(text, Preprocess(32, 32), 0)
    assert "aquatic_mammals" in stream.notes["classes"]
    images = sum(pq.read_metadata(file).num_rows for file in (DATA / "cifar100").glob("train-*.parquet"))
    assert stream.notes["train_images"] == [images // 5] * 5  # every class has as many


@needs_data
def test_caltech101_takes_uneven_increments() -> None:
    text = f"parquet(path={str(DATA / 'caltech101')!r}, increments=(51, 25, 25), scenario='task')"
    stream = build_stream(text, Preprocess(64, 64), 0)
    assert stream.notes["train_images"] == [51 * 18, 25 * 18, 25 * 18]
    assert stream.tasks[1].test.__getitems__([0, 1, 2])["image"].shape == (3, 3, 64, 64)
    assert stream.candidates(stream.tasks[1], 2) == stream.tasks[1].classes


@needs_data
def test_pacs_is_four_domains_of_seven_classes() -> None:
    text = f"parquet(path={str(DATA / 'pacs')!r}, scenario='domain', domain='domain', order='natural')"
    stream = build_stream(text, Preprocess(32, 32), 0)
    assert [task.name for task in stream] == ["photo", "art_painting", "cartoon", "sketch"]
    assert sum(stream.notes["train_images"]) == 2656
    assert sum(stream.notes["test_images"]) == 664
    assert {task.classes for task in stream} == {tuple(range(7))}
    for task in stream:
        assert set(task.test.labels.tolist()) == set(range(7))


def test_easy_vqa_has_24_classes_and_says_how_many_images_are_undetermined() -> None:
    pytest.importorskip("easy_vqa", reason="the extra 'demo' is not installed")
    stream = build_stream("easy_vqa()", Preprocess(48, 48), 0)
    assert [len(task.classes) for task in stream] == [3] * 8
    assert len(set(stream.notes["classes"])) == 24
    assert sum(stream.notes["train_images"]) + sum(stream.notes["test_images"]) == 4466
    assert stream.notes["undetermined_images"] == 534
