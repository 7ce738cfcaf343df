"""The dynamic rank: what the rules say, what the warm-up leaves behind, and that the chosen rank is the branch's."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.core.learner import Core
from perdure.mechanisms.rank_selection import DRS, _complexity, _rising, soft_prefix, split
from perdure.training.loop import fit_task
from perdure.types import Task

RANKS = (2, 4, 8)
quick = settings(deadline=None, max_examples=60)
CHOOSING = ["inflora(ranks=(1, 2, 4))", "fm_lora(rank=4)", "fm_lora(rank=4, share=False)"]


class Labels:
    def __init__(self, *counts: int) -> None:
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return len(self.labels)


def begun(lab: Any, spec: str, tasks: int = 1) -> tuple[Core, Task]:
    """A learner that has learnt some tasks and has grown for the next."""
    learner, stream = lab.learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:tasks], epochs=1)
    task = stream.tasks[tasks]
    learner.grow(task)
    learner.train()
    learner.prepare()
    return learner, task


# The rules


@quick
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0, 4), st.floats(1e-3, 1), st.floats(0, 2))
def test_the_affine_rule_never_gives_a_harder_task_a_smaller_rank(
    raw: list[float], complexity: float, more: float, cost: float
) -> None:
    drs = DRS(RANKS, "affine", cost)
    weights = _rising(torch.tensor(raw))
    assert drs.pick(complexity + more) >= drs.pick(complexity)
    assert drs.pick(complexity + more, weights) >= drs.pick(complexity, weights)


def test_the_affine_rule_reaches_every_rank() -> None:
    drs = DRS(RANKS, "affine", 0.5)
    picks = [drs.pick(h) for h in torch.linspace(0, 2, 100).tolist()]
    assert picks == sorted(picks)
    assert picks[0] == 2
    assert set(picks) == {2, 4, 8}


def test_the_affine_rule_is_the_formula() -> None:
    expected = [math.sqrt(r / 8) * 0.7 - 0.5 * r / 8 for r in RANKS]
    torch.testing.assert_close(DRS(RANKS, "affine", 0.5).logits(0.7), torch.tensor(expected))


def test_weights_learn_from_where_the_rule_starts() -> None:
    drs = DRS((1, 3, 4, 16))
    torch.testing.assert_close(_rising(drs._start()), torch.tensor([0.25, math.sqrt(3) / 4, 0.5, 1.0]))


def test_candidates_are_sorted_and_stand_once() -> None:
    assert DRS([8, 2, 2, 4]).ranks == RANKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": ()}, r"ranks=\(\): expected candidate ranks, such as \(2, 4, 8\)"),
        ({"ranks": (4, 4)}, r"ranks=\(4, 4\), drs='affine': one rank leaves nothing to choose; write drs='fixed'"),
    ],
)
def test_an_impossible_choice_is_refused_with_what_is_possible(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        DRS(**arguments)


# Bricks


def test_a_soft_prefix_weighs_each_dimension_by_the_ranks_that_include_it() -> None:
    weights = soft_prefix(torch.tensor([0.5, 0.3, 0.2]), (1, 2, 4))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 0.2, 0.2]))
    for choice, rank in enumerate((1, 2, 4)):
        certain = soft_prefix(torch.eye(3)[choice], (1, 2, 4))
        assert certain.tolist() == [1.0] * rank + [0.0] * (4 - rank)


def test_a_tenth_of_each_class_is_held_out() -> None:
    data = Labels(50, 20, 9, 3)
    rest, held = split(data, torch.Generator().manual_seed(0))
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(82))
    assert Counter(data.labels[held].tolist()) == {0: 5, 1: 2, 2: 1}  # three examples are too few to give one away


def test_the_split_depends_on_the_generator_alone() -> None:
    data = Labels(50, 50)
    one, same, other = (split(data, torch.Generator().manual_seed(seed))[1].tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_of_very_few_examples_all_are_trained_on_and_measured() -> None:
    rest, held = split(Labels(4, 3), torch.Generator().manual_seed(0))
    assert sorted(rest.tolist()) == sorted(held.tolist()) == list(range(7))


def test_a_complexity_of_1_is_guessing(lab: Any) -> None:
    learner, task = begun(lab, "probe")
    for parameter in learner.objective.heads[1].parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        assert _complexity(learner, learner.batches(task.train, 5)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tasks", [1, 2])
def test_in_joint_training_guessing_is_among_all_classes_seen(tasks: int, lab: Any) -> None:
    learner, task = begun(lab, "probe + joint", tasks)
    for parameter in learner.objective.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        batches = learner.batches(learner.method.data(learner, task), 5)
        assert _complexity(learner, batches) == pytest.approx(1, abs=1e-6)


def test_in_joint_training_a_right_answer_counts_as_right_for_old_classes_too(lab: Any) -> None:
    """A perfect learner: each class's row is its own mean direction."""
    learner, task = begun(lab.but(noise=0.0), "probe + joint")
    data = learner.method.data(learner, task)
    features, labels = learner.features(data)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    inverse = torch.linalg.pinv(means).T
    with torch.no_grad():
        for head, rows in zip(learner.objective.heads, inverse.split(2), strict=True):
            head.weight.copy_(50 * rows)
            head.bias.zero_()
        assert _complexity(learner, learner.batches(data, 8)) < 0.01


