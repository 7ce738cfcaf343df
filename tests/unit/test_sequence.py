"""Streams in the order of data sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.backbones.preprocess import Preprocess
from perdure.streams import build_stream
from perdure.types import Stream

EIGHT = Preprocess(8, 8)


def folder(root: Path, classes: tuple[str, ...], first: int) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(5):
            value = first + 10 * c + i
            Image.new("RGB", (8, 8), (value, value, value)).save(root / name / f"{i}.png")
    return root


def build(text: str, seed: int = 0, **more: Any) -> Stream:
    return build_stream(text, EIGHT, seed, **more)


def fruit(tmp_path: Path) -> str:
    a = folder(tmp_path / "one", ("apple", "pear"), 0)
    b = folder(tmp_path / "two", ("apple", "plum", "fig"), 100)
    return f"sequence(images(path={str(a)!r}), images(path={str(b)!r}))"


def refused(text: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_data_set_is_one_task_with_classes_of_its_own(tmp_path: Path) -> None:
    for seed in range(3):
        stream = build(fruit(tmp_path / str(seed)), seed)
        assert [task.name for task in stream] == ["one", "two"]
        assert [task.classes for task in stream] == [(0, 1), (2, 3, 4)]
        assert [task.names for task in stream] == [("apple", "pear"), ("apple", "fig", "plum")]
        assert stream.notes["sequence"] is True
        assert stream.notes["train_images"] == [8, 12]
    for task in stream:
        assert set(task.train.labels.tolist()) == set(task.test.labels.tolist()) == set(task.classes)
        batch = task.train.__getitems__(range(len(task.train)))
        assert torch.equal(batch["label"], task.train.labels)
        assert {v >= 100 for v in batch["image"].flatten().tolist()} == {task.name == "two"}


def test_data_sets_are_answered_among_their_own_classes_unless_asked_otherwise(tmp_path: Path) -> None:
    text = fruit(tmp_path)
    stream = build(text)
    assert stream.scenario == "task"
    assert stream.candidates(stream.tasks[1], 1) == (2, 3, 4)
    assert build(text, scenario="class").candidates(stream.tasks[1], 1) == (0, 1, 2, 3, 4)


def test_order_permutes_the_data_sets_and_numbers_classes_as_they_arrive(tmp_path: Path) -> None:
    text = fruit(tmp_path)
    for order in (["two", "one"], [1, 0]):
        stream = build(text, order=order)
        assert [task.name for task in stream] == ["two", "one"]
        assert [task.classes for task in stream] == [(0, 1, 2), (3, 4)]
    assert len({tuple(task.name for task in build(text, order=seed)) for seed in range(6)}) == 2


def test_made_up_data_sets_differ_from_each_other_and_equal_names_are_told_apart() -> None:
    stream = build("sequence(synthetic(), synthetic())")
    assert [task.name for task in stream] == ["synthetic", "synthetic (2)"]
    first, second = (task.train.__getitems__([0])["image"] for task in stream)
    assert not torch.equal(first, second)


def test_captioned_data_sets_share_a_shape_and_no_image() -> None:
    stream = build("sequence(captions_synthetic(captions=1, per_task=40), captions_synthetic(captions=4))")
    sets = [data for task in stream for data in (task.train, task.test)]
    assert max(len(each) for data in sets for each in data.texts) == 4
    pairs = [p for data in sets for p in data.pairs.tolist()]
    assert len(set(pairs)) == len(pairs) == 64
    assert [(task.classes, task.names) for task in stream] == [
        ((0,), ("captions_synthetic",)),
        ((1,), ("captions_synthetic (2)",)),
    ]
    assert stream.notes["captions"] == {"train": [40, 48], "test": [6, 24]}
    batch = stream.tasks[1].test.__getitems__([0, 1])
    assert {"image", "label", "pair", "text"} == set(batch)
    assert batch["label"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence(synthetic())", "sequence of 1 data sets: expected at least 2"),
        ("sequence", "sequence of 0 data sets"),
        ("sequence(synthetic(), synthetic(tasks=3))", "tasks=3 has no effect on 'synthetic' in a sequence"),
        ("sequence(synthetic(), synthetic(scenario='task'))", "scenario='task' has no effect"),
        ("sequence(synthetic(), captions_synthetic())", "'captions_synthetic' has captions, 'synthetic' has labels"),
        ("sequence(synthetic(), sequence(synthetic(), synthetic()))", "within a sequence"),
        ("sequence(synthetic(), synthetc())", "unknown stream 'synthetc'; did you mean 'synthetic'?"),
        ("sequence(synthetic(), synthetic(sise=3))", "did you mean 'size'?"),
        ("sequence(synthetic(), synthetic(), order='neutral')", "did you mean 'natural'?"),
        ("sequence(synthetic(), synthetic(), order='order.txt')", "there is no such file; expected 'natural', 'seed'"),
        ("sequence(synthetic(), synthetic(), order=['synthetic', 'synth (2)'])", "did you mean 'synthetic (2)'?"),
        ("sequence(synthetic(), captions(path='x', captions=('a', 'b')))", "makes a task of each column"),
    ],
)
def test_wrong_sequence_is_refused_with_a_way_out(text: str, message: str) -> None:
    assert message in refused(text)
