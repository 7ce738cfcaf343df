"""EWC: the Fisher is one of single examples, the penalty is what the paper writes."""

import copy
from typing import Any

import pytest
import torch

from perdure.adapters.injection import updates
from perdure.mechanisms.importance import _Asked


@pytest.mark.parametrize("spec", ["lora(rank=2) + ewc(samples=10)", "finetune + ewc(samples=10)"])
def test_the_fisher_is_the_mean_of_squared_gradients_of_single_examples(spec: str, lab: Any) -> None:
    learner, task = lab.learner(spec), lab.stream().tasks[0]
    lab.teach(learner, [task])
    ewc = learner.method.parts[1]
    total = {name: torch.zeros_like(p) for name, p in learner.shared().items()}
    wrong = {name: torch.zeros_like(p) for name, p in total.items()}
    for batch in learner.training_views(task.train, 10, "fisher", size=16):
        for i in range(len(batch["label"])):
            learner.zero_grad()
            learner.objective.losses(
                learner.encode({k: v[i : i + 1] for k, v in batch.items()}), batch_of(batch, i)
            ).sum().backward()
            for name in total:
                gradient = learner.get_parameter(name).grad
                total[name] += gradient**2
                wrong[name] += gradient
    assert set(ewc.fisher) == set(total)
    mean = torch.cat([f.flatten() for f in total.values()]).mean()
    for name, fisher in ewc.fisher.items():
        torch.testing.assert_close(fisher, total[name] / mean, rtol=1e-3, atol=1e-5)
        assert torch.equal(ewc.anchor[name], learner.get_parameter(name))
    assert torch.cat([f.flatten() for f in ewc.fisher.values()]).mean().item() == pytest.approx(1, rel=1e-4)
    # the square of a batch's gradient is another thing
    of_batch = torch.cat([g.flatten() ** 2 for g in wrong.values()])
    assert not torch.allclose(
        of_batch / of_batch.mean(), torch.cat([f.flatten() for f in total.values()]) / mean, rtol=0.5
    )


