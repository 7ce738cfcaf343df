"""Expert distillation: a specialist that leaves no trace, two teachers, and what they hold."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.mechanisms.distillation import EXPERTS, EXPERTS_OF, specialised
from perdure.mechanisms.references import read_references
from perdure.types import Task


def begun(lab: Any, spec: str) -> tuple[Core, Task, Any]:
    """A learner at the start of its second task, with its part that distils."""
    learner, stream = lab.learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.train()
    learner.method.begin_task(learner, stream.tasks[1])
    return learner, stream.tasks[1], list(learner.method)[-1]


def way(wanted: Any, mine: Any, temperature: float = 2.0) -> Any:
    """What parts two distributions, by hand."""
    shares = F.softmax(wanted / temperature, 1)
    return temperature**2 * (shares * (shares.log() - F.log_softmax(mine / temperature, 1))).sum(1).mean()


def loss_of(learner: Core, batch: Any) -> float:
    with torch.no_grad():
        return float(learner.loss(batch))


def test_the_specialist_knows_its_task_and_leaves_no_trace(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(task := stream.tasks[1])
    learner.train()
    batch = task.train.__getitems__(range(len(task.train)))
    before, loss = {k: v.clone() for k, v in learner.state_dict().items()}, loss_of(learner, batch)
    with specialised(learner, task, 30, 1e-2, 8):
        assert loss_of(learner, batch) < loss / 2
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    assert all(p.grad is None for p in learner.trainable().values())


def test_the_specialist_sees_images_changed_as_the_run_changes_them(lab: Any) -> None:
    learner, task = lab.learner("lora(rank=2) + expert_distillation"), lab.stream().tasks[0]
    learner.grow(task)
    learner.train()
    learner.prepare()
    turned = lab.learner("lora(rank=2) + expert_distillation")
    turned.grow(task)
    turned.train()
    turned.prepare()
    turned.augment = lambda batch, generator: batch | {"image": batch["image"].flip(3)}
    states = []
    for each in (learner, turned):
        with specialised(each, task, 1, 1e-2, 8):
            states.append({name: p.detach().clone() for name, p in each.trainable().items()})
    assert all(not torch.equal(states[0][name], states[1][name]) for name in states[0] if "heads" in name)


def test_the_specialist_learns_what_the_task_trains_at_its_own_rate(lab: Any) -> None:
    def first_step(share: float) -> float:
        learner, task = lab.learner(f"finetune(backbone_lr={share})"), lab.stream().tasks[0]
        learner.grow(task)
        learner.train()
        before = {name: p.detach().clone() for name, p in learner.backbone.named_parameters()}
        with specialised(learner, task, 1, 1e-2, len(task.train)):
            return max(
                float((p.detach() - before[name]).abs().max()) for name, p in learner.backbone.named_parameters()
            )

    assert first_step(0.1) == pytest.approx(1e-3, rel=0.01)
    assert first_step(0.001) == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize("options", ["", ", temperature=5", ", form='logits'"])
def test_each_teacher_speaks_of_its_own_classes(lab: Any, options: str) -> None:
    learner, task, part = begun(lab, f"lora(rank=2) + expert_distillation(strength=3{options})")
    batch = task.train.__getitems__(range(8))
    new, old = part.expert(learner, batch)["scores"], part.teacher(learner, batch)["scores"]
    with torch.no_grad():
        features = learner.encode(batch)
        given, found = learner.objective.scores(features), part.penalty(learner, batch, features)

    def level(wanted: Any) -> Any:
        return wanted - wanted.mean(1, True)

    by_hand = sum(way(of[:, own], given[:, own], part.temperature) for of, own in ((new, [2, 3]), (old, [0, 1])))
    assert part.temperature == (5 if "temperature" in options else 2)
    if "logits" in options:  # DMC, equation 3: the mean over all classes, however many are new; their level counts
        by_hand = (given - torch.cat([level(old[:, :2]), level(new[:, 2:])], 1)).square().mean()
    torch.testing.assert_close(found, 3 * by_hand)
    torch.testing.assert_close(old, given)  # nothing has moved yet, and the specialist has
    assert not torch.allclose(new, given)


def test_old_heads_learn_on_where_their_teacher_holds_them(lab: Any) -> None:
    for strength, learns in ((1.0, True), (0.0, False)):
        learner, *_ = begun(lab, f"lora(rank=2) + expert_distillation(strength={strength})")
        assert all(p.requires_grad == learns for p in learner.objective.heads[0].parameters())


def test_old_tasks_are_kept_no_worse_than_by_plain_training_and_the_last_is_learnt_nearly_as_well(lab: Any) -> None:
    bench = lab.but(per_class=12, noise=0.5, dim=32)

    def accuracy(spec: str) -> list[float]:
        learner, stream = bench.learner(spec), bench.stream()
        bench.teach(learner, stream.tasks, epochs=6)
        return [each["accuracy_with_task_id"] for each in learner.objective.evaluate(learner, stream.tasks)]

    plain, held = accuracy("lora(rank=4)"), accuracy("lora(rank=4) + expert_distillation(strength=4, lr=0.01)")
    assert sum(held[:2]) >= sum(plain[:2])
    assert held[2] >= plain[2] - 0.15


def test_finished_experts_that_the_data_brings_are_the_teachers_from_the_first_task_on(lab: Any) -> None:
    learner, stream = lab.but(classes=4).learner("lora(rank=2) + expert_distillation"), lab.but(classes=4).stream()
    learner.grow(task := stream.tasks[0])
    learner.method.begin_task(learner, task)
    batch = task.train.__getitems__(range(6))
    owners = torch.tensor([0, 0, 1, 1])
    said = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features = learner.encode(batch)
    part = list(learner.method)[-1]
    found = part.penalty(learner, batch | {EXPERTS: said, EXPERTS_OF: owners.expand(6, -1)}, features)
    given = learner.objective.scores(features)
    by_hand = sum(way(said[:, own], given[:, own]) for own in ([0, 1], [2, 3]))
    torch.testing.assert_close(found, by_hand)
    assert part.penalty(learner, batch, features) == 0.0


def test_a_reference_is_read_without_its_labels(lab: Any) -> None:
    learner, task, part = begun(lab, "lora(rank=2) + expert_distillation(reference='synthetic(tasks=1)', size=10)")
    assert {name: tuple(said.shape) for name, said in part.said.items()} == {"new": (10, 4), "old": (10, 4)}
    features = learner.encode(task.train.__getitems__(range(4)))
    batch = {"label": torch.zeros(4, dtype=torch.int64)}
    tasks, places = part._read(learner)
    rows = torch.randperm(10, generator=learner.generator("expert_distillation", learner.step))[:4]
    images = {"image": read_references(tasks, places[rows])["image"]}
    new, old = (teacher.ask(learner, images)["scores"] for teacher in (part.expert, part.teacher))
    given = learner.objective.scores(learner.encode(images))
    assert not torch.allclose(new, old)
    by_hand = way(new[:, 2:], given[:, 2:]) + way(old[:, :2], given[:, :2])
    torch.testing.assert_close(part.penalty(learner, batch, features), by_hand)
    part.end_task(learner, task)
    assert not part.said
    assert not part.expert.weights
