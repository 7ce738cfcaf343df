"""EWC: the Fisher is one of single examples, the penalty is what the paper writes."""

from typing import Any

import pytest
import torch

from perdure.config import make_method


@pytest.mark.parametrize("spec", ["lora(rank=2) + ewc(samples=10)", "finetune + ewc(samples=10)"])
def test_the_fisher_is_the_mean_of_squared_gradients_of_single_examples(spec: str, lab: Any) -> None:
    learner, task = lab.learner(spec), lab.stream().tasks[0]
    lab.teach(learner, [task])
    ewc = learner.method.parts[1]
    total = {name: torch.zeros_like(p) for name, p in learner.shared().items()}
    wrong = {name: torch.zeros_like(p) for name, p in total.items()}
    for batch in learner.views(task.train, 10, "fisher", size=16):
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
        learner.objective.losses(learner.encode(single), single, local=True).sum().backward()
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


@pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune"])
def test_strength_zero_is_the_carrier_alone_bit_for_bit(carrier: str, lab: Any) -> None:
    plain, guarded = lab.taught(carrier).memory(), lab.taught(f"{carrier} + ewc(strength=0)").memory()
    for key, value in plain.items():
        assert torch.equal(guarded[key.replace("method.", "method.parts.0.")], value), key


def test_a_stronger_pull_keeps_important_parameters_closer_to_their_anchor(lab: Any) -> None:
    def moved(strength: float) -> float:
        """Σ F (θ - θ*)² after another task."""
        learner, stream = lab.learner(f"lora(rank=2) + ewc(strength={strength})"), lab.stream()
        lab.teach(learner, stream.tasks[:1])
        guard = learner.method.parts[1]
        fisher, anchor = ({k: v.clone() for k, v in kept.items()} for kept in (guard.fisher, guard.anchor))
        lab.teach(learner, stream.tasks[1:2], epochs=8)
        return sum(float((f * (learner.get_parameter(k).detach() - anchor[k]) ** 2).sum()) for k, f in fisher.items())

    drifts = [moved(strength) for strength in (0, 100, 1000)]
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2]


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="option strength=-1: expected 0 or more"):
        make_method("lora + ewc(strength=-1)")


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
