"""Averages of weights: the mean over the way and the point between its ends, by hand; old tasks count."""

from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.training.config import make_method
from perdure.training.loop import fit_task
from perdure.types import Batch


class Watched(Method):
    """Notes what a task starts from, and its parameters after each step."""

    name = "watched"

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


def test_a_share_of_one_is_plain_training_bit_for_bit(lab: Any) -> None:
    plain = lab.taught("finetune").memory()
    averaged = lab.taught("finetune + weight_average(form='wise', alpha=1)").memory()
    for key, value in plain.items():
        assert torch.equal(averaged[key.replace("method.", "method.parts.0.")], value), key


def test_nothing_is_kept_once_a_task_has_ended(lab: Any) -> None:
    plain, averaged = lab.taught("finetune").memory(), lab.taught("finetune + weight_average").memory()
    assert plain.keys() == averaged.keys()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("alpha=0.5", "alpha=0.5 has no effect with form='running'"),
        ("form='wise', every=2", "every=2 has no effect with form='wise'"),
    ],
)
def test_options_without_meaning_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_method(f"finetune + weight_average({options})")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["weight_average", "inflora + weight_average", "probe + weight_average"])
def test_where_tasks_share_nothing_it_is_refused_when_built(spec: str) -> None:
    with pytest.raises(ValueError, match=r"^weight_average has nothing to protect in .*parameters that tasks share"):
        make_method(spec)


def test_a_task_that_trains_nothing_shared_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^task 2: weight_average has no effect where no part trains what tasks"):
        lab.taught("lora(rank=2, tasks=2) + weight_average")


def test_a_task_too_short_for_its_interval_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^every=4: task 0 had no more than 4 steps, .* such as every=1$"):
        lab.taught("lora(rank=2) + weight_average(every=4)")
