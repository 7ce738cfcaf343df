"""Meta-learning: gradients through inner steps, and what they teach."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.mechanisms.meta_learning import halves, inner_step, interleaved, loss_at
from perdure.types import Batch, take


@pytest.fixture
def begun(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A learner in its second task, in float64, with branches that are not zero any more; and a batch."""

    def make(spec: str) -> tuple[Core, Batch]:
        learner, tasks = lab.learner(spec), lab.stream().tasks
        monkeypatch.undo()
        lab.teach(learner, tasks[:1], epochs=1)
        learner.grow(tasks[1])
        learner.train()
        learner.prepare()
        learner.method.begin_task(learner, tasks[1])
        # differences of float32 are too coarse, and features are float32 whatever the encoder computes in
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        learner.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in learner.trainable().values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        batch = tasks[1].train.__getitems__(range(12))
        return learner, learner.method.batch(learner, batch)

    return make


def filled(learner: Core, batch: Batch) -> dict[str, Tensor]:
    """The gradients that the learner's method leaves to the optimizer."""
    learner.zero_grad()
    learner.method.backward(learner, learner.loss(batch), batch)
    return {name: p.grad.clone() for name, p in learner.trainable().items() if p.grad is not None}


def directions(learner: Core) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in learner.trainable().items()}


def slope(of: Any, start: dict[str, Tensor], way: dict[str, Tensor], step: float = 1e-5) -> float:
    """Central difference of `of` along `way`."""
    ahead, behind = ({n: (v.detach() + s * way[n]).requires_grad_() for n, v in start.items()} for s in (step, -step))
    return float((of(ahead) - of(behind)).detach() / (2 * step))


def rates_of(learner: Core, batch: Batch, rate: float) -> dict[str, float]:
    """Of weights of heads in units of 10 / mean ‖feature‖²."""
    length = float(learner.encode(batch).detach().square().sum(1).mean())
    assert length != pytest.approx(1, rel=0.2)
    return {
        name: 10 * rate / length if name.endswith(".weight") and "heads" in name else rate
        for name in learner.trainable()
    }


def along(gradients: dict[str, Tensor], way: dict[str, Tensor]) -> float:
    return float(sum((gradients[name] * way[name]).sum() for name in way))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_maml_is_that_of_the_loss_after_its_inner_steps(steps: int, begun: Any) -> None:
    learner, batch = begun(f"lora(rank=2) + ewc + maml(inner_steps={steps}, inner_lr=0.3)")
    start, way, rates = dict(learner.trainable()), directions(learner), rates_of(learner, batch, 0.3)
    support, query = (take(batch, rows) for rows in halves(batch["label"], learner.generator("maml", learner.step)))

    def outer(weights: dict[str, Tensor]) -> Tensor:
        for _ in range(steps):
            weights, _ = inner_step(learner, weights, support, rates)
        return loss_at(learner, weights, query, Core.loss)

    assert along(filled(learner, batch), way) == pytest.approx(slope(outer, start, way), rel=1e-6)


def test_the_gradient_of_fomaml_is_the_one_at_the_adapted_weights_and_another_than_mamls(begun: Any) -> None:
    learner, batch = begun("lora(rank=2) + fomaml(inner_lr=0.3)")
    support, query = (take(batch, rows) for rows in halves(batch["label"], learner.generator("fomaml", learner.step)))
    weights, _ = inner_step(learner, dict(learner.trainable()), support, rates_of(learner, batch, 0.3))
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    wanted = torch.autograd.grad(loss_at(learner, weights, query, Core.loss), list(weights.values()))
    found = filled(learner, batch)
    torch.testing.assert_close(list(found.values()), list(wanted), rtol=1e-9, atol=1e-12)
    second, _ = begun("lora(rank=2) + maml(inner_lr=0.3)")
    assert not torch.allclose(filled(second, batch)["objective.heads.1.weight"], found["objective.heads.1.weight"])


