"""The low-rank family: penalties against dense calculations, folded against unfolded, strength 0 against plain LoRA."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.adapters.shared_basis import SharedBasis
from perdure.core.learner import Core
from perdure.methods.route_lora import _leading
from perdure.types import Batch, Site, Task

# lora(rank=9) is settled dense from the second task on
MERGED = (
    "lora(rank=2, alpha=3) | lora(rank=2, per_task=True) | lora(rank=9, per_task=True) | o_lora(rank=2) | "
    "c_lora(rank=2) | sd_lora(rank=2) | sd_lora(rank=2, normalise='paper') | "
    "sd_lora(rank=2, normalise='code') | route_lora(rank=2) | "
    "inflora(rank=2) | inflora(ranks=(1, 2)) | fm_lora(rank=4, prompts=0) | fm_lora(rank=4) | "
    "fm_lora(rank=4, share=False)"
)


def everything(task: Task) -> Batch:
    return task.train.__getitems__(range(len(task.train)))


def shake(learner: Core) -> None:
    """Move all that is trained, so that every part of an update is there."""
    generator = torch.Generator().manual_seed(learner.task.index)
    with torch.no_grad():
        for p in learner.trainable().values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def beside(learner: Core, images: Batch) -> Tensor:
    """Features as training computes them, the open branch beside the layers."""
    learner.prepare()
    with torch.no_grad():
        return learner.encode(images).clone()


def folded(learner: Core, images: Batch) -> Tensor:
    with learner.inference():
        return learner.encode(images).clone()


def open_task(learner: Core, task: Task) -> None:
    learner.grow(task)
    learner.train()
    learner.prepare()
    learner.method.begin_task(learner, task)


def close_task(learner: Core, task: Task) -> None:
    learner.method.end_task(learner, task)
    learner.prepare()
    learner.learnt += 1


def updates(learner: Core) -> list[Tensor]:
    return [(adapter.up[0] @ adapter.down).detach() for adapter in learner.method.adapters]


@pytest.mark.parametrize("spec", MERGED.split(" | "))
def test_folded_updates_give_the_features_that_training_sees(spec: str, lab: Any) -> None:
    learner, stream = lab.learner(spec), lab.stream()
    images = stream.tasks[0].test.__getitems__(range(6))
    plain = lab.backbone()(images)
    for task in stream:
        open_task(learner, task)
        shake(learner)
        torch.testing.assert_close(folded(learner, images), beside(learner, images), rtol=1e-5, atol=1e-5)
        close_task(learner, task)
        torch.testing.assert_close(folded(learner, images), beside(learner, images), rtol=1e-5, atol=1e-5)
    assert (folded(learner, images) - plain).abs().max() > 0.1  # there was something to fold


@pytest.mark.parametrize("name", ["c_lora", "o_lora"])
def test_a_penalty_of_strength_0_is_lora_per_task_bit_for_bit(name: str, lab: Any) -> None:
    data = lab.stream().tasks[0].test

    def learnt(spec: str) -> dict[str, Tensor]:
        learner = lab.taught(spec)
        learner.learnt = 3
        kept = {k: v for k, v in learner.learnt_state().items() if "rows" not in k}
        return kept | {"features": learner.features(data)[0]}

    plain, free, held = (
        learnt(spec)
        for spec in ("lora(rank=2, per_task=True)", f"{name}(rank=2, strength=0)", f"{name}(rank=2, strength=9)")
    )
    assert plain.keys() == free.keys()
    assert [k for k in plain if not torch.equal(plain[k], free[k])] == []
    assert not torch.equal(plain["features"], held["features"])


@pytest.mark.parametrize("name", ["c_lora", "o_lora", "route_lora"])
def test_the_first_task_pays_no_penalty(name: str, lab: Any) -> None:
    learner, task = lab.learner(f"{name}(rank=2)"), lab.stream().tasks[0]
    open_task(learner, task)
    shake(learner)
    assert learner.method.penalty(learner, {}, torch.empty(0)) == 0


def test_the_penalty_of_c_lora_is_the_dense_sum_of_squares_over_all_layers(lab: Any) -> None:
    learner, stream = lab.learner("c_lora(rank=2, strength=3.0)"), lab.stream()
    past: list[Tensor] = []
    for task in stream:
        open_task(learner, task)
        shake(learner)
        new = updates(learner)
        if past:
            expected = 3.0 * sum(float((p.abs() * n).square().sum()) for p, n in zip(past, new, strict=True))
            found = learner.method.penalty(learner, {}, torch.empty(0))
            assert found.item() == pytest.approx(expected, rel=1e-4)
            assert expected > 0
            assert torch.autograd.grad(found, learner.method.adapters[0].up[0])[0].any()
        past = (
            [p + n for p, n in zip(past, new, strict=True)] if past else new
        )  # signs may cancel: |sum|, not sum of |.|
        close_task(learner, task)


def test_the_penalty_of_o_lora_is_the_sum_of_absolute_inner_products_with_all_former_rows(lab: Any) -> None:
    learner, stream = lab.learner("o_lora(rank=2, strength=3.0)"), lab.stream()
    past: list[list[Tensor]] = []
    for task in stream:
        open_task(learner, task)
        shake(learner)
        new = [adapter.down.detach().clone() for adapter in learner.method.adapters]
        expected = sum(abs(float(a @ b)) for old in past for i, rows in enumerate(new) for a in old[i] for b in rows)
        found = learner.method.penalty(learner, {}, torch.empty(0))
        assert torch.as_tensor(found).item() == pytest.approx(3.0 * expected, rel=1e-4)
        past.append(new)
        close_task(learner, task)
    assert expected > 0
    assert {rows.shape for rows in learner.method.past_rows.values()} == {(6, 16)}


def test_o_lora_turns_new_rows_away_from_old_ones(lab: Any) -> None:
    def overlap(strength: float) -> float:
        learner = lab.but(tasks=2).taught(f"o_lora(rank=2, strength={strength})", epochs=8)
        return sum(float((rows[:2] @ rows[2:].T).abs().sum()) for rows in learner.method.past_rows.values())

    assert overlap(5.0) < 0.5 * overlap(0.0)


def test_c_lora_changes_less_where_former_tasks_changed_much(lab: Any) -> None:
    def common(strength: float) -> float:
        bench = lab.but(tasks=2, epochs=4, lr=5e-2)
        learner = bench.learner(f"c_lora(rank=2, strength={strength})")
        first, second = bench.stream().tasks
        bench.teach(learner, [first])
        old = [adapter.delta(0, False) for adapter in learner.method.adapters]
        bench.teach(learner, [second])
        new = [adapter.delta(0, False) - past for adapter, past in zip(learner.method.adapters, old, strict=True)]
        return sum(float((o * n).square().sum()) for o, n in zip(old, new, strict=True))

    assert common(1e4) < 0.5 * common(0.0)


# One matrix that routes


def test_the_old_path_of_route_lora_sends_no_gradient_into_its_bases(lab: Any) -> None:
    learner, stream = lab.learner("route_lora(rank=2)"), lab.stream()
    open_task(learner, stream.tasks[0])
    shake(learner)
    close_task(learner, stream.tasks[0])
    open_task(learner, stream.tasks[1])
    adapters = list(learner.method.adapters)
    assert not any(adapter.branch[0].any() for adapter in adapters)  # R_δ starts from 0
    learner.loss(everything(stream.tasks[1])).backward()
    for adapter in adapters:
        assert not adapter.down.grad.any()
        assert not adapter.up.grad.any()
        assert adapter.branch[0].grad.any()
        adapter.branch[0].data.fill_(0.1)
    learner.zero_grad()
    learner.loss(everything(stream.tasks[1])).backward()
    assert all(adapter.down.grad.any() and adapter.up.grad.any() for adapter in adapters)


def test_bases_give_the_gradients_of_an_old_path_that_is_stopped_and_a_new_one() -> None:
    bases = SharedBasis(Site("0.q", "layer", "input", 7, (0, 5)), 3)
    nn.init.normal_(bases.up)
    bases.merged["core"] = torch.randn(3, 3)
    bases.open(torch.randn(3, 3))
    x, y, direction = torch.randn(2, 4, 7, requires_grad=True), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    sources = [x, bases.down, bases.up, bases.branch[0]]
    kept = bases.up.detach() @ bases.core @ bases.down.detach()  # sg[A R_old B]
    written = y + x @ kept.T + x @ (bases.up @ bases.branch[0] @ bases.down).T
    output = bases(x, y, 0)
    torch.testing.assert_close(output, written)
    found = torch.autograd.grad((output * direction).sum(), sources)
    for gradient, expected in zip(found, torch.autograd.grad((written * direction).sum(), sources), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_ewc_finds_the_bases_of_route_lora_important_after_every_task(lab: Any) -> None:
    learner = lab.learner("route_lora(rank=2) + ewc")
    for task in lab.stream().tasks[:2]:
        lab.teach(learner, [task], epochs=1)
        fisher = learner.method.parts[1].fisher
        found = {
            name.removeprefix("method.parts.0.adapters."): value
            for name, value in fisher.items()
            if ".adapters." in name
        }
        assert set(found) == {f"{layer}.{factor}" for layer in range(4) for factor in ("down", "up")}
        assert all(value.any() for value in found.values())


def test_ewc_holds_no_increment_of_route_lora_when_it_comes_first(lab: Any) -> None:
    learner, stream = lab.learner("ewc + route_lora(rank=2)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    held = {name for name in learner.method.parts[0].fisher if name.startswith("method.")}
    assert held == {f"method.parts.1.adapters.{layer}.{factor}" for layer in range(4) for factor in ("down", "up")}
    learner.grow(stream.tasks[1])
    for adapter in learner.method.parts[1].adapters:
        adapter.branch[0].data += 1  # whatever the new increment is, it is not drawn to the last one
    penalty = learner.method.parts[0].penalty(learner, {}, torch.empty(0))
    assert penalty.item() == 0


def test_the_bases_of_route_lora_learn_more_slowly_after_the_first_task(lab: Any) -> None:
    learner, stream = lab.learner("route_lora(rank=2, bases_lr=0.03)"), lab.stream()
    learner.grow(stream.tasks[0])
    assert learner.method.param_groups(learner) == {}
    close_task(learner, stream.tasks[0])
    learner.grow(stream.tasks[1])
    names = {f"method.adapters.{layer}.{factor}" for layer in range(4) for factor in ("down", "up")}
    assert learner.method.param_groups(learner) == dict.fromkeys(names, 0.03)


def test_the_routing_matrix_starts_as_lora_and_takes_every_increment(lab: Any) -> None:
    learner, stream = lab.learner("route_lora(rank=2)"), lab.stream()
    total = [torch.zeros(2, 2) for _ in range(4)]
    for task in stream:
        open_task(learner, task)
        adapters = list(learner.method.adapters)
        if task.index == 0:
            assert all(torch.equal(adapter.branch[0], torch.eye(2)) for adapter in adapters)
        shake(learner)
        total = [sofar + adapter.branch[0].detach() for sofar, adapter in zip(total, adapters, strict=True)]
        close_task(learner, task)
        assert all(torch.equal(adapter.core, sofar) for adapter, sofar in zip(adapters, total, strict=True))


def test_the_penalty_of_route_lora_measures_the_increment_along_the_leading_directions(lab: Any) -> None:
    learner, stream = lab.learner("route_lora(rank=3, strength=2.0, energy=0.8)"), lab.stream()
    open_task(learner, stream.tasks[0])
    close_task(learner, stream.tasks[0])
    for adapter in learner.method.adapters:
        adapter.merged["core"] = torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    open_task(learner, stream.tasks[1])
    shake(learner)
    # 25 of 30 is more than 0.8: only the first row of R_δ counts
    expected = 2.0 * sum(adapter.branch[0][0].square().sum().item() for adapter in learner.method.adapters)
    assert learner.method.penalty(learner, {}, torch.empty(0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("energy", "count"), [(0.5, 1), (0.8, 1), (0.84, 2), (0.96, 2), (0.97, 3), (1.0, 3)])
def test_leading_directions_are_the_fewest_that_hold_the_energy(energy: float, count: int) -> None:
    core = torch.diag(torch.tensor([5.0, 2.0, 1.0]))
    assert _leading(core, energy).shape == (3, count)


# LoRA, a branch a task


def test_lora_per_task_adds_up_fresh_branches(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2, per_task=True)"), lab.stream()
    total: list[Tensor] = []
    for task in stream:
        open_task(learner, task)
        assert not any(update.any() for update in updates(learner))
        shake(learner)
        new = updates(learner)
        total = [t + n for t, n in zip(total, new, strict=True)] if total else new
        close_task(learner, task)
        for adapter, sofar in zip(learner.method.adapters, total, strict=True):
            assert adapter.down is None
            torch.testing.assert_close(adapter.delta(0, branches=False), sofar)


def test_lora_per_task_is_lora_in_the_first_task(lab: Any) -> None:
    task = lab.stream().tasks[:1]
    one, other = (lab.teach(lab.learner(f"lora(rank=2{more})"), task) for more in ("", ", per_task=True"))
    assert torch.equal(one.features(task[0].test)[0], other.features(task[0].test)[0])


@pytest.mark.parametrize(("options", "adapted"), [("tasks=1", 1), ("tasks=2", 2), ("tasks=2, per_task=True", 2)])
def test_lora_leaves_the_encoder_alone_after_so_many_tasks(options: str, adapted: int, lab: Any) -> None:
    bench = lab.but(tasks=4)
    learner, stream = bench.learner(f"lora(rank=2, {options})"), bench.stream()
    data, seen = stream.tasks[0].test, []
    for task in stream:
        bench.teach(learner, [task])
        seen.append(learner.features(data)[0])
        heads = all(name.startswith("objective") for name in learner.trainable())
        assert heads or task.index < adapted
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [t < adapted for t in range(1, 4)]


def test_a_branch_trained_over_two_tasks_is_the_one_of_plain_lora(lab: Any) -> None:
    stream = lab.stream()
    one, other = (lab.teach(lab.learner(f"lora(rank=2{more})"), stream.tasks[:2]) for more in ("", ", tasks=2"))
    data = stream.tasks[0].test
    torch.testing.assert_close(one.features(data)[0], other.features(data)[0], rtol=1e-5, atol=1e-5)
