"""Feature distillation: features of new images, and embeddings of old names, stay where the task found them."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.methods.feature_distill import FeatureDistill
from perdure.streams.augment import AUGMENTS
from perdure.training.config import make_method
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


@pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune", "fm_lora(rank=4)"])
def test_strength_zero_is_the_carrier_alone_bit_for_bit(carrier: str, lab: Any) -> None:
    plain, distilled = lab.taught(carrier).memory(), lab.taught(f"{carrier} + feature_distill(strength=0)").memory()
    assert distilled.keys() == {key.replace("method.", "method.parts.0.") for key in plain}
    for key, value in plain.items():
        assert torch.equal(distilled[key.replace("method.", "method.parts.0.")], value), key


def test_the_penalty_is_the_distance_of_features_by_hand(lab: Any) -> None:
    for form in ("cosine", "mse"):
        learner, task, part = begun(lab, f"lora(rank=2) + feature_distill(strength=5, form={form!r})")
        batch = whole(task)
        with torch.no_grad():
            now, was = learner.encode(batch), part.teacher(learner, batch)["features"]
            penalty = part.penalty(learner, learner.noted(batch), now)
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
    kept = learner.recorded(learner.prefixed(task.train)).__getitems__(range(len(task.train)))
    assert {"hidden", "feature_distill/features"} <= kept.keys()
    with torch.no_grad():
        assert not torch.allclose(learner.encode(whole(task)), kept["feature_distill/features"], atol=1e-2)
    torch.testing.assert_close(part.teacher(learner, whole(task))["features"], kept["feature_distill/features"])


def test_augmented_images_are_compared_with_the_teachers_features_of_the_same_view(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + feature_distill(strength=1000)"), lab.stream()
    learner.augment = AUGMENTS["crop"]
    lab.teach(learner, stream.tasks[:1])
    views = next(learner.views(stream.tasks[1].train, 16, "look"))
    before = learner.encode(views).detach()
    lab.teach(learner, stream.tasks[1:2])
    after = learner.encode(views)
    assert (1 - F.cosine_similarity(before, after)).mean() < 1e-2


def test_of_a_test_set_nothing_is_recorded_for_it_is_kept_longer_than_a_teacher(lab: Any) -> None:
    learner, task, part = begun(lab, "lora(rank=2) + feature_distill")
    batch = whole(task)
    assert "feature_distill/features" in learner.noted(batch)
    with learner.inference():
        assert learner.noted(batch).keys() == batch.keys()
        assert torch.isfinite(part.penalty(learner, batch, learner.encode(batch)))


def test_nothing_of_the_teacher_is_stored_once_the_task_is_learnt(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, task, _ = begun(bench, "lora(rank=2, tower='both') + feature_distill(tower='both')")
    kept = {key.rpartition("parts.1.")[2].partition(".")[0] for key in learner.memory() if "parts.1." in key}
    assert kept == {"teacher", "names"}
    bench.close(learner, task)
    assert not any("parts.1." in key for key in learner.memory())


@pytest.mark.parametrize("spec", ["feature_distill", "probe + feature_distill", "ncm + replay + feature_distill"])
def test_where_no_part_changes_the_encoder_it_is_refused_when_built(spec: str) -> None:
    with pytest.raises(ValueError, match=r"^feature_distill has nothing to protect in .*: no part changes the encoder"):
        make_method(spec)


@pytest.mark.parametrize("tower", ["text", "both"])
def test_texts_are_refused_where_the_objective_reads_none(tower: str, lab: Any) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^feature_distill\(tower='{tower}'\): this objective reads no texts: use --objective zeroshot",
    ):
        lab.taught(f"lora(rank=2) + feature_distill(tower={tower!r})")


@pytest.mark.parametrize(
    ("carrier", "tower", "still", "instead"),
    [
        ("lora(rank=2)", "both", "text", "vision"),
        ("finetune", "text", "text", "vision"),
        ("lora(rank=2, tower='text')", "vision", "vision", "text"),
        ("finetune(tower='text')", "both", "vision", "text"),
    ],
)
def test_a_tower_that_no_part_trains_is_refused(carrier: str, tower: str, still: str, instead: str, lab: Any) -> None:
    with pytest.raises(ValueError, match=f"has no effect on the {still} tower, which no .* write tower='{instead}'"):
        lab.but(objective="zeroshot").taught(f"{carrier} + feature_distill(tower={tower!r})")


def test_where_the_encoder_is_trained_no_more_it_is_refused(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2, tasks=1) + feature_distill"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    with pytest.raises(ValueError, match=r"^task 1: feature_distill has no effect where no part trains the encoder"):
        lab.teach(learner, stream.tasks[1:2])


@pytest.mark.parametrize("option", ["form='mse'", "tower='text'", "tower='both'"])
def test_options_of_a_distance_that_is_not_taken_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} has no effect with strength=0: leave it out$"):
        make_method(f"lora(tower='both') + feature_distill(strength=0, {option})")
