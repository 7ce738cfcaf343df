"""InfLoRA: whatever a new branch becomes, old inputs do not notice."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.core.method import parts_of
from perdure.streams import build_stream
from perdure.training.config import make_method, make_objective
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Stream


def wide(method: str, seed: int = 0, tasks: int = 3, per_class: int = 4, noise: float = 0.3) -> tuple[Core, Stream]:
    """A learner whose layers have more inputs (64) than a task has tokens, so that each leaves some free."""
    backbone = tiny(dim=64, size=8)
    spec = f"synthetic(tasks={tasks}, classes_per_task=2, per_class={per_class}, size=8, noise={noise})"
    stream = build_stream(spec, backbone.preprocess, seed)
    return Core(backbone, make_objective("classify"), make_method(method), "class", seed), stream


def features(learner: Core, task: Any, part: str = "test") -> torch.Tensor:
    return learner.features(getattr(task, part))[0]


def test_features_of_old_images_do_not_change_whatever_the_new_branch_is() -> None:
    learner, stream = wide("inflora(rank=4, keep=1.0, power=1, schedule='fixed')", per_class=2)
    first, second = stream.tasks[:2]
    learner.grow(first)
    fit_task(learner, first, TrainConfig(epochs=2, batch_size=4, lr=1e-2))
    learner.grow(second)
    learner.method.begin_task(learner, second)
    old, new = features(learner, first, "train"), features(learner, second, "train")
    for adapter in learner.method.adapters.values():
        assert adapter.down.norm(dim=1).min() > 0.5  # there is free space left
        for up in adapter.up:
            nn.init.normal_(up)
    assert (features(learner, first, "train") - old).abs().max() < 1e-3
    assert (features(learner, second, "train") - new).abs().max() > 0.3


def test_the_rows_of_b_are_orthogonal_of_the_papers_length_and_avoid_the_stored_space() -> None:
    learner, stream = wide("inflora(rank=4, keep=0.9)", tasks=4)
    for task in stream:
        learner.grow(task)
        learner.method.begin_task(learner, task)
        for key, adapter in learner.method.adapters.items():
            rows, space = adapter.down.double(), learner.method._space(key)
            torch.testing.assert_close(rows @ rows.T, torch.eye(4).double() / 3, rtol=0, atol=1e-6)
            inside = rows @ space.basis @ space.basis.T
            leak = inside if space.kind == "taken" else rows - inside
            assert leak.abs().max() < 1e-6
        fit_task(learner, task, TrainConfig(epochs=1, batch_size=8))


@pytest.mark.parametrize("fused", [True, False])
def test_layers_that_read_the_same_input_share_one_b(fused: bool, lab: Any) -> None:
    learner, task = lab.but(fused=fused).learner("inflora(rank=2, at='kvo')"), lab.stream().tasks[0]
    learner.grow(task)
    assert {(key, len(a.up)) for key, a in learner.method.adapters.items()} == {
        ("vision/blocks/0:qkv", 2),
        ("vision/blocks/0:o", 1),
        ("vision/blocks/1:qkv", 2),
        ("vision/blocks/1:o", 1),
    }
    assert all(name.startswith("objective") or ".up." in name for name in learner.trainable())


def test_fused_and_separate_projections_learn_the_same(lab: Any) -> None:
    one, other = (lab.but(fused=fused).taught("inflora(rank=2)") for fused in (True, False))
    images = lab.stream().tasks[0].test
    torch.testing.assert_close(one.features(images)[0], other.features(images)[0], rtol=1e-3, atol=1e-3)


def test_an_exhausted_space_ends_plasticity_but_not_the_run(lab: Any, tmp_path: Any) -> None:
    bench = lab.but(tasks=4)
    summary = bench.run("inflora(rank=4, keep=1.0, power=1)", tmp_path)
    assert len(summary["matrix"]) == 4
    learner = bench.taught("inflora(rank=4, keep=1.0, power=1)")
    facts = learner.method.measures(learner)
    # the direction that layer norms leave without any input is no task's, and nothing is learnt in it
    assert {v for k, v in facts.items() if k.startswith("free_dimension/")} == {1}
    assert {v for k, v in facts.items() if k.startswith("occupied_share/")} == {15 / 16}
    images = bench.stream().tasks[0].test
    before = learner.features(images)[0]
    bench.teach(learner, [bench.stream().tasks[3]])
    torch.testing.assert_close(learner.features(images)[0], before, rtol=0, atol=1e-6)  # some processors round


def test_free_dimensions_never_grow_back(lab: Any) -> None:
    learner, stream = wide("inflora(rank=2, keep=0.8)", tasks=4)
    free = []
    for task in stream:
        learner.grow(task)
        fit_task(learner, task, TrainConfig(epochs=1, batch_size=8))
        measures = learner.method.measures(learner)
        free.append(measures["free_dimension/vision.blocks.1:qkv"])
        assert measures["occupied_share/vision.blocks.1:qkv"] == 1 - free[-1] / 64
    assert free == sorted(free, reverse=True)
    assert len(set(free)) == len(free)


def drift(method: str, seed: int) -> float:
    """How far the features of the first task's images move (1 - cosine) while two more tasks are learnt."""
    learner, stream = wide(method, seed)
    learner.grow(stream.tasks[0])
    fit_task(learner, stream.tasks[0], TrainConfig(epochs=4, batch_size=8, lr=5e-3))
    before = features(learner, stream.tasks[0])
    for task in stream.tasks[1:]:
        learner.grow(task)
        fit_task(learner, task, TrainConfig(epochs=4, batch_size=8, lr=5e-3))
    return float((1 - F.cosine_similarity(before, features(learner, stream.tasks[0]))).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_old_features_drift_at_most_a_third_as_far_as_with_lora(seed: int) -> None:
    # The held-out images of a class lie near its training images, whose space is protected; LoRA protects nothing.
    assert drift("inflora(rank=4, keep=0.99, power=1)", seed) < drift("lora(rank=4)", seed) / 3


def test_without_the_projection_the_past_is_not_avoided() -> None:
    learner, stream = wide("inflora(rank=4, project=False)")
    learner.grow(stream.tasks[0])
    fit_task(learner, stream.tasks[0], TrainConfig(epochs=1, batch_size=8))
    learner.grow(stream.tasks[1])
    learner.method.begin_task(learner, stream.tasks[1])
    key, adapter = next(iter(learner.method.adapters.items()))
    assert (adapter.down.double() @ learner.method._space(key).basis).norm() > 0.1


def test_a_space_is_in_float64_on_the_device_of_the_moments(lab: Any) -> None:
    learner, stream = lab.learner("inflora(rank=2)"), lab.stream()
    for task in stream.tasks[:2]:  # without a past, and with one
        learner.grow(task)
        (key, *_) = learner.method.adapters
        basis = learner.method._space(key, "meta").basis
        assert (basis.device.type, basis.dtype) == ("meta", torch.float64)
        fit_task(learner, task, TrainConfig(epochs=1, batch_size=8))


@pytest.mark.parametrize("more", ["", " + replay(size=4)", " + joint"])
def test_moments_collected_in_the_last_epoch_span_what_a_pass_of_the_same_weights_finds(more: str, lab: Any) -> None:
    found, passes = {}, {}
    for when in ("pass", "training"):
        learner, stream = wide(f"inflora(rank=4, keep=0.9, end_moments={when!r}){more}")
        seen: list[int] = []
        learner.backbone.vision.blocks[0].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(len(args[0]))
        )
        for task in stream.tasks[:2]:
            learner.grow(task)
            fit_task(learner, task, TrainConfig(epochs=2, batch_size=3, lr=1e-12, schedule="constant"))
        inflora = next(part for part in parts_of(learner.method) if part.name == "inflora")
        found[when] = {key: inflora._space(key) for key in inflora.adapters}
        passes[when] = sum(seen)
        assert not inflora.running_moments, "sums that no later task needs are kept"
    for key, space in found["pass"].items():
        other = found["training"][key]
        assert (space.kind, space.free) == (other.kind, other.free)
        torch.testing.assert_close(space.basis @ space.basis.T, other.basis @ other.basis.T, rtol=0, atol=1e-5)
    assert passes["pass"] - passes["training"] == (8 + 16 if "joint" in more else 8 + 8)


def test_at_most_so_many_images_of_the_last_epoch_are_counted(lab: Any) -> None:
    learner, stream = wide("inflora(rank=4, moments=5, end_moments='training')")
    learner.grow(stream.tasks[0])
    counted: list[int] = []
    learner.method.after_step = lambda *_: counted.append(learner.method.running_moments.images)  # type: ignore[method-assign]
    fit_task(learner, stream.tasks[0], TrainConfig(epochs=2, batch_size=3))
    assert counted == [0, 0, 0, 3, 5, 5]


def test_a_run_stopped_in_the_last_epoch_goes_on_with_what_was_collected(
    lab: Any, content_of: Any, tmp_path: Any
) -> None:
    method = "inflora(rank=2, end_moments='training')"
    lab.run(method, tmp_path / "unbroken")
    lab.broken_run(method, tmp_path / "stopped", (1, 4), save_every=3)
    assert content_of(tmp_path / "stopped") == content_of(tmp_path / "unbroken")