def test_gradients_of_lamaml_and_of_its_rates_are_those_of_its_meta_loss(begun: Any) -> None:
    learner, batch = begun("lora(rank=2) + lamaml(size=12, inner_steps=2, clip=1000.0)")
    (method,) = (part for part in learner.method if part.name == "lamaml")
    start, way = dict(learner.trainable()), directions(learner)
    rates = {name: (0.1 + 0.05 * torch.rand_like(v)).requires_grad_() for name, v in start.items()}
    units = rates_of(learner, batch, 1.0)

    def meta(weights: dict[str, Tensor], rates: dict[str, Tensor]) -> Tensor:
        losses = []
        for rows in interleaved(12, 2):
            own = {name: rate * units[name] for name, rate in rates.items()}
            weights, _ = inner_step(learner, weights, take(batch, rows), own)
            losses.append(loss_at(learner, weights, batch, Core.plain_loss))
        return torch.stack(losses).mean()

    assert len(batch["label"]) == 24
    learner.loss(batch)  # as in a step, before its gradients
    by_parameter, by_rate = method.meta_gradients(learner, start, rates, batch)
    assert along(by_parameter, way) == pytest.approx(slope(lambda w: meta(w, rates), start, way), rel=1e-6)
    assert along(by_rate, way) == pytest.approx(slope(lambda r: meta(dict(start), r), rates, way), rel=1e-6)


@pytest.mark.parametrize("guard", ["", " + ewc(strength=30.0)"])
def test_the_representation_of_oml_descends_on_the_loss_of_a_head_learnt_from_it(guard: str, begun: Any) -> None:
    learner, batch = begun(f"lora(rank=2){guard} + oml")
    (method,) = (part for part in learner.method if part.name == "oml")
    shared = {name: p for name, p in learner.trainable().items() if not name.startswith("objective.")}
    way = {name: value for name, value in directions(learner).items() if name in shared}

    def outer(weights: dict[str, Tensor]) -> Tensor:
        def of(core: Core, batch: Batch) -> Tensor:
            features = core.encode(batch)
            meta = method.meta_loss(core, batch, features, core.generator("oml", core.step))
            return meta + core.method.penalty(core, batch, features)  # what guards old tasks counts too

        return loss_at(learner, weights, batch, of)

    found = filled(learner, batch)
    assert along(found, way) == pytest.approx(slope(outer, shared, way), rel=1e-5)
    learner.zero_grad()
    learner.loss(batch).backward()
    plain = {name: p.grad for name, p in learner.trainable().items()}
    assert all(torch.equal(found[name], plain[name]) for name in found.keys() - shared.keys())
    assert not any(torch.allclose(found[name], plain[name]) for name in shared)


def test_reptile_with_one_inner_step_is_plain_training_bit_for_bit(lab: Any) -> None:
    plain, reptile, several = (
        lab.taught(f"lora(rank=2) + ewc{more}").learnt_state()
        for more in ("", " + reptile(inner_steps=1)", " + reptile(inner_steps=2)")
    )
    assert all(torch.equal(plain[key], reptile[key]) for key in plain)
    assert not all(torch.equal(plain[key], several[key]) for key in plain)


def test_reptile_leaves_the_way_of_its_inner_steps_as_gradient(begun: Any) -> None:
    learner, batch = begun("lora(rank=2) + reptile(inner_steps=3, inner_lr=0.2)")
    start, rates = dict(learner.trainable()), rates_of(learner, batch, 0.2)
    weights = dict(start)
    for rows in interleaved(len(batch["label"]), 3):
        weights, _ = inner_step(learner, weights, take(batch, rows), rates)
        weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    wanted = {name: (start[name] - weights[name]).detach() / rates[name] for name in start}
    torch.testing.assert_close(filled(learner, batch), wanted, rtol=1e-9, atol=1e-12)


