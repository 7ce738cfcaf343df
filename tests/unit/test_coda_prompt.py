"""CODA-Prompt: the formula, components that stay as they were, orthogonal starts and the penalty."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import make_method, make_objective
from perdure.types import Task

NAMES = ("key", "filter", "prompt")


def grown(spec: str, tasks: int = 1, total: int | None = 3, dim: int = 32, depth: int = 2) -> Core:
    """A learner that has grown for some tasks, with what it starts from."""
    learner = Core(tiny(dim=dim, depth=depth), make_objective("classify"), make_method(spec))
    for index in range(tasks):
        learner.grow(Task(index, str(index), (2 * index, 2 * index + 1), (f"a{index}", f"b{index}"), total))
    return learner


def components(learner: Core, name: str) -> Tensor:
    """All of one kind, former tasks first, (blocks, components, ...)."""
    method = learner.method.of("vision")
    parts = [method.past[name]] if name in method.past else []
    return torch.cat([*parts, method.new[name]], dim=1)


def test_prompts_are_the_papers_sum_over_all_components_in_every_block(lab: Any) -> None:
    bench = lab.but(dim=32)
    learner = bench.teach(bench.learner("coda_prompt(components=3)"), bench.stream().tasks[:2])
    images = bench.stream().tasks[1].test.__getitems__(range(5))
    keys, filters, prompts = (components(learner, name) for name in NAMES)
    assert keys.shape == filters.shape == (2, 6, 32)
    assert prompts.shape == (2, 6, 4, 64)
    with torch.no_grad():
        asked = learner.backbone(images)
        blocks = []
        for k, a, p in zip(keys, filters, prompts, strict=True):
            weights = F.cosine_similarity(asked[:, None] * a, k[None].expand(5, -1, -1), dim=2)
            blocks.append(torch.einsum("bm,mld->bld", weights, p))
        with learner.method.of("vision").prefix.using(blocks):
            expected = learner.backbone(images)
        torch.testing.assert_close(learner.encode(images), expected, rtol=1e-4, atol=1e-5)


def test_components_of_former_tasks_stay_and_go_on_contributing(lab: Any) -> None:
    stream = lab.stream()
    learner = lab.teach(lab.learner("coda_prompt(components=2)"), stream.tasks[:1])
    before = {name: learner.method.of("vision").new[name].detach().clone() for name in NAMES}
    lab.teach(learner, stream.tasks[1:2])
    for name in NAMES:
        assert torch.equal(learner.method.of("vision").past[name], before[name])
        assert not torch.equal(learner.method.of("vision").new[name], before[name])
    trained = [n for n in learner.trainable() if n.startswith("method")]
    assert sorted(trained) == [f"method.towers.vision.new.{name}" for name in ("filter", "key", "prompt")]
    assert [n for n in learner.shared() if n.startswith("method")] == []
    images = stream.tasks[0].test.__getitems__(range(4))
    with torch.no_grad():
        whole = learner.encode(images)
        learner.method.of("vision").past["prompt"] = torch.zeros_like(learner.method.of("vision").past["prompt"])
        assert (learner.encode(images) - whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_new_components_start_as_unit_vectors_orthogonal_to_each_other_and_to_old_ones(name: str) -> None:
    learner = grown("coda_prompt(components=5)")
    with torch.no_grad():  # training leaves old ones neither orthogonal nor of unit length
        for value in learner.method.of("vision").new.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    learner.grow(Task(1, "1", (2, 3), ("c", "d"), 3))
    new = learner.method.of("vision").new[name].flatten(2)
    torch.testing.assert_close(new @ new.mT, torch.eye(5).expand(2, 5, 5), rtol=0, atol=1e-5)
    assert (new @ learner.method.of("vision").past[name].flatten(2).mT).abs().max() < 1e-5
    other = grown("coda_prompt(components=5, start='random')", 2)
    new = other.method.of("vision").new[name].flatten(2)
    torch.testing.assert_close(new.norm(dim=2), torch.ones(2, 5))
    assert (new @ other.method.of("vision").past[name].flatten(2).mT).abs().max() > 1e-3


def test_a_stream_longer_than_announced_starts_from_random_directions() -> None:
    learner = grown("coda_prompt(components=10)", 4)
    assert components(learner, "key").shape[1] == 40
    torch.testing.assert_close(learner.method.of("vision").new["key"].norm(dim=2), torch.ones(2, 10))
    prompts = (
        learner.method.of("vision").new["prompt"].flatten(2) @ learner.method.of("vision").past["prompt"].flatten(2).mT
    )
    assert prompts.abs().max() < 1e-5  # which have more dimensions than keys


@pytest.mark.parametrize(
    ("dim", "total", "each"), [(128, 10, 10), (128, 30, 3), (32, 4, 8), (8, 20, 1), (128, None, 10), (32, None, 3)]
)
def test_components_are_shared_out_among_the_tasks(dim: int, total: int | None, each: int) -> None:
    assert grown("coda_prompt", 1, total, dim).method.of("vision").new["key"].shape[1] == each


@pytest.mark.parametrize(("depth", "blocks"), [(2, 2), (5, 5), (7, 5)])
def test_prompts_stand_in_the_papers_blocks_as_far_as_there_are_so_many(depth: int, blocks: int) -> None:
    learner = grown("coda_prompt", depth=depth, dim=8)
    assert len(learner.method.of("vision").new["key"]) == blocks
    assert len(grown("coda_prompt(blocks='1')", depth=depth, dim=8).method.of("vision").new["key"]) == 1


def test_penalty_is_that_of_all_components_but_for_a_constant() -> None:
    learner = grown("coda_prompt(strength=0.1, components=3, start='random')", 2)
    with torch.no_grad():
        for value in learner.method.of("vision").new.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    batch: dict[str, Tensor] = {}
    found = learner.method.penalty(learner, batch, torch.empty(0))
    found.backward()
    leaves, expected, constant = {}, torch.zeros(()), torch.zeros(())
    for name in NAMES:
        old = learner.method.of("vision").past[name].flatten(2)
        leaves[name] = learner.method.of("vision").new[name].detach().requires_grad_()
        both = torch.cat([old, leaves[name].flatten(2)], dim=1)
        expected = expected + 0.1 * (both @ both.mT - torch.eye(6)).square().mean(dim=(1, 2)).sum()
        constant = constant + 0.1 * (old @ old.mT - torch.eye(3)).square().sum() / 36
    torch.testing.assert_close(found, expected - constant)
    expected.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(learner.method.of("vision").new[name].grad, leaf.grad)


def test_strength_0_adds_nothing_to_the_loss(lab: Any) -> None:
    learner = grown("coda_prompt")
    assert learner.method.penalty(learner, {}, torch.empty(0)) == 0.0


def test_more_orthogonal_components_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"would need 33 orthogonal keys in 32 features; write at most 10, or start="):
        grown("coda_prompt(components=11)")
    assert grown("coda_prompt(components=11, start='random')").method.of("vision").new["key"].shape[1] == 11
