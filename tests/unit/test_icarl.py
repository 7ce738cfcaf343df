"""iCaRL: exemplars by herding, the union as training set, distillation, nearest mean of exemplars."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.mechanisms.references import read_references
from perdure.training.loop import fit_task


def test_an_image_is_answered_by_the_nearest_mean_of_exemplars(lab: Any) -> None:
    learner, stream = lab.taught("finetune + icarl(size=9)"), lab.stream()
    refs = learner.method.parts[1].memory.refs
    test = stream.tasks[1].test.__getitems__(range(8))
    with learner.inference():
        unit = F.normalize(learner.encode(read_references(list(stream.tasks), refs)), dim=1)
        means = F.normalize(torch.stack([unit[refs[:, 2] == c].mean(0) for c in range(6)]), dim=1)
        expected = F.normalize(learner.encode(test), dim=1) @ means.T
        torch.testing.assert_close(learner(test), expected, rtol=1e-5, atol=1e-5)
    assert torch.bincount(refs[:, 2]).tolist() == [2, 2, 2, 1, 1, 1]


def test_a_task_trains_on_its_images_and_the_exemplars_of_those_before(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + icarl(size=6)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    refs = learner.method.parts[1].memory.refs
    learner.grow(stream.tasks[1])
    data = learner.method.data(learner, stream.tasks[1])
    assert data.labels.tolist() == stream.tasks[1].train.labels.tolist() + refs[:, 2].tolist()
    own = stream.tasks[1].train.__getitems__(range(16))["image"]
    old = stream.tasks[0].train.__getitems__(refs[:, 1].tolist())["image"]
    assert torch.equal(data.__getitems__(range(22))["image"], torch.cat([own, old]))
    lab.close(learner, stream.tasks[1])
    labels = learner.method.data(learner, stream.tasks[1]).labels  # who reads it now meets no image twice
    assert set(labels[16:].tolist()) == {0, 1}


def second_task(lab: Any, options: str) -> tuple[Any, dict[str, torch.Tensor]]:
    learner, stream = lab.learner(f"lora(rank=2) + icarl(size=6{options})"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.train()
    learner.method.begin_task(learner, stream.tasks[1])
    return learner, stream.tasks[1].train.__getitems__(range(8))


def test_the_penalty_is_the_divergence_from_the_model_before_the_task(lab: Any) -> None:
    learner, batch = second_task(lab, ", strength=0.5, temperature=3.0")
    with torch.no_grad():
        before = learner.objective.scores(learner.encode(batch))[:, :2]
    assert learner.method.penalty(learner, batch, learner.encode(batch)).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in learner.trainable().values():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    now = learner.objective.scores(learner.encode(batch))
    p, q = F.softmax(before / 3, 1), F.softmax(now[:, :2] / 3, 1)
    expected = 0.5 * 9 * (p * (p / q).log()).sum(1).mean()
    assert expected > 0.01
    found = learner.method.penalty(learner, batch, learner.encode(batch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    total = F.cross_entropy(now, batch["label"]) + expected  # all seen classes compete
    torch.testing.assert_close(learner.loss(batch), total, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_asked_once_an_image_where_images_stay_as_they_are(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, stream = lab.learner("lora(rank=2) + icarl(size=6)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    asked: list[int] = []
    teacher = learner.method.parts[1].teacher
    ask = teacher.ask
    monkeypatch.setattr(teacher, "ask", lambda core, batch: asked.append(len(batch["label"])) or ask(core, batch))
    fit_task(learner, stream.tasks[1], lab.train_config(epochs=3))
    assert asked == [22]


def test_no_teacher_is_kept_without_strength_or_after_a_task(lab: Any) -> None:
    learner, batch = second_task(lab, ", strength=0")
    assert not learner.method.parts[1].teacher.weights
    assert learner.method.penalty(learner, batch, learner.encode(batch)) == 0
    assert not lab.taught("lora(rank=2) + icarl(size=6)").method.parts[1].teacher.weights


def test_a_class_without_exemplars_is_never_the_answer(lab: Any) -> None:
    learner, batch = second_task(lab, "")
    with learner.inference():
        scores = learner(batch)
    assert scores[:, :2].isfinite().all()
    assert (scores[:, 2:] == -torch.inf).all()
