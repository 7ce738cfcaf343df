"""GPM: what old inputs give does not move, whatever the optimizer makes of the gradient."""

from typing import Any

import pytest
import torch

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.config import make_method, make_objective
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Stream, Task

WHOLE = "keep=1.0, schedule='fixed'"


def wide(method: str, fused: bool = True, text: bool = False) -> tuple[Core, Stream]:
    """A learner whose layers have more inputs (64) than a task has tokens, so that each leaves some free."""
    backbone = tiny(dim=64, size=8, fused=fused, text=text)
    spec = "synthetic(tasks=3, classes_per_task=2, per_class=2, size=8, noise=0.3)"
    objective = make_objective("zeroshot" if text else "classify")
    return Core(backbone, objective, make_method(method), "class", 0), build_stream(spec, backbone.preprocess, 0)


def learn(learner: Core, task: Task, **more: Any) -> None:
    learner.grow(task)
    fit_task(learner, task, TrainConfig(**{"epochs": 3, "batch_size": 4, "lr": 5e-2} | more))


def outputs(learner: Core, task: Task) -> dict[str, torch.Tensor]:
    """What every linear layer of the vision tower gives on the task's training images."""
    found, layers = {}, learner.method._layers
    handles = [
        learner.backbone.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: found.__setitem__(name, y.detach().clone())
        )
        for name in layers
    ]
    with torch.no_grad():
        learner.objective.scores(learner.encode(task.train.__getitems__(range(len(task.train)))))
    for handle in handles:
        handle.remove()
    assert found.keys() == layers.keys()
    return found


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(("at", "fused"), [("qkvo,mlp", True), ("qkvo,mlp", False), ("kv,fc1", True), ("qv", False)])
def test_no_layers_output_on_old_inputs_moves_whatever_the_optimizer(optimizer: Any, at: str, fused: bool) -> None:
    learner, stream = wide(f"gpm(at='{at}', {WHOLE}, backbone_lr=1.0)", fused)
    learn(learner, stream.tasks[0])
    before, other = outputs(learner, stream.tasks[0]), outputs(learner, stream.tasks[1])
    learn(learner, stream.tasks[1], optimizer=optimizer, weight_decay=0.1)
    after, moved = outputs(learner, stream.tasks[0]), outputs(learner, stream.tasks[1])
    for name, was in before.items():
        # the root of the share of the energy that counts as rounding
        assert (after[name] - was).abs().max() < 1e-4 * was.abs().max(), name
        assert (moved[name] - other[name]).abs().max() > 1e-3 * was.abs().max(), name


def test_without_protection_the_same_training_moves_them() -> None:
    learner, stream = wide(f"gpm({WHOLE}, backbone_lr=1.0)")
    learn(learner, stream.tasks[0])
    before = outputs(learner, stream.tasks[0])
    learner.method.subspaces.clear()
    learn(learner, stream.tasks[1])
    after = outputs(learner, stream.tasks[0])
    assert all((after[name] - was).abs().max() > 0.1 * was.abs().max() for name, was in before.items())


def test_under_adam_the_step_stays_in_the_free_space_though_its_own_directions_do_not() -> None:
    learner, stream = wide("gpm(keep=0.9, backbone_lr=1.0)")
    learn(learner, stream.tasks[0])
    start = {name: learner.backbone.get_parameter(f"{name}.weight").clone() for name in learner.method._layers}
    learner.grow(stream.tasks[1])
    spaces = {name: learner.method.subspaces.of(sites[0].input, 64) for name, sites in learner.method._layers.items()}
    learner.method.begin_task(learner, stream.tasks[1])
    weights = {name: learner.backbone.get_parameter(f"{name}.weight") for name in start}
    optimizer = torch.optim.Adam(weights.values(), 1e-2)
    batch = stream.tasks[1].train.__getitems__(range(4))
    for _ in range(3):
        optimizer.zero_grad()
        learner.loss(batch).backward()
        learner.method.after_backward(learner)
        for name, weight in weights.items():
            gradient = weight.grad
            assert spaces[name].inside(gradient).norm() < 1e-5 * gradient.norm(), name
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer.step()
        for name, weight in weights.items():
            step = (weight - before[name]).detach()
            assert spaces[name].inside(step).norm() > 0.01 * step.norm(), name
        learner.method.after_step(learner, batch)
    for name, weight in weights.items():
        step = (weight - start[name]).detach()
        assert spaces[name].inside(step).norm() < 1e-4 * step.norm(), name
        assert step.norm() > 0.01


