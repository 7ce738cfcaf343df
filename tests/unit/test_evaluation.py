"""What a run computes, and how often: images encoded and read, heads and names asked, snapshots taken."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.schedule import Evaluation
from perdure.evaluation.zero_shot_retention import Retention
from perdure.streams import ImageSet
from perdure.training.loop import Quiet, fit_task
from perdure.training.run import run
from perdure.types import Batch, Data, Nothing, Stream


class Counted:
    """Data that counts how many of its examples are read."""

    def __init__(self, data: Data) -> None:
        self.data, self.labels, self.read = data, data.labels, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        self.read += len(positions)
        return self.data.__getitems__(positions)


def counted(lab: Any) -> Stream:
    stream = lab.stream()
    return replace(stream, tasks=tuple(replace(task, test=Counted(task.test)) for task in stream))


def evaluation_of(learner: Core, stream: Stream, out: Path) -> Evaluation:
    return Evaluation(stream, Retention((), learner), Drift([]), out, lambda _: None)


# per evaluation: forward passes of the vision tower, images in them, test images read; a task has 8 of them
CONSTANT = [(1, 8, 8), (1, 8, 8), (1, 8, 8)]
MOVING = [(1, 8, 8), (1, 16, 16), (1, 24, 24)]
ONCE_MORE_WHEN_STILL = [(1, 8, 8), (2, 16, 16), (1, 8, 8)]
WITH_QUERIES_OF_NEW_ONES = [(2, 16, 16), (2, 24, 24), (2, 32, 32)]

WITH_CAPTIONS_OF_NEW_ONES = [(1, 8, 16), (1, 16, 24), (1, 24, 32)]


@pytest.mark.parametrize(
    ("method", "objective", "expected"),
    [
        ("probe", "classify", CONSTANT),
        ("ranpac", "classify", CONSTANT),
        ("lora(rank=2)", "classify", MOVING),
        ("inflora(rank=2) + align", "classify", MOVING),
        ("finetune + ewc", "classify", MOVING),
        ("fm_lora(rank=4)", "classify", MOVING),
        ("lora(rank=2, tasks=1)", "classify", ONCE_MORE_WHEN_STILL),
        ("lora(rank=2, tasks=1) + ranpac", "classify", ONCE_MORE_WHEN_STILL),
        ("coda_prompt", "classify", WITH_QUERIES_OF_NEW_ONES),
        ("lora(rank=2, tower='both')", "zeroshot", MOVING),
        ("lora(rank=2)", "retrieve", WITH_CAPTIONS_OF_NEW_ONES),
    ],
)
def test_an_evaluation_encodes_and_reads_each_test_image_once_and_says_what_each_task_alone_gives(
    method: str, objective: str, expected: Any, lab: Any, tmp_path: Path
) -> None:
    bench = lab.but(objective=objective, epochs=1)
    learner, stream = bench.learner(method), counted(bench)
    evaluation, seen, found = evaluation_of(learner, stream, tmp_path), [], []
    tower = learner.backbone.get_submodule(learner.backbone.towers()["vision"])
    tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for task in stream:
        learner.grow(task)
        moved = fit_task(learner, task, bench.train_config()).moved
        seen.clear()
        before = sum(each.test.read for each in stream)
        rows = evaluation.after(learner, task, moved)
        found.append((len(seen), sum(seen), sum(each.test.read for each in stream) - before))
        if bench.objective == "classify":
            told = {(row.on, row.metric): row.value for row in rows}
            for each in stream.tasks[: task.index + 1]:
                assert {n: told[each.index, n] for n in ("accuracy", "task_id_accuracy")}.items() <= (
                    learner.objective.evaluate(learner, [replace(each, test=each.test.data)])[0].items()
                )
    assert expected is None or found == expected


@pytest.mark.parametrize("objective", ["classify", "zeroshot", "retrieve"])
@pytest.mark.parametrize("method", ["probe", "lora(rank=2)", "lora(rank=2, tasks=1)"])
def test_tasks_without_test_images_are_learnt_and_have_no_scores(
    method: str, objective: str, lab: Any, tmp_path: Path
) -> None:
    bench = lab.but(objective=objective, epochs=1)
    learner, stream = bench.learner(method), bench.stream()
    stream = replace(stream, tasks=tuple(replace(t, test=Nothing()) if t.index != 1 else t for t in stream))
    evaluation = evaluation_of(learner, stream, tmp_path)
    for task in stream:
        learner.grow(task)
        moved = fit_task(learner, task, bench.train_config()).moved
        on = {row.on for row in evaluation.after(learner, task, moved)} - {None}
        assert on == ({1} if task.index else set())


@pytest.mark.parametrize("method", ["lora(rank=2)", "lora(rank=2) + lwf", "lora(rank=2) + replay(size=4)"])
def test_no_image_is_read_to_find_out_that_nothing_is_recorded_of_it(method: str, lab: Any, tmp_path: Path) -> None:
    learner, stream = lab.learner(method), counted(lab)
    lab.teach(learner, stream)
    tests = [task.test for task in stream]
    with learner.inference():
        for _ in range(3):
            kept = [learner.cache.test(test) for test in tests]
    assert all(isinstance(each, Counted) for each in kept)
    assert {test.read for test in tests} <= ({0} if "lwf" not in method else {8}), "read again in each evaluation"


@pytest.mark.parametrize(("method", "asked"), [("lora(rank=2)", 1), ("lora(rank=2) + replay(size=4)", 3)])
def test_a_step_computes_the_heads_that_compete_and_no_others(method: str, asked: int, lab: Any) -> None:
    learner, tasks = lab.learner(method), lab.stream().tasks
    lab.teach(learner, tasks[:2], epochs=1)
    learner.grow(tasks[2])
    used: list[int] = []
    for index, head in enumerate(learner.objective.heads):
        head.register_forward_hook(lambda *_, index=index: used.append(index))
    learner.train()
    batch = learner.method.batch(learner, tasks[2].train.__getitems__(range(4)))
    learner.loss(batch)
    assert used == list(range(3))[-asked:]


@pytest.mark.parametrize("objective", ["classify", "classify(cosine=True)", "zeroshot"])
def test_scores_of_the_own_classes_are_those_columns_of_all_scores(objective: str, lab: Any) -> None:
    bench = lab.but(objective=objective)
    for method in ("lora(rank=2)", *(["lora(rank=2, tower='text')"] if bench.text else [])):
        learner = bench.learner(method)
        bench.teach(learner, bench.stream(), epochs=1)
        features, columns = torch.randn(3, learner.backbone.dim), list(learner.objective.task_columns)
        torch.testing.assert_close(
            learner.objective.task_scores(features), learner.objective.scores(features)[:, columns]
        )
        learner.objective.task_columns = (1, 4)  # of two heads
        torch.testing.assert_close(
            learner.objective.task_scores(features), learner.objective.scores(features)[:, [1, 4]]
        )


def test_a_text_tower_that_learns_reads_the_names_of_the_task_only(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, tasks = bench.learner("lora(rank=2, tower='both')"), bench.stream().tasks
    bench.teach(learner, tasks, epochs=1)
    read: list[int] = []
    learner.backbone.text.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    learner.train()
    learner.loss(tasks[2].train.__getitems__(range(4)))
    assert read == [2]


def test_images_read_under_inference_can_be_learnt_from(lab: Any) -> None:
    learner, data = lab.learner("lora(rank=2)"), lab.stream().tasks[0].train
    fresh = ImageSet(data.source, data.rows, data.labels, data.preprocess)
    with learner.inference():
        one = next(learner.batches(fresh, len(fresh)))["image"]
        several = [batch["image"] for batch in learner.batches(fresh, 3)]
    assert not any(image.is_inference() for image in (one, *several))
    torch.testing.assert_close(one, torch.cat(several))


class Watching(Quiet):
    """Notes the snapshots that there are after each step."""

    def __init__(self, out: Path) -> None:
        self.out, self.found = out, []

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        self.found.append(len(list(self.out.glob("task-*/step-*"))))


def test_tasks_of_a_few_quick_steps_are_saved_when_they_end_and_not_before(lab: Any, tmp_path: Path) -> None:
    watching = Watching(tmp_path)
    run(lab.config("lora(rank=2)", save_every=0), tmp_path, watching)
    assert len(watching.found) == 12
    assert not any(watching.found)


def test_a_stream_of_many_small_tasks_starts_no_thread_for_each(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a thread for a single batch")

    monkeypatch.setattr("perdure.core.learner.ThreadPoolExecutor", refuse)
    assert lab.but(per_class=4).taught("lora(rank=2)").learnt == 3


def test_what_was_asked_before_the_first_task_is_asked_anew_when_a_method_adapts_the_encoder(lab: Any) -> None:
    [task, *_] = lab.stream().tasks
    learner = lab.learner("finetune")
    before = learner.cache.test(task.test)
    learner.grow(task)
    after = learner.cache.test(task.test)
    assert "features" in before.__getitems__([0])
    assert "features" not in after.__getitems__([0])