def batch_of(batch: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {k: v[i : i + 1] for k, v in batch.items()}


def test_the_fisher_of_a_later_task_counts_its_own_classes_and_adds_to_the_decayed_old_one(lab: Any) -> None:
    spec, stream = "lora(rank=2) + ewc(samples=1000, decay=0.5)", lab.stream()
    learner = lab.teach(lab.learner(spec), stream.tasks[:1])
    ewc = learner.method.parts[1]
    old = {k: v.clone() for k, v in ewc.fisher.items()}
    lab.teach(learner, stream.tasks[1:2])
    total = {name: torch.zeros_like(p) for name, p in learner.shared().items()}
    batch = stream.tasks[1].train.__getitems__(range(len(stream.tasks[1].train)))
    for i in range(len(batch["label"])):
        learner.zero_grad()
        single = batch_of(batch, i)
        learner.objective.losses(learner.encode(single), single, only_task=True).sum().backward()
        for name in total:
            total[name] += learner.get_parameter(name).grad ** 2
    mean = torch.cat([f.flatten() for f in total.values()]).mean()
    for name in total:
        torch.testing.assert_close(ewc.fisher[name], 0.5 * old.get(name, 0) + total[name] / mean, rtol=1e-3, atol=1e-4)
    assert not any("heads.0" in name for name in ewc.fisher)  # frozen now: it cannot drift


def test_the_penalty_is_half_the_strength_times_the_weighted_square_of_the_drift(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + ewc(strength=6)"), lab.stream()
    learner.grow(stream.tasks[0])
    ewc, name = learner.method.parts[1], "method.parts.0.adapters.0.up.0"
    assert ewc.penalty(learner, {}, torch.zeros(0)) == 0.0
    parameter = learner.get_parameter(name)
    anchor, fisher = torch.zeros_like(parameter), torch.zeros_like(parameter)
    with torch.no_grad():
        parameter[0, 0], parameter[1, 1] = 3.0, 5.0
    anchor[0, 0], anchor[1, 1] = 1.0, 6.0
    fisher[0, 0], fisher[1, 1] = 0.5, 2.0
    ewc.fisher[name], ewc.anchor[name] = fisher, anchor
    penalty = ewc.penalty(learner, {}, torch.zeros(0))
    assert penalty.item() == pytest.approx(6 / 2 * (0.5 * 2**2 + 2.0 * 1**2))
    penalty.backward()
    assert parameter.grad[0, 0].item() == pytest.approx(6 * 0.5 * 2)
    assert parameter.grad[1, 1].item() == pytest.approx(6 * 2.0 * -1)


def test_when_the_last_shared_branch_is_closed_nothing_is_held_any_more(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, stream = bench.learner("lora(rank=2, tasks=2) + ewc"), bench.stream()
    ewc = learner.method.parts[1]
    bench.teach(learner, stream.tasks[:1])
    assert ewc.fisher
    bench.teach(learner, stream.tasks[1:])
    assert not ewc.fisher
    assert not ewc.anchor


def test_the_fisher_is_of_the_encoder_with_branches_that_were_just_closed(lab: Any) -> None:
    bench = lab.but(scenario="domain", lr=5e-2)  # one head for all tasks, which goes on learning
    fishers = []
    for order in ("lora(rank=2, tasks=2) + ewc", "ewc + lora(rank=2, tasks=2)"):
        learner = bench.teach(bench.learner(order), bench.stream().tasks[:1])
        (ewc,) = (part for part in learner.method.parts if part.name == "ewc")
        ewc.decay = 0.0
        bench.teach(learner, bench.stream().tasks[1:2])
        fishers.append(ewc.fisher["objective.heads.0.weight"])
    one, other = (f / f.mean() for f in fishers)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_offline_pulls_as_one_spring_to_each_old_task_would(lab: Any) -> None:
    bench = lab.but(scenario="domain")  # one head, which all tasks train
    learner, stream = bench.learner("lora(rank=2) + ewc(form='offline', strength=6, samples=8)"), bench.stream()
    online = bench.learner("lora(rank=2) + ewc(strength=0, samples=8)")
    ewc, pairs = learner.method.parts[1], []
    for task in stream.tasks:
        bench.teach(learner, [task])
        # what this task alone adds: the Fisher of a memory that is empty
        alone = copy.deepcopy(learner)
        alone.method.parts[1].quadratic_penalty = type(ewc.quadratic_penalty)()
        alone.method.parts[1].end_task(alone, task)
        pairs.append((alone.method.parts[1].fisher, alone.method.parts[1].anchor))
    params = learner.trainable()
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn_like(p))
    explicit = sum(
        6 / 2 * (fisher[name] * (params[name] - anchor[name]) ** 2).sum() for fisher, anchor in pairs for name in fisher
    )
    wanted = torch.autograd.grad(explicit, list(params.values()))
    found = torch.autograd.grad(ewc.penalty(learner, {}, torch.zeros(0)), list(params.values()))
    for name, one, other in zip(params, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    bench.teach(online, stream.tasks)
    stored = [
        sum(v.numel() for v in m.method.parts[1].quadratic_penalty.state_dict().values()) for m in (learner, online)
    ]
    assert stored[0] == stored[1] == 2 * sum(p.numel() for p in params.values())


@pytest.mark.parametrize("spec", ["lora(rank=2) + ewc(of='updates')", "lora(rank=2, alpha=3) + mas(of='updates')"])
def test_the_importance_of_updates_is_that_of_the_weights_they_stand_in(spec: str, lab: Any) -> None:
    learner, task = lab.learner(spec), lab.stream().tasks[0]
    lab.teach(learner, [task])
    guard = learner.method.parts[1]
    sites = [site for site, _, _ in updates(learner.backbone)]
    head = {n: p for n, p in learner.named_parameters() if n.startswith("objective.")}
    assert set(guard.quadratic_penalty.weights) == {f"update/{site.key}" for site in sites} | set(head)
    total: dict[str, torch.Tensor] = dict.fromkeys(guard.quadratic_penalty.weights, torch.zeros(()))
    data = task.train.__getitems__(range(len(task.train)))
    with learner.inference(), torch.inference_mode(False):  # all of the update in the weights, nothing beside them
        layers = {site.layer: learner.backbone.get_submodule(site.layer).weight for site in sites}
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in layers.items()}
        for i in range(len(data["label"])):
            named = {f"learner.backbone.{name}.weight": weight for name, weight in weights.items()}
            single = batch_of(data, i)
            objective, square = learner.objective, guard.name == "ewc"
            asked = _Asked(
                learner,
                lambda f, b, _, o=objective, e=square: o.losses(f, b).sum() if e else (o.scores(f) ** 2).sum(),
            )
            out = torch.func.functional_call(asked, named, (single,))
            gradients = torch.autograd.grad(out, [*weights.values(), *head.values()])
            of = dict(zip([*weights, *head], gradients, strict=True))
            for site in sites:
                mine = of[site.layer][site.rows[0] : site.rows[1]]
                total[f"update/{site.key}"] = total[f"update/{site.key}"] + (mine**2 if square else mine.abs())
            for name in head:
                total[name] = total[name] + (of[name] ** 2 if square else of[name].abs())
    mean = torch.cat([f.flatten() for f in total.values()]).mean()
    for name, weight in guard.quadratic_penalty.weights.items():
        torch.testing.assert_close(weight, total[name] / mean, rtol=1e-3, atol=1e-4)
    for site, adapter, part in updates(learner.backbone):
        anchor = guard.quadratic_penalty.anchors[f"update/{site.key}"]
        assert torch.equal(anchor, adapter.delta(part, branches=True))
        assert anchor.any()


@pytest.mark.parametrize("guard", ["ewc", "mas"])
@pytest.mark.parametrize(("of", "same"), [("updates", True), ("parameters", False)])
def test_the_importance_of_updates_alone_does_not_depend_on_how_the_factors_share_it(
    guard: str, of: str, same: bool, lab: Any
) -> None:
    """AB = (A G)(G⁻¹ B): the same function, and after one more step away the same pull."""
    learner, task = lab.learner(f"lora(rank=2) + {guard}(of='{of}')"), lab.stream().tasks[0]
    learner.grow(task)
    lab.descend(learner, task)
    other = copy.deepcopy(learner)
    g = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    with torch.no_grad():
        for adapter in other.method.parts[0].adapters:
            adapter.up[0].copy_(adapter.up[0] @ g)
            adapter.down.copy_(torch.linalg.solve(g, adapter.down))
    lab.close(learner, task)
    lab.close(other, task)

    def pull(core: Any) -> float:
        with torch.no_grad():
            for adapter in core.method.parts[0].adapters:
                adapter.up[0].mul_(1.5)  # the same change of AB, whatever the factors
        return core.method.penalty(core, {}, torch.zeros(0)).item()

    assert (pull(other) == pytest.approx(pull(learner), rel=1e-3)) is same


def test_updates_of_all_tasks_are_held_where_a_task_closes_its_own(lab: Any) -> None:
    bench = lab.but(lr=2e-2)

    def moved(strength: float) -> float:
        learner, stream = bench.learner(f"fm_lora(rank=4) + ewc(of='updates', strength={strength})"), bench.stream()
        bench.teach(learner, stream.tasks[:1])
        guard, bases = learner.method.parts[1], learner.method.parts[0].bases
        assert {name for name in guard.fisher if name.startswith("update/")} != set()
        assert any(name.endswith("tokens.vision.values") for name in guard.fisher)
        assert not any(".bases." in name for name in guard.fisher)
        before = [adapter.delta(0, branches=True) for adapter in bases]
        bench.teach(learner, stream.tasks[1:2], epochs=4)
        after = [adapter.delta(0, branches=True) for adapter in bases]
        return sum((a - b).norm().item() for a, b in zip(after, before, strict=True))

    assert moved(1e4) < 0.5 * moved(0)


GUARDS = ("ewc", "ewc(of='updates', form='offline')", "mas", "mas(of='updates')", "si")
WHERES = ({"precision": "bf16"}, {"objective": "zeroshot"}, {"scenario": "domain"}, {})


@pytest.mark.parametrize(("guard", "where"), [(each, WHERES[i % 4]) for i, each in enumerate(GUARDS)])
def test_a_pull_holds_updates_closer_in_any_precision_and_setting(guard: str, where: Any, lab: Any) -> None:
    def moved(strength: float) -> float:
        """How far updates moved in the second task."""
        name, _, options = guard.rstrip(")").partition("(")
        bench = lab.but(tasks=2, **where)
        learner = bench.learner(f"lora(rank=2) + {name}({options + ', ' if options else ''}strength={strength})")
        learner.precision = torch.bfloat16 if bench.precision == "bf16" else torch.float32
        first, second = bench.stream().tasks
        bench.teach(learner, [first])
        before = [adapter.delta(0, branches=True).detach() for adapter in learner.method.parts[0].adapters]
        bench.teach(learner, [second], epochs=4)
        after = [adapter.delta(0, branches=True).detach() for adapter in learner.method.parts[0].adapters]
        return sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))

    assert moved(1e4) < 0.5 * moved(0)
