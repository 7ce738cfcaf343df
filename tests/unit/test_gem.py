"""GEM: the projected gradient breaks no constraint, and is the closest one that does not."""

from itertools import product
from typing import Any

import pytest
import torch

from perdure.methods.gem import Unsolved, check_projection, solve_dual


def products_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([old, new.unsqueeze(0)]).double()
    return rows @ rows.T


def by_trying_all(old: torch.Tensor, new: torch.Tensor, margin: float) -> torch.Tensor:
    """The dual's solution: of every choice of weights that stay at the margin, the best that is allowed."""
    gram, linear = old @ old.T, old @ new
    best, least = None, float("inf")
    for bound in product([True, False], repeat=len(old)):
        at = torch.tensor(bound)
        v = torch.full_like(linear, margin)
        if not at.all():
            right = -linear[~at] - gram[~at][:, at] @ v[at]
            v[~at] = torch.linalg.lstsq(gram[~at][:, ~at], right.unsqueeze(1)).solution[:, 0]
        value = float(0.5 * v @ gram @ v + linear @ v)
        if bool((v >= margin - 1e-9).all()) and value < least:
            best, least = v, value
    assert best is not None
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_the_solution_keeps_every_constraint_and_is_the_best_one(seed: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    old *= 10.0 ** torch.randint(-2, 3, (4, 1), generator=generator)
    new = torch.randn(7, dtype=torch.float64, generator=generator)
    weights = solve_dual(products_of(old, new), margin)
    if bool((old @ new >= 0).all()):
        assert weights is None
        return
    assert weights is not None
    assert bool((weights >= margin - 1e-12).all())
    projected = new + weights @ old
    assert bool((old @ projected >= -1e-7 * old.norm(dim=1) * projected.norm()).all())
    best = new + by_trying_all(old, new, margin) @ old
    torch.testing.assert_close(projected, best, rtol=1e-6, atol=1e-7)


def test_one_task_without_a_margin_is_the_projection_of_a_gem() -> None:
    old, new = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([-1.0, 0.0]).double()
    weights = solve_dual(products_of(old, new), 0.0)
    assert weights is not None
    torch.testing.assert_close(new + weights @ old, torch.tensor([-0.64, 0.48]).double())


def test_an_old_gradient_of_length_zero_weighs_nothing_and_two_equal_ones_are_no_trouble() -> None:
    same = torch.tensor([1.0, 1.0, 0.0])
    old = torch.stack([torch.zeros(3), same, same]).double()
    new = torch.tensor([-1.0, -2.0, 5.0]).double()
    weights = solve_dual(products_of(old, new), 0.0)
    assert weights is not None
    assert weights[0] == 0
    torch.testing.assert_close(new + weights @ old, torch.tensor([0.5, -0.5, 5.0]).double(), rtol=0, atol=1e-8)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    new = -old.sum(0)
    weights = solve_dual(products_of(old, new), 0.5)
    tiny = solve_dual(products_of(1e-9 * old, 1e-9 * new), 0.5)
    assert weights is not None
    assert tiny is not None
    torch.testing.assert_close(weights, tiny)


def test_a_broken_constraint_is_an_error() -> None:
    old, new = torch.eye(2).double(), torch.tensor([-1.0, 1.0]).double()
    products, weights = products_of(old, new), torch.tensor([1.0, 0.0]).double()
    check_projection(torch.tensor([0.0, 1.0]).double(), products, weights)
    for after in ([-1e-3, 1.0], [float("nan"), 1.0]):
        with pytest.raises(Unsolved, match="points against an old task's"):
            check_projection(torch.tensor(after).double(), products, weights)


def gradients(learner: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.trainable().values()])


def stepped(lab: Any, spec: str, seed: int = 0) -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
    """A learner before a step of its third task, the batch, the loss's gradient and those on the memories' batches."""
    learner, stream = lab.but(seed=seed).learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:2], epochs=4)
    learner.grow(stream.tasks[2])
    lab.descend(learner, stream.tasks[2], steps=3)
    batch = learner.method.batch(learner, stream.tasks[2].train.__getitems__(range(16)))
    (gem,) = (part for part in learner.method.parts if part.name == "gem")
    old = []
    for each in gem._old:
        learner.zero_grad()
        learner.objective.losses(learner.encode(each), each, only_task=False).mean().backward()
        old.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                    for p in learner.trainable().values()
                ]
            )
        )
    learner.zero_grad()
    learner.loss(batch).backward()
    return learner, gem, gradients(learner), old


@pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune", "inflora(rank=2)"])
def test_after_backward_turns_the_gradient_so_far_that_no_old_loss_rises(carrier: str, lab: Any) -> None:
    learner, gem, new, old = stepped(lab, f"{carrier} + gem(margin=0)")
    assert len(old) == 2
    if min(float(g @ new) for g in old) >= 0:
        new = -new
        for p in learner.trainable().values():
            p.grad.neg_()
    assert min(float(g @ new) for g in old) < 0
    gem.after_backward(learner)
    turned = gradients(learner)
    for g in old:
        assert float(g @ turned) >= -1e-5 * float(g.norm() * new.norm())
    weights = solve_dual(products_of(torch.stack(old), new), 0.0)
    assert weights is not None
    torch.testing.assert_close(turned, new + weights.float() @ torch.stack(old), rtol=1e-4, atol=1e-5)


def test_a_gradient_that_no_old_task_objects_to_stays_as_it_is(lab: Any) -> None:
    learner, gem, _, old = stepped(lab, "lora(rank=2) + gem")
    agreeing, start = sum(g / g.norm() for g in old), 0
    assert all(float(g @ agreeing) > 0 for g in old)
    for p in learner.trainable().values():
        p.grad = agreeing[start : start + p.numel()].view_as(p).clone()
        start += p.numel()
    before = gradients(learner)
    gem.after_backward(learner)
    assert torch.equal(gradients(learner), before)


def test_each_past_task_is_asked_with_its_own_examples(lab: Any) -> None:
    _, gem, _, _ = stepped(lab, "lora(rank=2) + gem(size=20, batch_size=3)")
    stream = lab.stream()
    assert [set(batch["label"].tolist()) <= set(stream.tasks[k].classes) for k, batch in enumerate(gem._old)] == [
        True
    ] * 2
    assert [len(batch["label"]) for batch in gem._old] == [3, 3]


def test_in_a_domain_incremental_stream_each_past_task_has_a_say_too(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner, stream = bench.learner("lora(rank=2) + gem(size=8)"), bench.stream()
    bench.teach(learner, stream.tasks[:2], epochs=1)
    learner.grow(stream.tasks[2])
    learner.method.batch(learner, stream.tasks[2].train.__getitems__(range(4)))
    assert [len(batch["label"]) for batch in learner.method.parts[1]._old] == [4, 4]


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_heads_on_frozen_features_learn_under_constraints_too(scenario: str, lab: Any) -> None:
    bench = lab.but(scenario=scenario)
    masked = "gem(mask=True)" if scenario == "class" else "gem"
    plain, gem = (bench.taught(spec, epochs=6) for spec in ("probe", f"probe + {masked}"))
    changed = [n for n, p in plain.objective.named_parameters() if not torch.equal(p, gem.objective.get_parameter(n))]
    assert changed == (
        ["heads.1.weight", "heads.1.bias", "heads.2.weight", "heads.2.bias"]
        if scenario == "class"
        else ["heads.0.weight", "heads.0.bias"]
    )
