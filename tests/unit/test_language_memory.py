"""What is kept of conversations: an image counts once, and of a vocabulary the likeliest tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.mechanisms.distillation import distillation, held_to, likeliest
from perdure.mechanisms.replay import ReplayBuffer
from perdure.training.config import RunConfig
from perdure.training.run import run
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


@pytest.mark.parametrize("selection", ["reservoir", "class_balanced"])
def test_a_memory_that_has_room_for_fewer_than_it_kept_keeps_as_many_of_all(selection: Any) -> None:
    memory, stream = ReplayBuffer(12, selection), tasks()
    for task in stream:
        memory.size = 12 if task.index < 2 else 4
        memory.add(task, torch.Generator().manual_seed(task.index))
        assert memory.images == min(memory.size, 10 * (task.index + 1))
    chosen = torch.zeros(3)
    for seed in range(200):
        memory = ReplayBuffer(12, selection)
        for task in stream:
            memory.size = 12 if task.index < 2 else 4
            memory.add(task, torch.Generator().manual_seed(1000 * seed + task.index))
        chosen += torch.bincount(memory.refs[:, 0], minlength=3) / len(memory)
    if selection == "reservoir":
        assert (chosen / 200 - 1 / 3).abs().max() < 0.06


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
    held = [held_to([likeliest(teacher, top, temperature)], student, temperature) for top in (1, 5, 19, 20, 64)]
    torch.testing.assert_close(held[-2:], [whole, whole], rtol=1e-4, atol=1e-5)
    assert held[0] < held[1] < held[2] <= whole + 1e-5
    assert held_to([likeliest(teacher, 5, temperature)], teacher, temperature).abs() < 1e-5
    held[1].backward()
    assert student.grad is not None
    assert student.grad.abs().min() > 0


class Watched(Asked):
    """Two questions about each of some videos, which have so many frames."""

    def __init__(self, frames: Sequence[int], task: int) -> None:
        super().__init__(len(frames), 2, task)
        self.frames = torch.tensor(frames).repeat(2)


def videos(counts: Sequence[Sequence[int]]) -> list[Task]:
    return [Task(i, "", (i,), ("",), len(counts), Watched(each, i)) for i, each in enumerate(counts)]


COUNTS = ([4, 1, 8, 2, 6, 1, 30], [1] * 5, [5, 5, 5, 9], [16])


@pytest.mark.parametrize("selection", ["reservoir", "class_balanced"])
@pytest.mark.parametrize("room", [6, 20, 100])
def test_a_budget_holds_all_frames_of_what_is_kept_and_is_filled(room: int, selection: Any) -> None:
    memory, stream = ReplayBuffer(room, selection), videos(COUNTS)
    memory.counts_frames = True
    for task in stream:
        memory.add(task, torch.Generator().manual_seed(task.index))
        kept = {(t, int(stream[t].train.pairs[p])): int(stream[t].train.frames[p]) for t, p, _ in memory.refs.tolist()}
        assert memory.images == sum(kept.values()) <= room
        assert len(memory) == 2 * len(kept)  # all questions about a video stay with it
        again = ReplayBuffer(room, selection)
        again.load_state_dict(memory.state_dict())
        assert again.images == memory.images
        left_out = [
            int(frames)
            for index in range(task.index + 1)
            for pair, frames in zip(stream[index].train.pairs, stream[index].train.frames, strict=True)
            if (index, int(pair)) not in kept
        ]
        if task.index == 0:
            assert min(left_out, default=room) > room - memory.images or room == 100
    assert room < 100 or memory.images == 97


def test_videos_of_one_length_have_one_chance_whenever_they_come() -> None:
    counts = torch.zeros(10)
    for seed in range(300):
        memory = ReplayBuffer(8, "reservoir")
        memory.counts_frames = True
        for task in videos([[2] * 5, [2] * 5]):
            memory.add(task, torch.Generator().manual_seed(seed))
        counts[memory.references["pairs"] // 1000 * 5 + memory.references["pairs"] % 1000] += 1
    assert counts.sum() == 300 * 4
    assert (counts / 300 - 0.4).abs().max() < 0.1


def test_images_alone_are_kept_as_before_a_sequence_counted_its_frames() -> None:
    plain, counting = ReplayBuffer(6, "reservoir"), ReplayBuffer(6, "reservoir")
    counting.counts_frames = True
    for task in tasks():
        for memory in (plain, counting):
            memory.add(task, torch.Generator().manual_seed(task.index))
    assert torch.equal(plain.refs, counting.refs)
    assert counting.references.keys() == plain.references.keys()


@pytest.mark.parametrize("method", ["replay(size=4)", "joint"])
def test_bytes_referred_to_are_those_of_all_frames_whatever_a_sequence_counts_as(method: str, tmp_path: Path) -> None:
    for task, frames in enumerate((3, 1)):
        lines = []
        for i in range(2):
            shown = [f"{task}-{i}-{n}.png" for n in range(frames)]
            for n, name in enumerate(shown):
                Image.new("RGB", (8, 8), (50 * i, 20 * n, 60 * task)).save(tmp_path / name)
            lines += [json.dumps({"images": shown, "question": asked, "answer": "a"}) for asked in ("What?", "Who?")]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    files = str([str(tmp_path / f"{task}.jsonl") for task in range(2)])
    config = RunConfig(
        stream=f"conversations(path={files})",
        backbone="tiny_mllm()",
        objective="generate(tokens=2)",
        method=f"lora(rank=2, tower='language') + {method}",
        epochs=1,
        precision="fp32",
    )
    run(config, tmp_path / "run")
    rows = map(json.loads, (tmp_path / "run" / "results.jsonl").read_text().splitlines())
    frame = 3 * tiny_mllm().preprocess.size ** 2
    found = [row["value"] / frame for row in rows if row["metric"] == "referenced_bytes"]
    assert found[-1] == 3 + 1  # the other half is tested


def test_a_run_on_videos_refers_to_no_more_bytes_than_it_may_and_says_when_none_fits(tmp_path: Path) -> None:
    for task, frames in enumerate((3, 1, 2)):
        lines = []
        for i in range(5):
            shown = [f"{task}-{i}-{n}.png" for n in range(frames + i % 2)]
            for n, name in enumerate(shown):
                Image.new("RGB", (8, 8), (50 * i, 20 * n, 60 * task)).save(tmp_path / name)
            lines.append(json.dumps({"images": shown, "question": "What?", "answer": "a"}))
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    files = str([str(tmp_path / f"{task}.jsonl") for task in range(3)])

    def learnt(budget: int, out: str) -> list[float]:
        config = RunConfig(
            stream=f"conversations(path={files})",
            backbone="tiny_mllm()",
            objective="generate(tokens=2)",
            method=f"lora(rank=2, tower='language') + replay(bytes={budget})",
            epochs=1,
            precision="fp32",
        )
        run(config, tmp_path / out)
        rows = map(json.loads, (tmp_path / out / "results.jsonl").read_text().splitlines())
        return [row["value"] for row in rows if row["metric"] == "referenced_bytes"]

    frame = 3 * tiny_mllm().preprocess.size ** 2
    found = learnt(5 * frame, "run")
    assert len(found) == 3
    assert all(0 < value <= 5 * frame and value % frame == 0 for value in found)
    with pytest.raises(
        ValueError, match=f"expected at least {3 * frame}, what the shortest sequence of 3 frames takes"
    ):
        learnt(2 * frame, "none")
