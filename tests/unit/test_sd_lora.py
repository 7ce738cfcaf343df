"""SD-LoRA: directions are frozen, magnitudes go on learning, and a new task starts from the function of the last."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.types import Batch, Stream, Task


def work(lab: Any, learner: Core, task: Task, steps: int = 4) -> None:
    """Grow for a task and train on it, without ending it."""
    learner.grow(task)
    lab.descend(learner, task, steps)


def logits(learner: Core, images: Batch, columns: int = 2) -> Tensor:
    with torch.no_grad():
        return learner.objective.scores(learner.encode(images))[:, :columns].clone()


def begun(lab: Any, spec: str, tasks: int = 1) -> tuple[Core, Stream, Batch]:
    """A learner that has learnt some tasks."""
    learner, stream = lab.learner(spec), lab.stream()
    for task in stream.tasks[:tasks]:
        work(lab, learner, task)
        lab.close(learner, task)
    return learner, stream, stream.tasks[0].test.__getitems__(range(8))


@pytest.mark.parametrize("normalise", ["paper", "code"])
def test_the_function_jumps_at_a_boundary_as_published(normalise: str, lab: Any) -> None:
    learner, stream, images = begun(lab, f"sd_lora(rank=2, normalise={normalise!r})", tasks=0)
    work(lab, learner, stream.tasks[0])
    before = logits(learner, images)
    lab.close(learner, stream.tasks[0])
    torch.testing.assert_close(logits(learner, images), before, rtol=0, atol=1e-6)  # not yet
    learner.grow(stream.tasks[1])
    assert (logits(learner, images) - before).abs().max() > 0.05


def test_directions_have_norm_one_in_all_layers_together(lab: Any) -> None:
    learner, _, _ = begun(lab, "sd_lora(rank=2)", tasks=2)
    for index in range(2):
        parts = [adapter.direction(index) for adapter in learner.method.adapters]
        assert sum(float((up @ down).square().sum()) for up, down in parts) == pytest.approx(1, rel=1e-5)


def test_published_directions_are_normalised_layer_by_layer(lab: Any) -> None:
    learner, stream, _ = begun(lab, "sd_lora(rank=2, normalise='paper')")
    learner.grow(stream.tasks[1])
    for adapter in learner.method.adapters:
        up, down = adapter.direction(0)
        assert float((up @ down).norm()) == pytest.approx(1, rel=1e-5)
    learner, stream, _ = begun(lab, "sd_lora(rank=2, normalise='code')", tasks=0)
    work(lab, learner, stream.tasks[0])
    expected = [(a.up / (a.up.norm() * a.down.norm())).detach() for a in learner.method.adapters]
    lab.close(learner, stream.tasks[0])
    learner.grow(stream.tasks[1])
    for adapter, up in zip(learner.method.adapters, expected, strict=True):
        torch.testing.assert_close(adapter.direction(0)[0], up)


@pytest.mark.parametrize("normalise", ["paper", "code"])
def test_directions_that_are_divided_already_as_in_older_learners_stay_as_they_are(normalise: str, lab: Any) -> None:
    learner, stream, _ = begun(lab, f"sd_lora(rank=2, normalise={normalise!r})")
    learner.grow(stream.tasks[1])
    before = [adapter.direction(0)[0].clone() for adapter in learner.method.adapters]
    for adapter in learner.method.adapters:
        adapter.normalise(0, learner.method._length)
    for adapter, up in zip(learner.method.adapters, before, strict=True):
        torch.testing.assert_close(adapter.direction(0)[0], up, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("normalise", "kept"), [("jointly", True), ("paper", False), ("code", False)])
def test_only_without_a_jump_are_magnitudes_inherited(normalise: str, kept: bool, lab: Any) -> None:
    learner, stream, _ = begun(lab, f"sd_lora(rank=2, normalise={normalise!r}, magnitude=0.8)", tasks=2)
    before = learner.method.magnitudes.detach().clone()
    learner.grow(stream.tasks[2])
    old = before if kept else torch.full((2,), 0.8)
    assert torch.equal(learner.method.magnitudes, torch.cat([old, torch.tensor([0.8])]))


def test_a_step_trains_all_magnitudes_and_no_former_direction(lab: Any) -> None:
    learner, stream, _ = begun(lab, "sd_lora(rank=2)", tasks=2)
    frozen = [{k: v.clone() for k, v in adapter.frozen.items()} for adapter in learner.method.adapters]
    before = learner.method.magnitudes.detach().clone()
    work(lab, learner, stream.tasks[2])
    assert (learner.method.magnitudes.detach()[:2] != before).all()
    assert learner.method.magnitudes.shape == (3,)  # one a task, for all layers
    for adapter, was in zip(learner.method.adapters, frozen, strict=True):
        assert all(torch.equal(adapter.frozen[k], v) for k, v in was.items())
    trained = {n.split(".")[-1] for n in learner.trainable() if not n.startswith("objective")}
    assert trained == {"up", "down", "magnitudes"}


def test_the_update_is_the_sum_of_directions_times_magnitudes(lab: Any) -> None:
    learner, stream, _ = begun(lab, "sd_lora(rank=2)", tasks=2)
    work(lab, learner, stream.tasks[2])
    magnitudes = learner.method.magnitudes.detach()
    for adapter in learner.method.adapters:
        pairs = [*(adapter.direction(k) for k in range(2)), (adapter.up, adapter.down)]
        expected = sum(m * (up @ down) for m, (up, down) in zip(magnitudes, pairs, strict=True))
        torch.testing.assert_close(adapter.delta(0, branches=True), expected)
        assert adapter.delta(0, branches=False) is None  # nothing is settled: magnitudes go on changing


def test_rank_reduction_gives_later_tasks_smaller_ranks(lab: Any) -> None:
    bench = lab.but(tasks=5, per_class=4)
    learner, ranks = bench.learner("sd_lora(rank=(4, 2, 1), drops=(1, 3))"), []
    for task in bench.stream():
        work(lab, learner, task, steps=1)
        (rank,) = {len(adapter.down) for adapter in learner.method.adapters}
        ranks.append(rank)
        lab.close(learner, task)
    assert ranks == [4, 2, 2, 1, 1]


# Distillation of directions


def put(learner: Core, updates: list[tuple[Tensor, Tensor]]) -> None:
    """Set the open branch."""
    with torch.no_grad():
        for adapter, (up, down) in zip(learner.method.adapters, updates, strict=True):
            adapter.up.copy_(up)
            adapter.down.copy_(down)


def test_a_repeated_update_goes_into_the_old_magnitude(lab: Any) -> None:
    learner, stream, images = begun(lab, "sd_lora(rank=2, magnitude=0.5, distil=9e-4)")
    learner.grow(stream.tasks[1])
    old = learner.method.magnitudes[0].item()
    put(learner, [(0.7 * up, down) for up, down in (a.direction(0) for a in learner.method.adapters)])
    before = logits(learner, images)
    lab.close(learner, stream.tasks[1])
    torch.testing.assert_close(logits(learner, images), before, rtol=0, atol=1e-6)
    measures = learner.method.measures(learner)
    assert measures == {"directions": 1, "magnitude/0": pytest.approx(old + 0.35, rel=1e-5)}
    assert learner.method.magnitudes[1] == 0
    work(lab, learner, stream.tasks[2])
    lab.close(learner, stream.tasks[2])
    measures = learner.method.measures(learner)
    assert measures["directions"] == 2
    assert set(measures) == {"directions", "magnitude/0", "magnitude/2"}


def test_a_mixture_of_former_directions_goes_into_each_magnitude(lab: Any) -> None:
    learner, stream, images = begun(lab, "sd_lora(rank=(2, 4), drops=(2,), magnitude=0.5, distil=9e-4)", tasks=2)
    learner.grow(stream.tasks[2])
    old = learner.method.magnitudes.detach().clone()
    mixed = []
    for adapter in learner.method.adapters:
        (up, down), (other_up, other_down) = adapter.direction(0), adapter.direction(1)
        mixed.append((torch.cat([0.5 * up, -0.3 * other_up], dim=1), torch.cat([down, other_down])))
    put(learner, mixed)
    before = logits(learner, images)
    lab.close(learner, stream.tasks[2])
    torch.testing.assert_close(logits(learner, images), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(learner.method.magnitudes.detach(), old + torch.tensor([0.25, -0.15, -0.5]))
    assert learner.method.measures(learner)["directions"] == 2


@pytest.mark.parametrize("distil", ["9e-4", "None"])
def test_an_independent_update_is_kept_as_a_direction(distil: str, lab: Any) -> None:
    learner, stream, images = begun(lab, f"sd_lora(rank=2, distil={distil})")
    learner.grow(stream.tasks[1])
    # each layer's own direction, but other lengths: one magnitude for all layers cannot say it
    found = [adapter.direction(0) for adapter in learner.method.adapters]
    put(learner, [((1 + i) * up, down) for i, (up, down) in enumerate(found)])
    before = logits(learner, images)
    lab.close(learner, stream.tasks[1])
    torch.testing.assert_close(logits(learner, images), before, rtol=0, atol=1e-6)
    assert learner.method.measures(learner)["directions"] == 2


def test_without_distillation_a_repeated_update_is_a_direction_too(lab: Any) -> None:
    learner, stream, _ = begun(lab, "sd_lora(rank=2)")
    learner.grow(stream.tasks[1])
    put(learner, [adapter.direction(0) for adapter in learner.method.adapters])
    lab.close(learner, stream.tasks[1])
    assert learner.method.measures(learner)["directions"] == 2


def test_an_update_of_nothing_makes_no_number_infinite(lab: Any) -> None:
    learner, stream, images = begun(lab, "sd_lora(rank=2)")
    learner.grow(stream.tasks[1])
    before = logits(learner, images)
    lab.close(learner, stream.tasks[1])
    torch.testing.assert_close(logits(learner, images), before, rtol=0, atol=1e-6)