def test_lamaml_with_rates_that_stay_is_its_own_gradient_and_a_rate_of_zero_stops_a_parameter(begun: Any) -> None:
    learner, batch = begun("lora(rank=2) + lamaml(size=12, rate_lr=0.0)")
    (method,) = (part for part in learner.method if part.name == "lamaml")
    name = "objective.heads.1.weight"
    method.rates[name] = method.rates[name].clone()
    method.rates[name][0] = 0.0
    method.rates[name][1, :4] = -0.3  # no step goes uphill
    before = {n: p.detach().clone() for n, p in learner.trainable().items()}
    filled(learner, batch)
    torch.optim.SGD(learner.trainable().values(), 0.1).step()
    method.after_step(learner, batch)
    gradients = {n: p.grad for n, p in learner.trainable().items()}
    for n, p in learner.trainable().items():
        wanted = before[n] - 0.1 * gradients[n]
        if n == name:
            wanted[0], wanted[1, :4] = before[n][0], before[n][1, :4]
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-8)


def test_lamaml_learns_its_rates_against_their_cut_gradient_and_keeps_them_in_the_next_task(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, batch = begun("lora(rank=2) + lamaml(size=12, ratio=0.5, rate_lr=0.5)")
    assert len(batch["label"]) == 12 + 6
    (method,) = (part for part in learner.method if part.name == "lamaml")
    kept = {name for name, rate in method.rates.items() if (rate - 0.1).abs().max() > 1e-6}
    assert kept == {name for name in learner.trainable() if "heads.1" not in name}  # a new head's begin
    before = {name: rate.clone() for name, rate in method.rates.items()}
    ways = {name: torch.linspace(-3, 3, rate.numel()).view_as(rate) for name, rate in before.items()}
    monkeypatch.setattr(method, "meta_gradients", lambda *_: ({}, ways))
    filled(learner, batch)
    for name, way in ways.items():
        torch.testing.assert_close(method.rates[name], before[name] - 0.5 * way.clamp(-1, 1), check_dtype=False)


@pytest.mark.parametrize("options", ["clip=1000.0, second_order=False", "clip=0.003, second_order=False"])
def test_without_second_order_lamaml_leaves_the_gradients_at_the_end_of_each_step(options: str, begun: Any) -> None:
    learner, batch = begun(f"lora(rank=2) + lamaml(size=12, inner_steps=2, {options})")
    rates, clip = rates_of(learner, batch, 0.1), float(options.split("=")[1].partition(",")[0])
    (method,) = (part for part in learner.method if part.name == "lamaml")
    for name in method.rates:
        method.rates[name] = torch.full_like(method.rates[name], 0.1)
    learner.loss(batch)
    weights, wanted = dict(learner.trainable()), dict.fromkeys(learner.trainable(), 0.0)
    for rows in interleaved(12, 2):
        part = torch.autograd.grad(
            loss_at(learner, weights, take(batch, rows), Core.plain_loss), list(weights.values()), allow_unused=True
        )
        steps = {n: 0.0 if g is None else rates[n] * g.clamp(-clip, clip) for n, g in zip(weights, part, strict=True)}
        weights = {name: (value - steps[name]).detach().requires_grad_() for name, value in weights.items()}
        whole = torch.autograd.grad(loss_at(learner, weights, batch, Core.plain_loss), list(weights.values()))
        wanted = {name: wanted[name] + each / 2 for name, each in zip(weights, whole, strict=True)}
    found = filled(learner, batch)
    torch.testing.assert_close(list(found.values()), list(wanted.values()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0], [5, 4]])
def test_support_and_query_are_disjoint_and_share_classes(labels: list[int]) -> None:
    given = torch.tensor(labels)
    support, query = halves(given, torch.Generator().manual_seed(3))
    assert sorted([*support.tolist(), *query.tolist()]) == list(range(len(labels)))
    assert len(query) - len(support) in (0, 1)
    for c in set(labels):
        assert abs(int((given[support] == c).sum()) - int((given[query] == c).sum())) <= 1


def test_second_order_of_pretrained_weights_is_refused_with_what_to_write(lab: Any) -> None:
    for method, remedy in (("maml", "fomaml"), ("lamaml", r"lamaml\(second_order=False\)")):
        with pytest.raises(ValueError, match=f"{method} takes gradients through gradients.*Write {remedy}"):
            lab.taught(f"finetune + {method}")
    lab.taught("finetune + fomaml", epochs=1)


