"""Feature distillation: features of new images, and embeddings of old names, stay where the task found them."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.methods.feature_distill import FeatureDistill
from perdure.streams.augment import AUGMENTS
from perdure.types import Batch, Task


def begun(bench: Any, spec: str) -> tuple[Core, Task, FeatureDistill]:
    """A learner some steps into its second task, and the part that distils."""
    learner, stream = bench.learner(spec), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    bench.descend(learner, stream.tasks[1])
    return learner, stream.tasks[1], next(part for part in learner.method if isinstance(part, FeatureDistill))


def whole(task: Task) -> Batch:
    return task.train.__getitems__(range(len(task.train)))


def test_the_penalty_is_the_distance_of_features_by_hand(lab: Any) -> None:
    for form in ("cosine", "mse"):
        learner, task, part = begun(lab, f"lora(rank=2) + feature_distill(strength=5, form={form!r})")
        batch = whole(task)
        with torch.no_grad():
            now, was = learner.encode(batch), part.teacher(learner, batch)["features"]
            penalty = part.penalty(learner, learner.cache.complete(batch), now)
        pairs = list(zip(was.double(), now.double(), strict=True))
        if form == "cosine":
            rows = [1 - (a @ b) / (a.norm() * b.norm()) for a, b in pairs]
        else:
            rows = [(a - b).norm() ** 2 / a.norm() ** 2 for a, b in pairs]
        assert penalty.item() == pytest.approx(5 * float(sum(rows)) / len(rows), rel=1e-4)
        assert penalty > 1e-3


def test_the_text_side_is_the_distance_of_old_names_from_the_teachers_embeddings(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, stream = bench.learner("lora(rank=2, tower='both') + feature_distill(tower='both')"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    with torch.no_grad():
        was = learner.objective.embed(stream.tasks[0].names)
    learner.grow(stream.tasks[1])
    bench.descend(learner, stream.tasks[1])
    part, batch = learner.method.parts[1], whole(stream.tasks[1])
    with torch.no_grad():
        now = learner.objective.embed(stream.tasks[0].names)
        features = learner.encode(batch)
        texts = (1 - F.cosine_similarity(was, now)).mean()
        images = (1 - F.cosine_similarity(part.teacher(learner, batch)["features"], features)).mean()
        penalty = part.penalty(learner, batch, features)
    assert min(texts, images) > 1e-4
    torch.testing.assert_close(penalty, texts + images)


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_a_stronger_distillation_keeps_features_of_new_images_nearer(form: str, lab: Any) -> None:
    def moved(rest: str) -> float:
        learner, stream = lab.learner(f"lora(rank=2){rest}"), lab.stream()
        lab.teach(learner, stream.tasks[:1])
        before = learner.features(stream.tasks[1].train)[0]
        lab.teach(learner, stream.tasks[1:2], epochs=8)
        return float((1 - F.cosine_similarity(before, learner.features(stream.tasks[1].train)[0])).mean())

    assert moved("") > 50 * moved(f" + feature_distill(strength=1000, form={form!r})")


def test_old_names_stay_nearer_where_the_text_tower_is_held(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")

    def moved(rest: str) -> float:
        learner, stream = bench.learner(f"lora(rank=2, tower='text'){rest}"), bench.stream()
        bench.teach(learner, stream.tasks[:1])
        before = embedded(learner, stream.tasks[0])
        bench.teach(learner, stream.tasks[1:2], epochs=8)
        return float((1 - F.cosine_similarity(before, embedded(learner, stream.tasks[0]))).mean())

    def embedded(learner: Core, task: Task) -> torch.Tensor:
        with torch.no_grad():
            return learner.objective.embed(task.names)

    assert moved("") > 10 * moved(" + feature_distill(strength=1000, tower='text')")


def test_recorded_features_are_what_the_teacher_says_after_training(lab: Any) -> None:
    learner, task, part = begun(lab, "lora(rank=2, blocks='1') + feature_distill")
    kept = learner.cache.precomputed(learner.cache.lower_blocks(task.train)).__getitems__(range(len(task.train)))
    assert {"lower_blocks", "feature_distill/features"} <= kept.keys()
    with torch.no_grad():
        assert not torch.allclose(learner.encode(whole(task)), kept["feature_distill/features"], atol=1e-2)
    torch.testing.assert_close(part.teacher(learner, whole(task))["features"], kept["feature_distill/features"])


def test_augmented_images_are_compared_with_the_teachers_features_of_the_same_view(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + feature_distill(strength=1000)"), lab.stream()
    learner.augment = AUGMENTS["crop"]
    lab.teach(learner, stream.tasks[:1])
    views = next(learner.training_views(stream.tasks[1].train, 16, "look"))
    before = learner.encode(views).detach()
    lab.teach(learner, stream.tasks[1:2])
    after = learner.encode(views)
    assert (1 - F.cosine_similarity(before, after)).mean() < 1e-2
