"""The training loop and evaluation, with scores that can be counted by hand."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.backbones.tiny import tiny
from perdure.learner import Core
from perdure.method import Method
from perdure.objectives import Classify
from perdure.streams import ImageSet
from perdure.train import Quiet, TrainConfig, fit_task
from perdure.types import Task


class Oracle(Method):
    """Reads the scores from the first pixels of each image."""

    def encode(self, learner: Core, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As always; defined, so that images are not replaced by features computed once."""
        return super().encode(learner, batch)

    def predict(self, learner: Core, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["image"][:, 0, 0, : len(learner.objective.classes)].float()


def asked(scores: list[list[int]], labels: list[int]) -> ImageSet:
    image = torch.zeros(len(scores), 3, 16, 16, dtype=torch.uint8)
    for i, each in enumerate(scores):
        image[i, 0, 0, : len(each)] = torch.tensor(each, dtype=torch.uint8)
    return ImageSet.of(image, labels, tiny().preprocess)


def oracle(scenario: str, tests: list[ImageSet], classes: list[tuple[int, ...]]) -> Core:
    learner = Core(tiny(), Classify(), Oracle(), scenario)
    for i, (test, ids) in enumerate(zip(tests, classes, strict=True)):
        learner.grow(Task(i, f"t{i}", ids, tuple(map(str, ids)), None, test=test))
    learner.learnt = len(tests)
    return learner


# columns: classes 3, 1 (task 0), 0, 2 (task 1)
FIRST = ([[9, 1, 0, 0], [1, 9, 0, 0], [5, 1, 9, 0], [1, 5, 0, 9]], [3, 3, 3, 1])
SECOND = ([[0, 0, 9, 1], [9, 0, 5, 1]], [0, 2])


METRICS = ("accuracy", "accuracy_with_task_id", "task_id_accuracy")


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [("class", (1 / 4, 3 / 4, 2 / 4), (1 / 2, 1 / 2, 1 / 2)), ("task", (3 / 4, 3 / 4), (1 / 2, 1 / 2))],
)
def test_accuracies_are_what_one_counts(scenario: str, first: Any, second: Any) -> None:
    learner = oracle(scenario, [asked(*FIRST), asked(*SECOND)], [(3, 1), (0, 2)])
    assert learner.objective.evaluate(learner, [learner.tasks[0]])[0] == pytest.approx(
        dict(zip(METRICS, first, strict=False))
    )
    assert learner.objective.evaluate(learner, [learner.tasks[1]])[0] == pytest.approx(
        dict(zip(METRICS, second, strict=False))
    )


def test_in_a_domain_stream_all_tasks_have_the_same_candidates() -> None:
    tests = [asked([[9, 1], [9, 1]], [0, 1]), asked([[9, 1], [1, 9]], [0, 1])]
    learner = oracle("domain", tests, [(0, 1), (0, 1)])
    assert [learner.objective.evaluate(learner, [task])[0]["accuracy"] for task in learner.tasks] == [0.5, 1.0]