def test_rows_of_a_fused_layer_that_were_not_chosen_never_move() -> None:
    learner, stream = wide("gpm(at='kv', backbone_lr=1.0)")
    pretrained = tiny(dim=64, size=8).state_dict()
    for task in stream.tasks[:2]:
        learn(learner, task, optimizer="adamw", weight_decay=0.1)
        for i in range(2):
            q, k, v = (
                learner.backbone.vision.blocks[i].attn.qkv.weight - pretrained[f"vision.blocks.{i}.attn.qkv.weight"]
            ).chunk(3)
            assert not q.any()
            assert k.any()
            assert v.any()


def test_fused_and_separate_projections_learn_the_same() -> None:
    features = []
    for fused in (True, False):
        learner, stream = wide("gpm(at='kvo', keep=0.9)", fused)
        for task in stream.tasks[:2]:
            learn(learner, task, optimizer="sgd")
        features.append(learner.features(stream.tasks[0].test)[0])
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-3)


def test_only_weights_of_the_chosen_layers_are_trained() -> None:
    learner, stream = wide("gpm(at='kv,fc1', blocks='1')")
    learner.grow(stream.tasks[0])
    assert sorted(n for n in learner.trainable() if n.startswith("backbone.")) == [
        "backbone.vision.blocks.1.attn.qkv.weight",
        "backbone.vision.blocks.1.mlp.fc1.weight",
    ]
    assert set(learner.method.param_groups(learner)) <= set(learner.trainable())


def test_an_exhausted_space_ends_plasticity_but_not_the_run() -> None:
    learner, stream = wide(f"gpm({WHOLE})")
    learn(learner, stream.tasks[0])
    space = learner.method.subspaces
    for key, site in learner.method._inputs.items():
        space.keep(key, space.of(key, site.fan_in).take(torch.eye(site.fan_in).double(), 1.0))
    assert {v for k, v in learner.method.measures(learner).items() if k.startswith("occupied_share")} == {1.0}
    before = learner.features(stream.tasks[2].test)[0]
    learn(learner, stream.tasks[1])
    assert torch.equal(learner.features(stream.tasks[2].test)[0], before)


def test_free_dimensions_never_grow_back_and_starts_are_not_kept() -> None:
    learner, stream = wide("gpm(keep=0.8)")
    free = []
    for task in stream:
        learn(learner, task)
        facts = learner.method.measures(learner)
        free.append(facts["free_dimension/vision.blocks.1:qkv"])
        assert facts["occupied_share/vision.blocks.1:qkv"] == 1 - free[-1] / 64
        assert not learner.method.start
    assert free == sorted(free, reverse=True)
    assert len(set(free)) == 3


def test_a_text_tower_keeps_what_old_class_names_give() -> None:
    learner, stream = wide(f"gpm(tower='text', {WHOLE}, backbone_lr=1.0)", text=True)
    learn(learner, stream.tasks[0])
    names, other = (list(stream.tasks[i].names) for i in (0, 1))
    with torch.no_grad():
        before, others = learner.objective.embed(names), learner.objective.embed(other)
    learn(learner, stream.tasks[1])
    with torch.no_grad():
        assert (learner.objective.embed(names) - before).abs().max() < 1e-3
        assert (learner.objective.embed(other) - others).abs().max() > 1e-2


def test_a_tower_that_the_loss_does_not_reach_is_an_error() -> None:
    backbone = tiny(dim=64, size=8, text=True)
    learner = Core(backbone, make_objective("classify"), make_method("gpm(tower='both')"), "class", 0)
    with pytest.raises(ValueError, match="gets no gradient, the loss does not depend on it"):
        learn(learner, build_stream("synthetic(size=8)", backbone.preprocess, 0).tasks[0])
