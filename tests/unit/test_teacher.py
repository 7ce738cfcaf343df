"""A teacher answers as the learner did, and leaves no trace; the distillation is the formula."""

import math
from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.mechanisms.distillation import Teacher, distillation, trains_encoder


def test_the_distillation_is_the_hand_computed_divergence_of_softened_scores() -> None:
    teacher, student = [[2.0, 0.0, -2.0], [0.0, 4.0, 4.0]], [[0.0, 0.0, 1.0], [1.0, 4.0, 2.0]]

    def softened(scores: list[float], temperature: float) -> list[float]:
        powers = [math.exp(score / temperature) for score in scores]
        return [power / sum(powers) for power in powers]

    for temperature in (0.5, 1.0, 2.0):
        rows = [
            sum(p * math.log(p / q) for p, q in zip(softened(t, temperature), softened(s, temperature), strict=True))
            for t, s in zip(teacher, student, strict=True)
        ]
        found = distillation(torch.tensor(teacher), torch.tensor(student), temperature)
        assert found.item() == pytest.approx(temperature**2 * sum(rows) / 2, rel=1e-5)
    assert distillation(torch.tensor(teacher), torch.tensor(teacher), 2.0).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_distillation_is_the_difference_of_softened_scores_times_the_temperature() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
    distillation(teacher, student, 3.0).backward()
    expected = 3.0 * ((student.detach() / 3).softmax(1) - (teacher / 3).softmax(1)) / 5
    torch.testing.assert_close(student.grad, expected)


PLACES = [
    ("lora(rank=2)", {}),
    ("finetune", {}),
    ("inflora(rank=2)", {}),
    ("sd_lora(rank=2)", {}),
    ("fm_lora(rank=4)", {}),
    ("finetune", {"precision": "bf16"}),
    ("lora(rank=2)", {"precision": "bf16"}),
    ("lora(rank=2, tower='both')", {"objective": "zeroshot"}),
    ("finetune(tower='both')", {"objective": "zeroshot"}),
]


def begun(lab: Any, spec: str, where: Any) -> tuple[Core, Any, Teacher]:
    """A learner at the start of its second task, and its teacher."""
    bench = lab.but(**where)
    learner, stream = bench.learner(spec), bench.stream()
    if bench.precision == "bf16":
        learner.precision = torch.bfloat16
    bench.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.train()
    learner.prepare()
    learner.method.begin_task(learner, stream.tasks[1])
    teacher = Teacher("teacher", ["features", "scores"])
    teacher.snapshot(learner)
    return learner, stream.tasks[1], teacher


@pytest.mark.parametrize(("spec", "where"), PLACES, ids=[" ".join([s, *w.values()]) for s, w in PLACES])
def test_a_teacher_answers_as_the_learner_did_before_it_was_trained(spec: str, where: Any, lab: Any) -> None:
    learner, task, teacher = begun(lab, spec, where)
    batch = task.train.__getitems__(range(len(task.train)))
    learner.eval()
    with torch.no_grad():
        before = learner.encode(batch)
        said = before, learner.objective.scores(before)
    learner.train()
    lab.descend(learner, task)
    with torch.no_grad():
        assert not torch.allclose(learner.objective.scores(learner.encode(batch)), said[1], atol=1e-3)
    assert all(torch.equal(*pair) for pair in zip(teacher(learner, batch).values(), said, strict=True))


def test_a_teacher_leaves_the_learner_as_it_found_it_even_after_an_error(lab: Any) -> None:
    learner, task, teacher = begun(lab, "lora(rank=2)", {})
    lab.descend(learner, task)
    now = {name: (p, p.detach().clone()) for name, p in learner.trainable().items()}

    def unchanged() -> bool:
        found = learner.trainable()
        return found.keys() == now.keys() and all(found[k] is p and torch.equal(p, v) for k, (p, v) in now.items())

    def asked_wrongly() -> None:
        with teacher.swapped_in(learner):
            assert not unchanged()
            assert not learner.training
            learner.encode({})

    with pytest.raises(KeyError):
        asked_wrongly()
    assert unchanged()
    assert learner.training
    assert torch.is_grad_enabled()


def test_a_question_between_forward_and_backward_changes_no_gradient(lab: Any) -> None:
    found = []
    for asks in (False, True):
        learner, task, teacher = begun(lab, "finetune", {})
        lab.descend(learner, task)
        batch = task.train.__getitems__(range(8))
        learner.zero_grad()
        loss = learner.loss(batch)
        if asks:
            teacher(learner, batch)
        loss.backward()
        found.append({name: p.grad for name, p in learner.trainable().items()})
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_a_teacher_keeps_what_is_trained_and_nothing_else(lab: Any) -> None:
    learner, _, teacher = begun(lab, "lora(rank=2)", {})
    assert set(teacher.weights) == set(learner.trainable())
    assert set(teacher.state_dict()) == {f"weights.{name}" for name in learner.trainable()}
    teacher.clear()
    assert not teacher.state_dict()


def test_heads_alone_are_no_encoder(lab: Any) -> None:
    for spec, expected in (("probe", False), ("lora(rank=2, tasks=1)", False), ("lora(rank=2)", True)):
        learner = lab.teach(lab.learner(spec), lab.stream().tasks[:1])
        learner.grow(lab.stream().tasks[1])
        assert trains_encoder(learner) == expected, spec
