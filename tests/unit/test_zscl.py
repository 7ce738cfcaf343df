"""ZSCL: the pre-trained model's scores are held, by the formula, whatever has been trained since."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.mechanisms.distillation import distillation
from perdure.methods.zscl import ZSCL
from perdure.objectives.retrieve import Retrieve, embedded, picked
from perdure.streams import build_stream
from perdure.training.config import make_method
from perdure.types import Batch, Stream, Task


def captioned(spec: str, captions: int | None = 1) -> tuple[Core, Stream]:
    """A learner of captions, and its stream."""
    learner = Core(tiny(dim=16, text=True), Retrieve(captions), make_method(spec))
    return learner, build_stream("captions_synthetic(tasks=2, per_task=8)", learner.backbone.preprocess, 0)


def begun(lab: Any, learner: Core, stream: Stream) -> tuple[Task, ZSCL]:
    """Some steps into the second task."""
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    lab.descend(learner, stream.tasks[1])
    return stream.tasks[1], next(part for part in learner.method if isinstance(part, ZSCL))


def whole(task: Task) -> Batch:
    return task.train.__getitems__(range(len(task.train)))


def penalty(learner: Core, part: ZSCL, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return part.penalty(learner, learner.cache.complete(batch), learner.encode(batch))


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def test_the_penalty_is_the_divergence_from_the_pretrained_model_both_ways(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner = bench.learner("finetune(tower='both') + zscl(strength_image=3, strength_text=5, temperature=4, anchor=0)")
    task, part = begun(bench, learner, bench.stream())
    untaught, batch = bench.backbone(), whole(task)
    lines = [f"a photo of a {name}." for name in learner.objective.names]
    assert len(lines) == 4
    scale = untaught.logit_scale
    with torch.no_grad():
        teacher = scale * cosines(untaught(batch), untaught.encode_text(lines))
        student = scale * cosines(learner.encode(batch), learner.embed_texts(lines))
    expected = 3 * distillation(teacher, student, 4.0) + 5 * distillation(teacher.T, student.T, 4.0)
    assert expected > 1e-2
    torch.testing.assert_close(penalty(learner, part, batch), expected)


@pytest.mark.parametrize("shown", [1, None])
def test_captions_of_the_step_are_the_texts_where_captions_are_learnt(shown: int | None, lab: Any) -> None:
    learner, stream = captioned("finetune(tower='both') + zscl(anchor=0)", shown)
    task, part = begun(lab, learner, stream)
    untaught, batch = tiny(dim=16, text=True), whole(task)
    with torch.no_grad():
        rows, places = learner.objective.chosen(batch)
        texts = picked(embedded(Core(untaught, Retrieve(), make_method("probe")), batch["text"]), (rows, places))
        teacher = untaught.logit_scale * cosines(untaught(batch), texts)
        student = untaught.logit_scale * cosines(learner.encode(batch), learner.objective.shown(batch)[0])
    expected = distillation(teacher, student, 2.0) + distillation(teacher.T, student.T, 2.0)
    assert expected > 1e-2
    torch.testing.assert_close(penalty(learner, part, batch), expected)


def test_without_the_text_gradient_students_images_meet_the_teachers_texts(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner = bench.learner("finetune(tower='both') + zscl(text_gradient=False, anchor=0)")
    task, part = begun(bench, learner, bench.stream())
    batch = whole(task)
    learner.zero_grad()
    part.penalty(learner, batch, learner.encode(batch)).backward()
    moved = {name for name, p in learner.trainable().items() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("backbone.vision.") for name in moved)
    assert not any(name.startswith("backbone.text.") for name in moved)
    with torch.no_grad():
        untaught = bench.backbone()
        texts = untaught.encode_text([f"a photo of a {name}." for name in learner.objective.names])
        teacher = untaught.logit_scale * cosines(untaught(batch), texts)
        student = untaught.logit_scale * cosines(learner.encode(batch), texts)
    expected = distillation(teacher, student, 2.0) + distillation(teacher.T, student.T, 2.0)
    torch.testing.assert_close(penalty(learner, part, batch), expected)


def test_a_reference_is_a_sample_of_a_streams_training_images_and_its_captions(lab: Any) -> None:
    source = "captions_synthetic(tasks=2, per_task=9)"
    bench = lab.but(objective="zeroshot")
    learner = bench.learner(f"finetune(tower='both') + zscl(reference='{source}', size=7, images=5, texts=6, anchor=0)")
    task, part = begun(bench, learner, bench.stream())
    value = penalty(learner, part, whole(task))
    (material,) = part._material
    assert material.features.shape == (7, 16)
    assert len(material.lines) == 14
    assert len({tuple(place) for place in material.places.tolist()}) == 7
    drawn = [part._drawn(learner, 16) for _ in range(2)]
    assert [len(each) for each in drawn[0]] == [5, 5, 6, 6]
    assert torch.equal(drawn[0][0], drawn[1][0])
    learner.step += 1
    assert not torch.equal(part._drawn(learner, 16)[0], drawn[0][0])
    learner.step -= 1
    images, now, lines, texts = drawn[0]
    with torch.no_grad():
        teacher = learner.backbone.logit_scale * cosines(images, texts)
        student = learner.backbone.logit_scale * cosines(now, learner.embed_texts(lines))
    torch.testing.assert_close(value, distillation(teacher, student, 2.0) + distillation(teacher.T, student.T, 2.0))
    untaught = bench.backbone()
    with torch.no_grad():
        torch.testing.assert_close(material.features, untaught({"image": material.read(torch.arange(7))}))


def test_class_names_are_the_texts_of_a_reference_without_captions(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner = bench.learner("finetune + zscl(reference='synthetic(tasks=3, classes_per_task=3)', anchor=0)")
    task, part = begun(bench, learner, bench.stream())
    penalty(learner, part, whole(task))
    assert len(part._material[0].lines) == 9


def test_the_anchor_is_the_squared_distance_from_before_the_task(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner = bench.learner("lora(rank=2) + zscl(strength_image=0, strength_text=0, anchor=7)")
    stream = bench.stream()
    bench.teach(learner, stream.tasks[:1])
    before = {name: p.detach().clone() for name, p in learner.trainable().items()}
    learner.grow(stream.tasks[1])
    bench.descend(learner, stream.tasks[1])
    part = learner.method.parts[1]
    expected = 7 * sum((p.detach() - before[name]).square().sum() for name, p in learner.trainable().items())
    assert expected > 1e-3
    torch.testing.assert_close(penalty(learner, part, whole(stream.tasks[1])), expected)


def test_it_keeps_scores_of_images_that_are_never_taught(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    others = build_stream("synthetic(tasks=1, classes_per_task=6)", bench.backbone().preprocess, 5).tasks[0]
    lines = [f"a photo of a {name}." for name in others.names]

    def moved(spec: str) -> float:
        learner, batch = bench.taught(spec, epochs=4), whole(others)
        with torch.no_grad():
            now = cosines(learner.encode(batch), learner.backbone.encode_text(lines))
            untaught = bench.backbone()
            return float((now - cosines(untaught(batch), untaught.encode_text(lines))).square().mean())

    free = moved("finetune(tower='both')")
    assert moved("finetune(tower='both') + zscl(anchor=0)") < free
    strong = "strength_image=10, strength_text=10, anchor=0"
    assert moved(f"finetune(tower='both') + zscl(reference='captions_synthetic()', {strong})") < 0.7 * free
