"""What is kept of conversations: an image counts once, and of a vocabulary the likeliest tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.mechanisms.distillation import distillation, held_to, likeliest
from perdure.mechanisms.replay import ReplayBuffer
from perdure.types import Batch, Task


class Asked:
    """`questions` about each of `images` pictures, in turn."""

    def __init__(self, images: int, questions: int, task: int, shared: bool = False) -> None:
        self.pairs = torch.arange(images).repeat(questions) + (0 if shared else 1000 * task)
        self.labels = torch.full((len(self.pairs),), task)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        raise NotImplementedError


def tasks(shared: bool = False) -> list[Task]:
    return [Task(i, "", (i,), ("",), 3, Asked(10, 4, i, shared)) for i in range(3)]


@pytest.mark.parametrize("selection", ["reservoir", "class_balanced"])
def test_several_questions_about_an_image_cost_one_image_and_stay_together(selection: Any) -> None:
    memory, stream = ReplayBuffer(6, selection), tasks()
    for task in stream:
        memory.add(task, torch.Generator().manual_seed(task.index))
        assert memory.images == 6
        assert len(memory) == 6 * 4
        shown: dict[int, set[int]] = {}
        for index, position, _ in memory.refs.tolist():
            pair = int(stream[index].train.pairs[position])
            shown.setdefault(pair, set()).add(position)
        assert [len(each) for each in shown.values()] == [4] * 6
    if selection == "class_balanced":
        assert torch.bincount(memory.refs[:, 0]).tolist() == [8, 8, 8]
    again = ReplayBuffer(6, selection)
    again.load_state_dict(memory.state_dict())
    assert again.images == 6


def test_images_that_two_tasks_show_are_counted_once_in_bytes() -> None:
    memory = ReplayBuffer(100, "reservoir")
    for task in tasks(shared=True):
        memory.add(task, torch.Generator())
    assert (memory.images, len(memory)) == (10, 120)


def scores(seed: int) -> Tensor:
    return 3 * torch.randn(7, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_tokens_hold_all_when_they_are_all_and_never_more(temperature: float) -> None:
    teacher, student = scores(0), scores(1).requires_grad_()
    whole = distillation(teacher, student, temperature)
    held = [held_to(*likeliest(teacher, top, temperature), student, temperature) for top in (1, 5, 19, 20, 64)]
    torch.testing.assert_close(held[-2:], [whole, whole], rtol=1e-4, atol=1e-5)
    assert held[0] < held[1] < held[2] <= whole + 1e-5
    assert held_to(*likeliest(teacher, 5, temperature), teacher, temperature).abs() < 1e-5
    held[1].backward()
    assert student.grad is not None
    assert student.grad.abs().min() > 0