def test_oml_without_a_representation_or_heads_to_train_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match="oml has nothing to protect in 'oml'"):
        lab.learner("oml")
    with pytest.raises(ValueError, match="oml learns heads within each step, and zeroshot trains none"):
        lab.but(objective="zeroshot").taught("lora(rank=2) + oml")


@pytest.mark.parametrize(
    ("objective", "spec"),
    [
        ("classify", "sd_lora(rank=2)"),
        ("classify", "lora(rank=2) + lwf"),
        ("zeroshot", "finetune(tower='both') + zscl"),
        ("retrieve", "finetune(tower='both') + zscl"),
        ("generate", "sd_lora(rank=2, tower='language')"),
        ("generate", "lora(rank=2, tower='language') + feature_distill(tower='language')"),
    ],
)
def test_the_loss_at_other_weights_is_that_of_a_learner_who_has_them(objective: str, spec: str, lab: Any) -> None:
    bench = lab.but(objective=objective)
    learner, tasks = bench.learner(spec), bench.stream().tasks
    bench.teach(learner, tasks[:1], epochs=1)
    learner.grow(tasks[1])
    learner.train()
    learner.prepare()
    learner.method.begin_task(learner, tasks[1])
    generator = torch.Generator().manual_seed(0)
    others = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in learner.trainable().items()}
    others = {name: value.requires_grad_() for name, value in others.items()}
    batch = tasks[1].train.__getitems__(range(6))
    found = loss_at(learner, others, batch, Core.loss)
    gradients = torch.autograd.grad(found, list(others.values()), allow_unused=True)
    with torch.no_grad():
        for name, p in learner.trainable().items():
            p.copy_(others[name])
    plain = learner.loss(batch)
    wanted = torch.autograd.grad(plain, list(learner.trainable().values()), allow_unused=True)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["reptile", "maml", "fomaml", "lamaml(size=6)"])
def test_activations_that_would_be_computed_again_with_other_weights_are_refused(spec: str, lab: Any) -> None:
    bench = lab.but(objective="generate")
    learner = bench.learner(f"lora(rank=2, tower='language') + {spec}")
    learner.backbone.checkpointing = True
    with pytest.raises(ValueError, match=r"cannot learn with checkpointing=True.* Leave checkpointing out"):
        bench.teach(learner, bench.stream().tasks[:1])


@pytest.mark.parametrize("spec", ["reptile", "maml", "fomaml", "oml"])
def test_what_parts_of_a_batch_say_of_each_other_one_example_has_not(spec: str, lab: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=f"^{spec} has no effect with batch_size=1: .*Give 2 or more$"):
        lab.run(f"lora(rank=2) + {spec}", tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out" / "run.json").exists()


def test_an_example_that_is_left_over_is_learnt_plainly_by_oml(begun: Any) -> None:
    learner, batch = begun("lora(rank=2) + oml")
    one = take(batch, torch.tensor([0]))
    found = filled(learner, one)
    learner.zero_grad()
    learner.loss(one).backward()
    wanted = {name: p.grad for name, p in learner.trainable().items() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["reptile", "fomaml", "maml", "lamaml(size=12, rate_lr=0.0, clip=1000.0)", "oml"])
def test_steps_within_a_step_mean_the_same_whatever_the_length_of_features(part: str, begun: Any) -> None:
    """Features 20 times as long before heads a twentieth as large: the same scores, and the same encoder learns."""
    learner, batch = begun(f"lora(rank=2) + {part}")
    found = filled(learner, batch)
    (norm,) = (m for n, m in learner.backbone.named_modules() if n.endswith("norm") and "blocks" not in n)
    with torch.no_grad():
        norm.weight *= 20
        norm.bias *= 20
        for name, head in learner.trainable().items():
            if name.endswith("weight") and "heads" in name:
                head /= 20
    longer = filled(learner, batch)
    encoder = [name for name in found if "heads" not in name]
    assert encoder
    torch.testing.assert_close([longer[n] for n in encoder], [found[n] for n in encoder], rtol=1e-6, atol=1e-9)
