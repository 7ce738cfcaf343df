"""What holds for every stream, whatever the options."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perdure.backbones.preprocess import Preprocess
from perdure.streams.options import Options
from perdure.streams.sources import Source
from perdure.streams.splits import first_of_each, held_out, shuffled
from perdure.streams.task_split import LabelledData, LabelledPart, arrange
from perdure.types import Stream

TWO = Preprocess(2, 2)


class Nowhere(Source):
    """Numbered images that nobody looks at."""

    def __init__(self, part: str, count: int) -> None:
        self.part, self.count = part, count

    def __len__(self) -> int:
        return self.count

    def where(self, row: int) -> str:
        return f"{self.part}, row {row}"

    def key(self, row: int) -> str:
        return f"{self.part}:{row}"

    def encoded(self, row: int) -> bytes:
        raise AssertionError("a stream is built without a look at an image")


def part(name: str, sizes: list[int], domains: int = 1) -> LabelledPart:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    count = len(labels)
    return LabelledPart.of(Nowhere(name, count), labels, np.arange(count) % domains)  # type: ignore[arg-type]


def found(sizes: list[int], split: bool = True, domains: int = 1) -> LabelledData:
    names = tuple(f"class {i}" for i in range(len(sizes)))
    test = part("test", [2 * domains] * len(sizes), domains) if split else None
    return LabelledData("data", part("train", sizes, domains), test, names, tuple(f"place {d}" for d in range(domains)))


def used(stream: Stream, which: str) -> list[str]:
    return sorted(data.where(i) for task in stream for data in [getattr(task, which)] for i in range(len(data)))


sizes = st.lists(st.integers(2, 12), min_size=2, max_size=30)
seeds = st.integers(0, 10**12)


@given(sizes, st.data(), seeds, st.sampled_from(["class", "task"]))
def test_tasks_share_out_the_classes_evenly(sizes: list[int], data: st.DataObject, seed: int, scenario: str) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    stream = arrange(found(sizes), Options(tasks=count, scenario=scenario), TWO, seed)  # type: ignore[arg-type]
    widths = [len(task.classes) for task in stream]
    assert len(stream) == count
    assert sum(widths) == len(sizes)
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)
    assert sorted(name for task in stream for name in task.names) == sorted(f"class {i}" for i in range(len(sizes)))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), seeds)
def test_increments_are_the_widths_of_the_tasks(increments: list[int], seed: int) -> None:
    stream = arrange(found([3] * sum(increments)), Options(increments=increments), TWO, seed)
    assert [len(task.classes) for task in stream] == increments


@given(sizes, st.data(), seeds)
def test_ids_count_the_classes_in_the_order_in_which_they_arrive(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    stream = arrange(found(sizes), Options(tasks=data.draw(st.integers(1, len(sizes)))), TWO, seed)
    assert [c for task in stream for c in task.classes] == list(range(len(sizes)))
    for task in stream:
        for which in (task.train, task.test):
            assert set(which.labels.tolist()) == set(task.classes)


@given(sizes, seeds)
def test_every_image_is_in_one_task_with_the_id_of_its_class(sizes: list[int], seed: int) -> None:
    stream = arrange(found(sizes), Options(tasks=2), TWO, seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    seen = []
    for task in stream:
        name_of = dict(zip(task.classes, task.names, strict=True))
        rows = task.train.rows.tolist()  # type: ignore[attr-defined]
        assert [name_of[c] for c in task.train.labels.tolist()] == [f"class {truth[row]}" for row in rows]
        seen += rows
    assert sorted(seen) == list(range(sum(sizes)))


@given(sizes, st.integers(1, 8), seeds, seeds)
def test_subsample_is_balanced_and_the_same_in_every_order(sizes: list[int], size: int, one: int, other: int) -> None:
    options = [Options(tasks=2, order=order, per_class=size, test_per_class=1) for order in (one, other, "natural")]
    streams = [arrange(found(sizes), each, TWO, seed) for seed, each in enumerate(options)]
    assert len({tuple(used(s, "train")) for s in streams}) == 1
    assert len({tuple(used(s, "test")) for s in streams}) == 1
    for task in streams[0]:
        for c, name in zip(task.classes, task.names, strict=True):
            assert int((task.train.labels == c).sum()) == min(size, sizes[int(name.split()[1])])


@given(sizes, st.integers(1, 6), seeds)
def test_smaller_subsample_is_part_of_the_larger(sizes: list[int], size: int, seed: int) -> None:
    small, large = (arrange(found(sizes), Options(tasks=2, per_class=n), TWO, seed) for n in (size, size + 1))
    assert set(used(small, "train")) <= set(used(large, "train"))


@given(sizes, seeds, seeds)
def test_split_is_the_same_in_every_order_and_leaves_every_class_on_both_sides(
    sizes: list[int], one: int, other: int
) -> None:
    first, second = (arrange(found(sizes, split=False), Options(tasks=2), TWO, seed) for seed in (one, other))
    assert used(first, "test") == used(second, "test")
    assert first.notes["split"] == second.notes["split"]
    assert not set(used(first, "test")) & set(used(first, "train"))
    for task in first:
        for which in (task.train, task.test):
            assert set(which.labels.tolist()) == set(task.classes)


@given(sizes, st.integers(2, 4), seeds)
def test_domains_teach_the_same_classes_under_the_same_ids(sizes: list[int], domains: int, seed: int) -> None:
    made = found([each * domains for each in sizes], domains=domains)
    stream = arrange(made, Options(scenario="domain", domain="place"), TWO, seed)
    assert sorted(task.name for task in stream) == sorted(made.domains)
    assert {task.names for task in stream} == {made.names}
    assert {task.classes for task in stream} == {tuple(range(len(sizes)))}
    assert len(used(stream, "train")) == len(set(used(stream, "train"))) == sum(sizes) * domains


@given(sizes, seeds)
def test_notes_are_json_and_count_what_the_tasks_hold(sizes: list[int], seed: int) -> None:
    import json

    stream = arrange(found(sizes), Options(tasks=2), TWO, seed)
    assert json.loads(json.dumps(stream.notes)) == stream.notes
    assert stream.notes["train_images"] == [len(task.train) for task in stream]
    assert stream.notes["classes"] == [name for task in stream for name in task.names]


@given(st.lists(st.text(max_size=5), unique=True, max_size=30), st.text(max_size=5))
def test_shuffle_keeps_its_order_when_a_name_is_added(names: list[str], purpose: str) -> None:
    order = [names[i] for i in shuffled(names, purpose)]
    more = [*names, "another name"]
    assert [more[i] for i in shuffled(more, purpose) if more[i] != "another name"] == order


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 9), st.floats(0.05, 0.5))
def test_draws_take_what_they_say_of_each_group(groups: list[int], size: int, share: float) -> None:
    names = [str(i) for i in range(len(groups))]
    every = Counter(groups)
    drawn = Counter(groups[i] for i in first_of_each(groups, names, size, "x"))
    assert drawn == {g: min(n, size) for g, n in every.items()}
    held = Counter(groups[i] for i in held_out(groups, names, share, "x"))
    for group, count in every.items():
        assert held[group] == min(max(1, round(count * share)), count - 1)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_every_image_comes_out_in_the_size_asked_for(
    width: int, height: int, size: int, resize: int, squash: bool
) -> None:
    pixels = Preprocess(size, resize, squash=squash)(Image.new("L", (width, height), 255))
    assert pixels.shape == (3, size, size)
    # White wherever the image covers the square.
    assert torch.equal(pixels.amin((0, 1)) == 255, pixels.amax((0, 1)) == 255) or size > resize
