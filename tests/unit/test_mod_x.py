"""Mod-X: what the previous model saw beside the diagonal is held, where it found the pair itself."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.methods.mod_x import ModX
from perdure.objectives.retrieve import Retrieve, picked
from perdure.streams import build_stream
from perdure.streams.augment import AUGMENTS
from perdure.training.config import make_method
from perdure.training.loop import fit_task
from perdure.types import Batch, Stream, Task


def captioned(spec: str, captions: int | None = 1) -> tuple[Core, Stream]:
    """A learner of captions, and its stream."""
    learner = Core(tiny(dim=16, text=True), Retrieve(captions), make_method(spec))
    return learner, build_stream("captions_synthetic(tasks=2, per_task=8)", learner.backbone.preprocess, 0)


def begun(lab: Any, learner: Core, stream: Stream) -> tuple[Task, ModX]:
    """Some steps into the second task."""
    lab.teach(learner, stream.tasks[:1], epochs=10)
    learner.grow(stream.tasks[1])
    lab.descend(learner, stream.tasks[1])
    return stream.tasks[1], next(part for part in learner.method if isinstance(part, ModX))


def whole(task: Task) -> Batch:
    return task.train.__getitems__(range(len(task.train)))


def by_hand(old: torch.Tensor, new: torch.Tensor, owners: list[int], temperature: float) -> tuple[float, int]:
    """The sum over rows, one at a time, and how many of them the old model had wrong."""
    total, wrong = 0.0, 0
    for i, (was, now) in enumerate(zip(old.double(), new.double(), strict=True)):
        if owners[int(was.argmax())] != i:
            wrong += 1
            was = now
        p, q = (was / temperature).softmax(0), (now / temperature).softmax(0)
        total += float((p * (p / q).log()).sum())
    return total * temperature**2, wrong


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_penalty_is_the_divergence_of_rows_that_the_old_model_had_right(temperature: float, lab: Any) -> None:
    learner, stream = captioned(f"finetune(tower='both') + mod_x(strength=3, temperature={temperature})")
    task, part = begun(lab, learner, stream)
    batch = whole(task)
    with torch.no_grad():
        rows, places = learner.objective.chosen(batch)
        images, texts = part.teacher(learner, batch).values()
        old = F.normalize(images, dim=1) @ F.normalize(picked(texts, (rows, places)), dim=1).T
        features = learner.encode(batch)
        new = F.normalize(features, dim=1) @ F.normalize(learner.objective.shown(batch)[0], dim=1).T
        penalty = part.penalty(learner, learner.cache.complete(batch), features)
    assert rows.tolist() == list(range(8))
    there, wrong = by_hand(old, new, rows.tolist(), temperature)
    back, wrong_back = by_hand(old.T, new.T, rows.tolist(), temperature)
    assert 0 < wrong + wrong_back < 16
    assert penalty.item() == pytest.approx(3 * (there + back) / 2, rel=1e-3)
    assert penalty > 0


def test_any_of_an_images_captions_is_its_own(lab: Any) -> None:
    part = ModX(strength=1.0)
    old = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.1, 0.8]])
    new = torch.zeros(2, 3)
    every, only = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool(), torch.tensor([[1, 0, 0], [0, 0, 1]]).bool()
    rows = [F.kl_div(new[i].log_softmax(0), old[i].softmax(0), reduction="sum") for i in (0, 1)]
    torch.testing.assert_close(part._kept(old, new, every), rows[0] + rows[1])
    torch.testing.assert_close(part._kept(old, new, only), rows[1])


def test_a_stronger_one_keeps_the_matrix_of_the_task_before_nearer(lab: Any) -> None:
    def moved(strength: float) -> float:
        learner, stream = captioned(f"finetune(tower='both') + mod_x(strength={strength})", None)
        lab.teach(learner, stream.tasks[:1], epochs=10)
        batch = whole(stream.tasks[1])
        before = matrix(learner, batch)
        lab.teach(learner, stream.tasks[1:], epochs=4)
        return float((matrix(learner, batch) - before).square().mean())

    def matrix(learner: Core, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            texts = F.normalize(learner.objective.shown(batch)[0], dim=1)
            return F.normalize(learner.encode(batch), dim=1) @ texts.T

    assert moved(1000) < 0.7 * moved(0)


@pytest.mark.parametrize(("augment", "times"), [("none", 1), ("crop", 3)])
def test_the_teacher_is_asked_once_where_images_stay_as_they_are(augment: str, times: int, lab: Any) -> None:
    learner, stream = captioned("lora(rank=2, tower='both') + mod_x")
    learner.augment = AUGMENTS[augment]
    asked = []
    learner.grow(stream.tasks[0])
    part = learner.method.parts[1]
    ask = part.teacher.ask
    part.teacher.ask = lambda learner, batch: asked.append(len(batch["label"])) or ask(learner, batch)
    fit_task(learner, stream.tasks[0], lab.train_config(epochs=3))
    assert sum(asked) == times * 8