# In a task


def shapes(learner: Core) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in learner.named_parameters()}


@pytest.mark.parametrize("spec", CHOOSING)
def test_the_warm_up_leaves_no_trace_but_the_rank(spec: str, lab: Any) -> None:
    learner, task = begun(lab, spec)
    before = {k: v.clone() for k, v in learner.state_dict().items() if "selected" not in k}
    kept = torch.get_rng_state()
    learner.method.begin_task(learner, task)
    assert torch.equal(torch.get_rng_state(), kept)
    rank = int(learner.method.measures(learner)["rank"])
    after = learner.state_dict()
    assert {name for name in after if name not in before} == {
        f"method.drs.selected.{n}" for n in ("complexity", "rank")
    }
    for name, was in before.items():
        now = after[name]
        if now.shape != was.shape:  # cut to the first inner dimensions
            assert rank in now.shape
            was = was[tuple(slice(size) for size in now.shape)]
        designed = "inflora" in spec and name.endswith("down")
        assert designed or torch.equal(now, was), name
    assert all(p.grad is None for p in learner.trainable().values())
    assert {m.gate for m in learner.method.modules() if hasattr(m, "gate")} == {None}


@pytest.mark.parametrize("spec", CHOOSING)
def test_the_choice_depends_on_no_global_randomness(spec: str, lab: Any) -> None:
    found = []
    for seed in (1, 2):
        learner, task = begun(lab, spec)
        torch.manual_seed(seed)
        learner.method.begin_task(learner, task)
        found.append((learner.method.measures(learner), shapes(learner)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("spec", "per_rank"),
    [  # tiny(dim=16), two blocks: numbers that one inner dimension adds
        ("inflora(ranks=(1, 2, 4), rank_cost={})", 2 * (16 + 16)),
        ("fm_lora(rank=4, prompts=0, rank_cost={})", 2 * 2 * (4 + 4)),
        ("fm_lora(rank=4, prompts=0, share=False, rank_cost={})", 2 * 2 * (16 + 16)),
    ],
)
@pytest.mark.parametrize(("cost", "rank"), [(0, 4), (1000, 1)])
def test_what_is_trained_and_counted_has_the_chosen_rank(
    spec: str, per_rank: int, cost: int, rank: int, lab: Any
) -> None:
    learner, task = begun(lab, spec.format(cost))
    fitted = fit_task(learner, task, lab.train_config(epochs=1))
    assert learner.method.measures(learner)["rank"] == rank
    assert fitted.trainable == rank * per_rank + 16 * 2 + 2  # and the head


def test_a_task_with_the_largest_rank_chosen_is_learnt_as_if_it_had_been_given(lab: Any) -> None:
    data = lab.stream().tasks[0].test
    chosen, given_ = (lab.taught(f"inflora({o})", epochs=1) for o in ("ranks=(1, 4), rank_cost=0", "rank=4"))
    assert torch.equal(chosen.features(data)[0], given_.features(data)[0])


def test_a_smaller_rank_of_inflora_keeps_the_leading_directions(lab: Any) -> None:
    data = lab.stream().tasks[0].test
    options = ("ranks=(2, 4), rank_cost=1000, keep=0.6", "rank=2, keep=0.6")
    chosen, given_ = (lab.taught(f"inflora({o})", epochs=1) for o in options)
    torch.testing.assert_close(chosen.features(data)[0], given_.features(data)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ["ranks=3, drs='fixed'", "ranks=3", "ranks=(3, 3)"])
def test_a_fixed_rank_needs_no_warm_up(options: str, lab: Any) -> None:
    learner, task = begun(lab, f"fm_lora(rank=4, {options})")
    before = shapes(learner)
    learner.method.begin_task(learner, task)
    assert shapes(learner) == before
    assert learner.method.measures(learner) == {"rank": 3}
    assert {tuple(f.shape for f in adapter.branch) for adapter in learner.method.bases} == {((4, 3), (3, 4))}


def test_a_longer_warm_up_makes_a_task_look_easier(lab: Any) -> None:
    bench = lab.but(per_class=40, noise=0.3)

    def complexity(epochs: int) -> float:
        learner, task = begun(bench, "inflora(ranks=(1, 2))")
        learner.method.drs.epochs, learner.method.drs.lr = epochs, 1e-2
        learner.method.begin_task(learner, task)
        return learner.method.measures(learner)["complexity"]

    assert complexity(4) < complexity(1)
