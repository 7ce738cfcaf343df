"""The training loop and evaluation, with scores that can be counted by hand."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.objectives import Classify
from perdure.streams import ImageSet
from perdure.training.loop import Quiet, TrainConfig, fit_task
from perdure.types import Task


class Oracle(Method):
    """Reads the scores from the first pixels of each image."""

    treats = frozenset({"vision"})  # so that images are not replaced by features computed once

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
    scores = learner.scores_of(learner.tasks[0].test, 8)
    assert scores.tolist() == [line[:2] for line in FIRST[0]]
    assert learner.method.sizes == [4, 4, 2, 2]


def test_another_error_while_predicting_is_not_swallowed() -> None:
    class Broken(Oracle):
        def predict(self, learner: Core, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            raise RuntimeError("shapes differ")

    learner = oracle("class", [asked(*FIRST)], [(3, 1)])
    learner.method = Broken()
    with pytest.raises(RuntimeError, match="shapes differ"):
        learner.scores_of(learner.tasks[0].test)


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


def by_torch(scheduler: Any, epochs: int) -> list[float]:
    """The rate in each epoch, from 1.0 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    stepper, found = scheduler(optimizer), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepper.step()
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 6),
        # as in the official codes of CODA-Prompt and InfLoRA: cos(99 π e / (200 (K - 1))), which ends at 1.6 %
        ({"schedule": "cosine-epoch"}, [1, 0.95202, 0.81269, 0.59538, 0.32094, 0.01571]),
        ({"schedule": "step", "milestones": "2,5"}, by_torch(lambda o: MultiStepLR(o, [2, 5], 0.1), 6)),
        ({"schedule": "step", "milestones": "4", "decay": 0.5}, by_torch(lambda o: MultiStepLR(o, [4], 0.5), 6)),
    ],
)
def test_the_rate_of_an_epoch_is_that_of_the_schedule(options: Any, expected: list[float], lab: Any) -> None:
    rates, learner, task = Rates(), lab.learner("probe"), lab.stream().tasks[0]
    learner.grow(task)
    fit_task(learner, task, lab.train_config(lr=1.0, epochs=6, **options), save_step=rates)
    assert len(rates.rates) == 12  # two steps an epoch
    for steps in (rates.rates[::2], rates.rates[1::2]):
        assert [rate for (rate,) in steps] == pytest.approx(expected, abs=5e-5)


def test_a_warm_up_rises_for_a_tenth_of_the_steps_and_then_falls_as_a_cosine() -> None:
    config = TrainConfig(schedule="warmup-cosine", lr=1.0)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10:] == pytest.approx(by_torch(lambda o: CosineAnnealingLR(o, 90), 90), abs=1e-6)
    assert TrainConfig(schedule="warmup-cosine").rate(0, 1) > 0


@pytest.mark.parametrize("options", [{"schedule": "cosine-epoch"}, {"schedule": "step", "milestones": "1"}])
def test_a_run_stopped_within_an_epoch_goes_on_at_its_rate(
    options: Any, lab: Any, content_of: Any, tmp_path: Any
) -> None:
    lab.run("lora(rank=2)", tmp_path / "whole", **options)
    lab.broken_run("lora(rank=2)", tmp_path / "broken", (1, 3), save_every=1, **options)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_another_schedule_leaves_milestones_behind() -> None:
    config = TrainConfig(schedule="step", milestones="1,2", decay=0.5)
    assert config.but(schedule="constant") == TrainConfig(schedule="constant")
    assert config.but(epochs=9).milestones == TrainConfig(schedule="step", milestones=(1, 2)).milestones == "1,2"
    assert config.but(schedule="cosine").but(schedule="step", milestones="3").decay is None


def test_training_that_diverges_says_so(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^training diverged in task 1: .* is not finite"):
        lab.taught("finetune(backbone_lr=1.0)", lr=1e6, optimizer="sgd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": "2"}, "milestones='2' has no effect with schedule='cosine', but with 'step': leave it out$"),
        ({"schedule": "constant", "decay": 0.1}, "decay=0.1 has no effect with schedule='constant'"),
        ({"schedule": "cosine-epoch", "epochs": 1}, "schedule='cosine-epoch' has no effect in 1 epoch"),
        ({"schedule": "step"}, "milestones='': expected numbers of epochs, rising, such as 4,6,8$"),
        *(
            ({"schedule": "step", "milestones": text}, f"milestones='{text}': expected numbers of epochs, rising")
            for text in ("-1", "a", "0,2", "3,2", "2,2", "1.5", "²")
        ),
        ({"schedule": "step", "milestones": "2,5"}, "milestones='2,5': the last has no effect within epochs=5"),
        ({"schedule": "step", "milestones": "2", "decay": 1.0}, "decay=1.0: expected a factor other than 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**options)


def test_a_task_smaller_than_a_batch_is_learnt(lab: Any) -> None:
    watch, fitted = watched(lab, epochs=2, batch_size=1000)
    assert fitted.images == 32
    assert [len(labels) for what, labels in watch.seen if what == "batch"] == [16, 16]
