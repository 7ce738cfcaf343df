"""Experts that stay apart: each example takes the one that knows it, or the untouched model."""

from typing import Any

import pytest
import torch
from torch import nn

from perdure.adapters.injection import attach
from perdure.adapters.task_branches import TaskBranches, routed
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.learner import Core
from perdure.objectives.generate import Generate
from perdure.training.config import make_method
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Batch, Site, Task


def test_each_example_of_a_batch_takes_its_own_branch_or_none() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = TaskBranches(Site("0", "0", "0", 6, (0, 4)), 2, 0.5).eval()
    attach(model, [Site("0", "0", "0", 6, (0, 4))], adapter, fold=False)
    for task in range(2):
        adapter.start(torch.device("cpu"))
        nn.init.normal_(adapter.open["up"])
        adapter.close(task)
    x, kept = torch.randn(4, 3, 6), adapter.closed
    with routed([adapter], torch.tensor([1, -1, 0, 1])):
        found = model(x)
    for row, task in enumerate((1, None, 0, 1)):
        added = 0.0 if task is None else 0.5 * x[row] @ kept[f"{task}/down"].T @ kept[f"{task}/up"].T
        torch.testing.assert_close(found[row], model[0](x)[row] + added)
    assert torch.equal(model(x), model[0](x))


class Talk:
    """Conversations without images, whose questions are of one kind a task."""

    def __init__(self, kind: int, count: int = 16) -> None:
        words = ("alpha beta gamma delta", "vwxyz 9876 vwxyz 5432")[kind].split()
        self.labels = torch.full((count,), kind)
        asked = [f"{words[i % 4]} {words[(i // 4) % 4]}?" for i in range(count)]
        turns = [[{"role": "user", "content": text}] for text in asked]
        self.said = [{"messages": turn, "answer": ("no", "yes")[kind]} for turn in turns]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Any) -> Batch:
        picked = list(positions)
        return {"label": self.labels[picked], "conversation": [self.said[i] for i in picked]}


def tasks() -> list[Task]:
    return [Task(i, f"kind {i}", (i,), (str(i),), 2, Talk(i), Talk(i)) for i in range(2)]


def taught(method: str = "lora_experts(rank=2)") -> Core:
    learner = Core(tiny_mllm(), Generate(tokens=4), make_method(method), "domain")
    for task in tasks():
        learner.grow(task)
        fit_task(learner, task, TrainConfig(epochs=16, batch_size=8, lr=2e-2))
    return learner


@pytest.fixture(scope="module")
def experts() -> Core:
    return taught()


def said(learner: Core, conversations: list[Any], **more: Any) -> list[str]:
    with learner.inference():
        return learner.objective.say(learner, {"conversation": conversations} | more)


STRANGE = {"messages": [{"role": "user", "content": "QQQQ!!!! ÜÜÜÜ ####"}]}


def test_a_batch_of_all_tasks_and_of_strangers_is_answered_as_each_alone(experts: Core) -> None:
    mixed = [Talk(0).said[3], STRANGE, Talk(1).said[5], Talk(0).said[7], Talk(1).said[1]]
    together = said(experts, mixed)
    assert [together[i] for i in (0, 2, 3, 4)] == ["no", "yes", "no", "yes"]
    assert together == [said(experts, [each])[0] for each in mixed]
    untouched = Core(tiny_mllm(), Generate(tokens=4), make_method("probe"), "domain")
    untouched.grow(tasks()[0])
    assert said(untouched, [STRANGE]) == [together[1]]


def test_measures_say_how_many_find_their_experts(experts: Core) -> None:
    facts = experts.method.measures(experts)
    assert facts["experts"] == 2
    assert facts["routing_accuracy"] > 0.9
    assert facts["routing_accuracy"] + facts["fallback_share"] <= 1


def test_who_is_told_the_task_asks_its_expert_and_without_a_fallback_strangers_take_the_nearest(experts: Core) -> None:
    known = Talk(0).said[3]
    assert said(experts, [known, known], task=torch.tensor([0, 1])) != ["no", "no"]
    method = experts.method
    with experts.inference():
        asked = {"conversation": [STRANGE]}
        assert method.routes(experts, asked).tolist() == [-1]
        method.fallback = False
        try:
            assert method.routes(experts, asked).tolist() in ([0], [1])
        finally:
            method.fallback = True


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("lora_experts(keys='text')", "keys='text'.: an image comes without words here"),
        ("lora_experts(tower='language')", "each example has an expert in the vision tower alone"),
        ("lora_experts(at='kv') + replay(size=4)", "replay has no effect beside lora_experts"),
        ("lora_experts + lora", "cannot be combined with lora"),
        ("lora_experts(fallback=False, threshold=0.9)", "no effect with fallback=False"),
    ],
)
def test_what_would_have_no_effect_is_refused(method: str, why: str, lab: Any) -> None:
    def begin() -> None:
        learner, task = lab.learner(method), lab.stream().tasks[0]
        learner.grow(task)
        learner.method.check(learner, task)

    with pytest.raises(ValueError, match=why):
        begin()


def test_activations_that_are_computed_twice_pass_the_same_expert() -> None:
    found = []
    for twice in (False, True):
        learner, task = Core(tiny_mllm(), Generate(), make_method("lora_experts(rank=2)")), tasks()[0]
        learner.backbone.checkpointing = twice
        learner.backbone.model.activation_checkpointing_enable({"use_reentrant": False})
        learner.grow(task)
        learner.train()
        learner.loss(task.train.__getitems__(range(8))).backward()
        found.append({name: p.grad for name, p in learner.trainable().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for method in ("moe_adapters(rank=2, tower='language')", "head_gates"):
        refused = Core(tiny_mllm(), Generate(), make_method(method))
        refused.backbone.checkpointing = True
        with pytest.raises(ValueError, match=f"{method.partition('(')[0]} cannot route again"):
            refused.grow(task)
