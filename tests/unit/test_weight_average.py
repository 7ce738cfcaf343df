"""Averages of weights: the mean over the way and the point between its ends, by hand; old tasks count."""

from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.training.loop import fit_task
from perdure.types import Batch


class Watched(Method):
    """Notes what a task starts from, and its parameters after each step."""

    name = "watched"
    derived = frozenset({"path"})  # what the test looks at

    def begin_task(self, learner: Core, task: Any) -> None:
        self.path = [values(learner)]

    def after_step(self, learner: Core, batch: Batch) -> None:
        self.path.append(values(learner))


def values(learner: Core) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.trainable().items()}


def path(bench: Any, spec: str, tasks: int = 2) -> tuple[Core, list[dict[str, torch.Tensor]]]:
    """A learner after `tasks`, and the way that the last of them took."""
    learner, stream = bench.learner(spec), bench.stream()
    watched = Watched()
    learner.method.parts.append(watched)
    for task in stream.tasks[:tasks]:
        learner.grow(task)
        fit_task(learner, task, bench.train_config(epochs=3))
    return learner, watched.path


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_running_mean_is_that_of_the_start_and_every_kth_step(every: int, lab: Any) -> None:
    learner, way = path(lab, f"lora(rank=2) + weight_average(every={every})")
    taken = [way[0], *way[1:][::every]]
    assert len(way) == 7
    for name, value in learner.trainable().items():
        expected = torch.stack([each[name] for each in taken]).double().mean(0).float()
        torch.testing.assert_close(value.detach(), expected, msg=name)
        assert not torch.equal(value, way[-1][name]), name


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_wise_is_between_the_values_before_and_after_and_leaves_heads(alpha: float, lab: Any) -> None:
    learner, way = path(lab, f"lora(rank=2) + weight_average(form='wise', alpha={alpha})")
    for name, value in learner.trainable().items():
        start, end = way[0][name], way[-1][name]
        expected = end if name.startswith("objective.") else (1 - alpha) * start + alpha * end
        torch.testing.assert_close(value.detach(), expected, msg=name)


@pytest.mark.parametrize("spec", ["ewc + lora(rank=2) + weight_average", "weight_average + lora(rank=2) + ewc"])
def test_others_remember_the_average_wherever_they_stand(spec: str, lab: Any) -> None:
    learner = lab.taught(spec)
    (ewc,) = (part for part in learner.method if part.name == "ewc")
    anchored = {name: value for name, value in ewc.anchor.items() if "adapters" in name}
    assert anchored
    for name, value in anchored.items():
        assert torch.equal(learner.get_parameter(name), value), name


def test_branches_that_close_with_the_task_are_averaged_before(lab: Any) -> None:
    def update(spec: str) -> torch.Tensor:
        learner = lab.learner(spec)
        lab.teach(learner, lab.stream().tasks[:2])
        (lora,) = (part for part in learner.method if part.name == "lora")
        return lora.adapters[0].delta(0, True)

    going_on, closed = (update(f"lora(rank=2{more}) + weight_average") for more in ("", ", tasks=2"))
    torch.testing.assert_close(closed, going_on)


def test_the_average_forgets_less(lab: Any) -> None:
    def moved(spec: str) -> float:
        learner, stream = lab.learner(spec), lab.stream()
        lab.teach(learner, stream.tasks[:1])
        before = learner.features(stream.tasks[0].train)[0]
        lab.teach(learner, stream.tasks[1:2], epochs=6)
        return float((learner.features(stream.tasks[0].train)[0] - before).norm())

    free = moved("finetune")
    assert moved("finetune + weight_average") < free
    assert moved("finetune + weight_average(form='wise')") < 0.8 * free