@settings(deadline=None, max_examples=25)
@given(scores=st.lists(st.lists(st.integers(0, 255), min_size=4, max_size=4), min_size=1, max_size=12), data=st.data())
def test_knowing_the_task_never_hurts(scores: list[list[int]], data: Any) -> None:
    scores = [[4 * (v // 4) + i for i, v in enumerate(line)] for line in scores]  # no ties
    labels = data.draw(st.lists(st.sampled_from([3, 1]), min_size=len(scores), max_size=len(scores)))
    learner = oracle("class", [asked(scores, labels), asked(*SECOND)], [(3, 1), (0, 2)])
    found = learner.objective.evaluate(learner, [learner.tasks[0]])[0]
    assert found["accuracy"] <= found["accuracy_with_task_id"]
    assert found["accuracy"] <= found["task_id_accuracy"]


class Heavy(Oracle):
    """Runs out of memory with more than two images at once."""

    sizes: list[int]

    def predict(self, learner: Core, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.sizes.append(len(batch["image"]))
        if len(batch["image"]) > 2:
            raise RuntimeError("XPU out of memory. Tried to allocate 2 GiB")
        return super().predict(learner, batch)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    learner = oracle("class", [asked(*FIRST)], [(3, 1)])
    learner.method = Heavy()
    learner.method.sizes = []
    scores = learner.answers(learner.tasks[0].test, 8)
    assert scores.tolist() == [line[:2] for line in FIRST[0]]
    assert learner.method.sizes == [4, 4, 2, 2]


def test_another_error_while_predicting_is_not_swallowed() -> None:
    class Broken(Oracle):
        def predict(self, learner: Core, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            raise RuntimeError("shapes differ")

    learner = oracle("class", [asked(*FIRST)], [(3, 1)])
    learner.method = Broken()
    with pytest.raises(RuntimeError, match="shapes differ"):
        learner.answers(learner.tasks[0].test)


class Watch(Method):
    """Notes what the loop does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def begin_task(self, learner: Core, task: Task) -> None:
        self.seen.append(("begin", learner.step))

    def batch(self, learner: Core, batch: Any) -> Any:
        self.seen.append(("batch", batch["label"].tolist()))
        return batch

    def penalty(self, learner: Core, batch: Any, features: torch.Tensor) -> torch.Tensor | float:
        self.seen.append(("penalty", learner.step))
        return 0.0

    def after_backward(self, learner: Core) -> None:
        self.seen.append(("backward", float(next(iter(learner.trainable().values())).grad.abs().sum()) > 0))

    def after_step(self, learner: Core, batch: Any) -> None:
        self.seen.append(("step", learner.step))

    def end_task(self, learner: Core, task: Task) -> None:
        self.seen.append(("end", learner.step))


def watched(lab: Any, **config: Any) -> tuple[Watch, Any]:
    task = lab.stream().tasks[0]
    learner = Core(lab.backbone(), Classify(), Watch())
    learner.grow(task)
    return learner.method, fit_task(learner, task, lab.train_config(**config))


def test_hooks_run_in_the_documented_order(lab: Any) -> None:
    watch, fitted = watched(lab, epochs=1)
    assert [what for what, _ in watch.seen] == ["begin", *(["batch", "penalty", "backward", "step"] * 2), "end"]
    assert [step for what, step in watch.seen if what == "step"] == [0, 1]
    assert (fitted.images, fitted.trainable) == (16, 2 * 16 + 2)


def test_every_epoch_sees_every_example_once_in_another_order(lab: Any) -> None:
    watch, _ = watched(lab, epochs=2, batch_size=5)
    batches = [labels for what, labels in watch.seen if what == "batch"]
    assert [len(b) for b in batches] == [5, 5, 5, 1] * 2
    epochs = [list(chain(*batches[:4])), list(chain(*batches[4:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0] * 8 + [1] * 8
    assert epochs[0] != epochs[1]


class Rates(Quiet):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def __call__(self, step: int, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_rate_follows_the_schedule_in_every_group(optimizer: str, lab: Any) -> None:
    rates, learner, task = Rates(), lab.learner("finetune(backbone_lr=0.1)"), lab.stream().tasks[0]
    learner.grow(task)
    fit_task(learner, task, lab.train_config(lr=0.01, optimizer=optimizer), save_step=rates)
    expected = [0.01 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    for found, rate in zip(rates.rates, expected, strict=True):
        assert sorted(found) == pytest.approx([0.1 * rate, rate])
    constant = Rates()
    learner = lab.learner("probe")
    learner.grow(task)
    fit_task(learner, task, lab.train_config(lr=0.01, schedule="constant"), save_step=constant)
    assert constant.rates == [[0.01]] * 4


def test_training_that_diverges_says_so(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^training diverged in task 0: .* is not finite"):
        lab.taught("finetune(backbone_lr=1.0)", lr=1e6, optimizer="sgd")


@pytest.mark.parametrize(
    ("options", "message"),
    [],
)
def test_settings_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**options)


def test_a_task_smaller_than_a_batch_is_learnt(lab: Any) -> None:
    watch, fitted = watched(lab, epochs=2, batch_size=1000)
    assert fitted.images == 32
    assert [len(labels) for what, labels in watch.seen if what == "batch"] == [16, 16]
