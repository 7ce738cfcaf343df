"""Memories of examples: who is kept, and what is drawn."""

import pytest
import torch

from perdure.backbones.tiny import tiny
from perdure.memory.examples import Examples, Referred, read, refer
from perdure.streams import build_stream
from perdure.types import Nothing, Task


class Numbered:
    """Data whose image is its task and position."""

    def __init__(self, task: int, labels: list[int]) -> None:
        self.task, self.labels = task, torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        image = torch.tensor([[self.task, p] for p in positions])
        return {"image": image, "label": self.labels[torch.as_tensor(positions)]}


def task(index: int, labels: list[int]) -> Task:
    classes = tuple(sorted(set(labels)))
    return Task(index, f"t{index}", classes, tuple(map(str, classes)), None, Numbered(index, labels), Nothing())


def test_a_reservoir_is_a_uniform_sample_of_all_that_was_offered() -> None:
    tasks = [task(0, [0] * 10), task(1, [1] * 30), task(2, [2] * 20)]
    repeats, size = 1500, 12
    kept = torch.zeros(3, 30)
    for seed in range(repeats):
        memory = Examples(size, "reservoir")
        for each in tasks:
            memory.add(each, torch.Generator().manual_seed(1000 * seed + each.index))
        assert len(memory) == size
        assert len({tuple(r) for r in memory.refs.tolist()}) == size
        for index, position, _ in memory.refs.tolist():
            kept[index, position] += 1
    counts = torch.cat([kept[t.index, : len(t.train)] for t in tasks])
    mean, deviation = repeats * size / 60, (repeats * (size / 60) * (1 - size / 60)) ** 0.5
    assert (counts - mean).abs().max() < 4 * deviation
    assert (counts - mean).std() < 1.3 * deviation
    for each in tasks:  # no task is favoured; draws without replacement vary less than binomial ones
        share = kept[each.index].sum() / len(each.train)
        assert abs(share - mean) < 4 * deviation / len(each.train) ** 0.5


def test_all_is_kept_while_there_is_room() -> None:
    memory = Examples(50, "reservoir")
    for each in (task(0, [0] * 10), task(1, [1] * 30)):
        memory.add(each, torch.Generator().manual_seed(0))
    assert sorted(memory.refs.tolist()) == [[0, i, 0] for i in range(10)] + [[1, i, 1] for i in range(30)]


def test_class_balanced_memory_shares_its_size_among_the_classes() -> None:
    memory = Examples(11, "class_balanced")
    memory.add(task(0, [4] * 20 + [9] * 20), torch.Generator().manual_seed(0))
    assert torch.bincount(memory.refs[:, 2])[[4, 9]].tolist() == [6, 5]
    memory.add(task(1, [1] * 20), torch.Generator().manual_seed(1))
    assert torch.bincount(memory.refs[:, 2])[[1, 4, 9]].tolist() == [4, 4, 3]
    memory.add(task(2, [4] * 20), torch.Generator().manual_seed(2))  # another domain of a class
    assert torch.bincount(memory.refs[:, 2])[[1, 4, 9]].tolist() == [4, 4, 3]


def test_a_class_that_comes_again_keeps_examples_of_all_its_tasks() -> None:
    memory = Examples(6, "class_balanced")
    for each in (task(0, [0] * 9), task(1, [0] * 9), task(2, [0] * 9)):
        memory.add(each, torch.Generator().manual_seed(each.index))
    assert torch.bincount(memory.refs[:, 0]).tolist() == [2, 2, 2]


def test_a_given_order_is_kept_and_loses_its_end_when_classes_come() -> None:
    memory, none = Examples(6, "class_balanced"), torch.Generator()
    memory.add(task(0, [3, 5] * 8), none, torch.tensor([6, 0, 2, 9, 1, 3, 4]))
    assert memory.refs.tolist() == [[0, 6, 3], [0, 0, 3], [0, 2, 3], [0, 9, 5], [0, 1, 5], [0, 3, 5]]
    memory.add(task(1, [2] * 8), none, torch.tensor([7, 0, 1]))
    assert memory.refs.tolist() == [[1, 7, 2], [1, 0, 2], [0, 6, 3], [0, 0, 3], [0, 9, 5], [0, 1, 5]]


def test_what_is_read_stands_in_the_order_that_was_asked_for() -> None:
    tasks = [task(0, [3, 5] * 8), task(1, [2] * 8)]
    refs = torch.cat([refer(tasks[1]), refer(tasks[0])])[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert read(tasks, refs)["image"].tolist() == refs[:, :2].tolist()
    data = Referred(tasks, refs)
    batch = data.__getitems__([5, 0, 5, 23])
    assert batch["image"].tolist() == refs[[5, 0, 5, 23], :2].tolist()
    assert batch["label"].tolist() == data.labels[[5, 0, 5, 23]].tolist() == refs[[5, 0, 5, 23], 2].tolist()
    assert len(data) == 24


def test_what_is_drawn_is_what_was_referred_to() -> None:
    tasks = [task(0, [3, 5] * 8), task(1, [2] * 8)]
    memory = Examples(10, "class_balanced")
    for each in tasks:
        memory.add(each, torch.Generator().manual_seed(each.index))
    batch = memory.draw(tasks, 40, torch.Generator().manual_seed(0))
    known = {(t, p): c for t, p, c in memory.refs.tolist()}
    assert [known[tuple(image)] for image in batch["image"].tolist()] == batch["label"].tolist()
    assert set(map(tuple, batch["image"].tolist())) == known.keys()


def test_an_example_whose_data_is_gone_is_an_error_that_names_the_task() -> None:
    gone = build_stream("synthetic(tasks=1)", tiny().preprocess, 0).tasks[0]
    with pytest.raises(ValueError, match=r"examples of task 0 .* is not at hand: restore the folder"):
        read([Task.described(gone.describe())], torch.tensor([[0, 1, 0]]))


def test_a_memory_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^size=0: expected at least 1 example"):
        Examples(0, "reservoir")
