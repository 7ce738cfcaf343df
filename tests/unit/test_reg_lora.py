"""Held entries: which they are, what they cost, and that later tasks spare them."""

from typing import Any

import pytest
import torch

from perdure.mechanisms.held_entries import HeldEntries


def test_the_largest_entries_of_each_task_are_held_once() -> None:
    held = HeldEntries(0.2)
    first, second = torch.arange(1.0, 16).view(3, 5), -torch.arange(1.0, 16).flip(0).view(3, 5)
    held.add("a", first)
    assert held.mask("a", 15).nonzero().flatten().tolist() == [12, 13, 14]
    held.add("a", second)
    held.add("a", first)
    assert held.mask("a", 15).nonzero().flatten().tolist() == [0, 1, 2, 12, 13, 14]
    assert {key: len(value) for key, value in held.bits.items()} == {"a": 2}


def test_entries_that_are_zero_never_matter() -> None:
    held = HeldEntries(0.5)
    held.add("a", torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert held.mask("a", 4).tolist() == [False, True, False, False]
    held.add("b", torch.zeros(2, 2))
    up, down = torch.randn(2, 1), torch.randn(1, 2)
    assert held.size("b", up, down) == 0


def test_value_and_gradients_are_those_of_the_mean_of_the_held_entries() -> None:
    torch.manual_seed(0)
    held, up, down = HeldEntries(0.3), torch.randn(7, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    held.add("a", torch.randn(7, 5))
    plain = (up @ down).abs()[held.mask("a", 35).view(7, 5)].mean()
    wanted = torch.autograd.grad(plain, (up, down))
    found = held.size("a", up, down)
    torch.testing.assert_close(found, plain)
    for one, other in zip(torch.autograd.grad(found, (up, down)), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_without_strength_it_is_lora_with_a_branch_a_task_bit_for_bit(lab: Any) -> None:
    plain = lab.taught("lora(rank=2, at='qkvo,mlp', per_task=True)").learnt_state()
    found = lab.taught("reg_lora(rank=2, strength=0)").learnt_state()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("place", [{}, {"objective": "zeroshot"}])
def test_what_former_tasks_moved_most_moves_less(place: Any, lab: Any) -> None:
    moved = []
    for strength in (0.001, 2500):
        bench = lab.but(**place, tasks=2)
        learner, (first, second) = bench.learner(f"reg_lora(rank=2, strength={strength})"), bench.stream().tasks
        bench.teach(learner, [first])
        masks = {n: learner.method.held.mask(n, 10**6) for n in learner.method.held.bits}
        before = [adapter.delta(0, False) for adapter in learner.method.adapters]
        bench.teach(learner, [second])
        after = [adapter.delta(0, False) for adapter in learner.method.adapters]
        steps = [(b - a).flatten() for a, b in zip(before, after, strict=True)]
        moved.append(sum(float(s[masks[str(n)][: len(s)]].abs().sum()) for n, s in enumerate(steps)))
    assert moved[1] < 0.2 * moved[0]


def test_the_penalty_is_the_mean_over_layers_of_what_the_open_branch_does_to_what_is_held(lab: Any) -> None:
    learner, tasks = lab.learner("reg_lora(rank=2, alpha=6, strength=10, share=0.1)"), lab.stream().tasks
    lab.teach(learner, tasks[:1])
    learner.grow(tasks[1])
    method, means, entries = learner.method, [], []
    for number, adapter in enumerate(method.adapters):
        torch.nn.init.normal_(adapter.up[0])
        update = (3 * adapter.up[0] @ adapter.down).abs().flatten()
        entries.append(update.numel())
        means.append(update[method.held.mask(str(number), update.numel())].mean())
    torch.testing.assert_close(method.penalty(learner, {}, torch.empty(0)), 10 * torch.stack(means).mean())
    held = sum(round(0.1 * count) for count in entries)
    assert method.measures(learner)["held_share"] == pytest.approx(held / sum(entries))
