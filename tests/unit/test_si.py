"""SI: what parameters did for the task's own loss while they moved."""

from typing import Any

import pytest
import torch

from perdure.types import Task


def walk(learner: Any, task: Task, steps: int, lr: float, **sgd: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """-Σ g Δθ with the gradient of the task's own loss, asked for by itself, and those losses."""
    learner.train()
    learner.prepare()
    learner.method.begin_task(learner, task)
    params = learner.trainable()
    optimizer = torch.optim.SGD(params.values(), lr, **sgd)
    path, losses = {name: torch.zeros_like(p) for name, p in params.items()}, []
    batch = task.train.__getitems__(range(len(task.train)))
    for _ in range(steps):
        own = learner.objective.loss(learner.encode(batch), batch)
        losses.append(own.item())
        gradients = torch.autograd.grad(own, list(params.values()))
        before = [p.detach().clone() for p in params.values()]
        optimizer.zero_grad()
        learner.loss(batch).backward()
        learner.method.after_backward(learner)
        optimizer.step()
        learner.method.after_step(learner, batch)
        for (name, p), g, old in zip(params.items(), gradients, before, strict=True):
            path[name] -= g * (p.detach() - old)
    return path, losses


def test_the_path_is_that_of_the_task_s_own_loss_without_the_pull(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner, stream = bench.learner("lora(rank=2) + si(strength=50)"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    si, second = learner.method.parts[1], stream.tasks[1]
    learner.grow(second)
    path, _ = walk(learner, second, 4, 5e-3, momentum=0.9)
    assert si.quadratic_penalty.gradient(learner.trainable()).keys() == path.keys()
    pulls = torch.cat([force.flatten() for force in si.quadratic_penalty.gradient(learner.trainable()).values()])
    assert 50 * pulls.norm() > 1  # there was something to take off
    assert si.path.keys() == path.keys()
    for name, expected in path.items():
        torch.testing.assert_close(si.path[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune"])
def test_over_small_steps_the_path_adds_up_to_the_fall_of_the_loss(carrier: str, lab: Any) -> None:
    learner, task = lab.learner(f"{carrier} + si"), lab.stream().tasks[0]
    learner.grow(task)
    _, losses = walk(learner, task, 50, 8e-3)
    fall = losses[0] - losses[-1]
    assert fall > 0.05
    assert sum(v.sum().item() for v in learner.method.parts[1].path.values()) == pytest.approx(fall, rel=0.03)


def test_importance_is_the_path_over_the_damped_square_of_the_way(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + si(damping=0.25)"), lab.stream()
    si, name = learner.method.parts[1], "method.parts.0.adapters.0.up.0"
    totals: dict[str, torch.Tensor] = {}
    for task in stream.tasks[:2]:
        learner.grow(task)
        learner.method.begin_task(learner, task)
        generator = torch.Generator().manual_seed(task.index)
        raw = {}
        with torch.no_grad():
            for key, p in learner.trainable().items():
                si.path[key] = torch.randn(p.shape, generator=generator)
                way = torch.randn(p.shape, generator=generator)
                p.add_(way)
                raw[key] = si.path[key].clamp_min(0) / (way**2 + 0.25)
        mean = torch.cat([value.flatten() for value in raw.values()]).mean()
        totals = {key: totals.get(key, 0) + value / mean for key, value in raw.items()}
        learner.method.end_task(learner, task)
        learner.learnt += 1
        assert si.quadratic_penalty.weights.keys() == totals.keys()
        for key, value in totals.items():
            torch.testing.assert_close(si.quadratic_penalty.weights[key], value, rtol=1e-3, atol=1e-4)
            assert torch.equal(si.quadratic_penalty.anchors[key], learner.get_parameter(key))
        assert not si.path
        assert not si.start
    assert (si.quadratic_penalty.weights[name] > 0).any()
    assert (si.quadratic_penalty.weights[name] == 0).any()  # what made the loss rise is not important


def test_a_task_in_which_nothing_moved_adds_nothing(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + si"), lab.stream()
    for task in stream.tasks[:2]:
        learner.grow(task)
        learner.method.begin_task(learner, task)
        learner.method.end_task(learner, task)
        learner.learnt += 1
    assert not any(weight.any() for weight in learner.method.parts[1].quadratic_penalty.weights.values())
    assert learner.loss(task.train.__getitems__(range(4))).isfinite()
