"""Experts that are mixed, or chosen, by what an example is like: hide_lora, disco, modal_prompt."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.adapters.task_branches import routed
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.forgetting import forget_classes
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskMeans
from perdure.objectives.generate import Generate
from perdure.training.config import make_method
from perdure.types import Task, Told


def encoded(learner: Any, data: Any) -> Any:
    with learner.inference():
        return torch.cat([learner.encode(batch) for batch in learner.batches(data, 8)]).clone()


def test_shares_are_the_softmax_of_mean_cosines_and_do_not_depend_on_who_else_is_asked() -> None:
    torch.manual_seed(0)
    means = TaskMeans(0.1)
    means.kinds = 2
    kinds = [F.normalize(torch.randn(6, 4), dim=1) for _ in range(2)]
    kinds[0][5] = 0  # no image
    keys = torch.cat(kinds, dim=1)
    for task in range(2):
        means.add(task, keys[2 * task : 2 * task + 2], torch.zeros(2), torch.Generator())
    anchors = [torch.stack([F.normalize(kind[2 * t : 2 * t + 2].mean(0), dim=0) for t in range(2)]) for kind in kinds]
    wanted = (sum(kind @ anchor.T for kind, anchor in zip(kinds, anchors, strict=True)) / 2 / 0.1).softmax(1)
    torch.testing.assert_close(means.shares(keys), wanted)
    assert torch.equal(torch.cat([means.shares(key[None]) for key in keys]), means.shares(keys))
    assert means.route(keys)[:4].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("method", ["hide_lora(rank=2)", "disco(rank=2)"])
def test_after_one_task_it_is_that_tasks_lora(method: str, lab: Any) -> None:
    learner, task = lab.learner(method), lab.stream().tasks[0]
    lab.teach(learner, [task])
    found = encoded(learner, task.test)
    with learner.inference():
        (batch,) = learner.batches(task.test, 64)
        with routed(list(learner.method.experts), torch.zeros(len(task.test), dtype=torch.int64)):
            wanted = learner.backbone(batch)
    torch.testing.assert_close(found, wanted.float())


@pytest.mark.parametrize("method", ["hide_lora(rank=2)", "disco(rank=2)", "modal_prompt(tokens=2)"])
def test_a_task_that_was_forgotten_takes_no_example(method: str, lab: Any) -> None:
    learner, stream = lab.taught(method), lab.stream()
    forget_classes(learner, stream.tasks[0].classes)
    assert learner.method.router.tasks == [1, 2]
    with learner.inference():
        for task in stream:
            (batch,) = learner.batches(task.test, 64)
            assert 0 not in learner.method.routes(learner, batch)
            if method != "modal_prompt(tokens=2)":
                assert learner.method.shares(learner, batch)[:, 0].count_nonzero() == 0


def test_without_temperature_disco_takes_the_expert_of_the_nearest_mean_alone(lab: Any) -> None:
    learner, stream = lab.taught("disco(rank=2, temperature=0.0001)"), lab.stream()
    for task in stream:
        with learner.inference():
            (batch,) = learner.batches(task.test, 64)
            taken = learner.method.routes(learner, batch)
        found = encoded(learner, task.test)
        for index in set(taken.tolist()):
            told = encoded(learner, Told(task.test, index))
            torch.testing.assert_close(found[taken == index], told[taken == index])


def test_hide_lora_adds_up_all_branches_below_the_last_block_without_cross_terms(lab: Any) -> None:
    learner, task = lab.taught("hide_lora(rank=2, alpha=1, temperature=0.03)"), lab.stream().tasks[1]
    assert learner.method.router.temperature == 0.03
    experts = list(learner.method.experts)
    blocks = learner.backbone.blocks()
    assert {expert.block for expert in experts} == set(blocks)
    (batch,) = learner.batches(task.test, 64)
    with learner.inference():
        shares = learner.method.shares(learner, batch)
        with learner.method.answering(learner, batch):
            given = {id(e): e.shares.clone() for e in experts}
            x, y = torch.randn(len(shares), 3, experts[0].fan_in), torch.zeros(len(shares), 3, experts[0].fan_out)
            found = experts[0](x, y, 0)
    for expert in experts:
        wanted = shares if expert.block == blocks[-1] else torch.ones_like(shares)
        assert torch.equal(given[id(expert)], wanted)
    kept = experts[0].closed
    fused = sum(0.5 * x @ kept[f"{t}/down"].T @ kept[f"{t}/up"].T for t in range(3))
    torch.testing.assert_close(found, fused, rtol=1e-5, atol=1e-6)


def test_told_the_task_disco_takes_its_branch_alone_and_hide_lora_does_in_the_last_block(lab: Any) -> None:
    for method in ("disco(rank=2)", "hide_lora(rank=2)"):
        learner, task = lab.taught(method), lab.stream().tasks[0]
        (batch,) = learner.batches(Told(task.test, 2), 64)
        with learner.inference(), learner.method.answering(learner, batch):
            given = learner.method.experts[-1].shares
        assert given.tolist() == [[0, 0, 1]] * len(task.test)


def test_a_prototype_is_drawn_to_its_task_and_old_prompts_stay_as_they_are(lab: Any) -> None:
    bench = lab.but(noise=0.05, epochs=6)
    learner, stream = bench.learner("modal_prompt(tokens=3)"), bench.stream()
    kept: dict[str, Any] = {}
    for task in stream:
        bench.teach(learner, [task])
        closed = learner.method.experts[0].closed
        assert all(torch.equal(closed[key], value) for key, value in kept.items())
        kept = {key: value.clone() for key, value in closed.items()}
    assert kept.keys() == {"0", "1", "2"}
    assert not [name for name in learner.trainable() if "open" in name]
    for task in stream:
        with learner.inference():
            (batch,) = learner.batches(task.train, 64)
            cosines = learner.method.router.cosines(learner.method.keys_of(learner, batch)).mean(0)
        assert int(cosines.argmax()) == task.index
    assert not torch.equal(encoded(learner, Told(stream.tasks[0].test, 1)), encoded(learner, stream.tasks[0].test))


def test_a_prototype_is_drawn_to_images_and_to_words_as_hard_as_it_is_told(lab: Any) -> None:
    spec, task = "modal_prompt(tokens=2, strength=0.5)", lab.stream().tasks[0]
    seeing, talking = lab.learner(spec), Core(tiny_mllm(), Generate(), make_method(spec))
    turns = [{"messages": [{"role": "user", "content": text}]} for text in ("Which colour?", "How many are there?")]
    given = ((seeing, 1, task.train.__getitems__(range(4))), (talking, 2, {"conversation": turns}))
    for learner, kinds, batch in given:
        learner.grow(Task(0, "", (0,), ("a",), 2))
        prototype, keys = learner.method.experts[0].prototype(), learner.method.query(learner, batch)
        wanted = sum((1 - key @ F.normalize(prototype, dim=0)).mean() for key in keys.chunk(kinds, dim=1))
        torch.testing.assert_close(learner.method.penalty(learner, batch, torch.empty(0)), 0.5 * wanted)


def test_of_a_conversation_disco_compares_the_words_and_hide_lora_the_images_too() -> None:
    turns = [{"messages": [{"role": "user", "content": text}]} for text in ("Which colour?", "How many are there?")]
    for spec, kinds in (("disco(rank=2)", 1), ("disco(rank=2, keys='image')", 1), ("hide_lora(rank=2)", 2)):
        learner = Core(tiny_mllm(), Generate(), make_method(spec))
        learner.grow(Task(0, "", (0,), ("a",), 2))
        keys = learner.method.keys_of(learner, {"conversation": turns})
        assert (learner.method.router.kinds, keys.shape[1]) == (kinds, kinds * learner.backbone.dim)
        assert bool(keys.any()) == ("image" not in spec)  # nothing is shown


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("hide_lora + replay(size=4)", "replay has no effect beside hide_lora"),
        ("disco(keys='text')", "keys='text'.: an image comes without words here"),
        ("pnn + lora", "pnn cannot be combined with lora"),
        ("modal_prompt(tower='language')", "each example has an expert in the vision tower alone"),
    ],
)
def test_what_would_have_no_effect_is_refused(method: str, why: str, lab: Any) -> None:
    def begin() -> None:
        learner, task = lab.learner(method), lab.stream().tasks[0]
        learner.grow(task)
        learner.method.check(learner, task)

    with pytest.raises(ValueError, match=why):
        begin()
