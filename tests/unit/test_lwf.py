"""LwF: what new images score for old classes is held, by the formula, and by a teacher that is asked once."""

from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.mechanisms.distillation import distillation
from perdure.methods.lwf import LwF
from perdure.streams.augment import AUGMENTS
from perdure.training.loop import fit_task
from perdure.types import Batch, Task


def begun(bench: Any, spec: str, tasks: int = 2) -> tuple[Core, Task, LwF]:
    """A learner some steps into the last of `tasks`, and the part that distils."""
    learner, stream = bench.learner(spec), bench.stream()
    bench.teach(learner, stream.tasks[: tasks - 1])
    task = stream.tasks[tasks - 1]
    learner.grow(task)
    bench.descend(learner, task)
    return learner, task, next(part for part in learner.method if isinstance(part, LwF))


def whole(task: Task) -> Batch:
    return task.train.__getitems__(range(len(task.train)))


def answers(learner: Core, lwf: LwF, task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The penalty on all of the task's images, and what teacher and student score."""
    batch = whole(task)
    with torch.no_grad():
        features = learner.encode(batch)
        penalty = lwf.penalty(learner, learner.cache.complete(batch), features)
        return penalty, lwf.teacher(learner, batch)["scores"], learner.objective.scores(features)


def test_the_penalty_is_the_divergence_of_scores_for_old_classes_alone(lab: Any) -> None:
    learner, task, lwf = begun(lab, "lora(rank=2) + lwf(strength=3, temperature=4)", tasks=3)
    penalty, teacher, student = answers(learner, lwf, task)
    expected = 3 * distillation(teacher[:, :4], student[:, :4], 4.0)
    assert expected > 1e-3
    torch.testing.assert_close(penalty, expected)


def test_the_schedule_share_is_the_share_of_old_classes(lab: Any) -> None:
    for tasks, share in ((2, 1 / 2), (3, 2 / 3)):
        learner, task, lwf = begun(lab, "lora(rank=2) + lwf(schedule='share')", tasks)
        penalty, teacher, student = answers(learner, lwf, task)
        old = 2 * (tasks - 1)
        torch.testing.assert_close(penalty, share * distillation(teacher[:, :old], student[:, :old], 2.0))


def test_where_the_task_is_told_each_former_task_has_its_own_distribution(lab: Any) -> None:
    learner, task, lwf = begun(lab.but(scenario="task"), "lora(rank=2) + lwf", tasks=3)
    penalty, teacher, student = answers(learner, lwf, task)
    expected = sum(distillation(teacher[:, own], student[:, own], 2.0) for own in ([0, 1], [2, 3]))
    torch.testing.assert_close(penalty, expected)


def test_classes_that_come_again_are_all_old(lab: Any) -> None:
    learner, task, lwf = begun(lab.but(scenario="domain"), "lora(rank=2) + lwf", tasks=3)
    penalty, teacher, student = answers(learner, lwf, task)
    assert teacher.shape[1] == len(task.classes)
    torch.testing.assert_close(penalty, distillation(teacher, student, 2.0))


@pytest.mark.parametrize("tower", ["vision", "both"])
def test_the_text_direction_is_the_divergence_over_images_of_each_old_name(tower: str, lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, task, lwf = begun(bench, f"lora(rank=2, tower={tower!r}) + lwf(text_temperature=0.5)")
    penalty, teacher, student = answers(learner, lwf, task)
    images = distillation(teacher[:, :2], student[:, :2], 2.0)
    texts = distillation(teacher[:, :2].T, student[:, :2].T, 0.5)
    assert min(images, texts) > 1e-5
    torch.testing.assert_close(penalty, images + texts)


def test_old_heads_learn_on_under_the_distillation_and_only_where_they_shall(lab: Any) -> None:
    for options, moves in (("strength=0", False), ("strength=1", True), ("heads='frozen'", False)):
        learner, stream = lab.learner(f"lora(rank=2) + lwf({options})"), lab.stream()
        lab.teach(learner, stream.tasks[:1])
        old = learner.objective.heads[0].weight.detach().clone()
        lab.teach(learner, stream.tasks[1:2])
        assert torch.equal(learner.objective.heads[0].weight, old) != moves


@pytest.mark.parametrize(("heads", "times"), [("learn", 5), ("frozen", 100)])
def test_a_stronger_distillation_keeps_old_scores_of_new_images_nearer(heads: str, times: float, lab: Any) -> None:
    def moved(strength: float) -> float:
        bench = lab.but(lr=3e-2)
        learner, stream = bench.learner(f"lora(rank=2) + lwf(strength={strength}, heads={heads!r})"), bench.stream()
        bench.teach(learner, stream.tasks[:2])
        before = scores(learner, stream.tasks[2])
        bench.teach(learner, stream.tasks[2:], epochs=8)
        return float(distillation(before, scores(learner, stream.tasks[2])[:, :4], 2.0))

    def scores(learner: Core, task: Task) -> torch.Tensor:
        with torch.no_grad():
            return learner.objective.scores(learner.encode(whole(task)))

    assert moved(0) > times * moved(1000)


def watched(lab: Any, augment: str) -> tuple[list[int], list[int], Core]:
    """Images that the encoder saw in the first and second task of 16 images, in 3 epochs."""
    learner, stream = lab.learner("lora(rank=2, blocks='1') + lwf"), lab.stream()
    learner.augment = AUGMENTS[augment]
    seen: list[list[int]] = []
    block = learner.backbone.get_submodule("vision.blocks.1")
    for task in stream.tasks[:2]:
        learner.grow(task)
        seen.append([])
        handle = block.register_forward_hook(lambda _, args, out: seen[-1].append(len(out)))
        fit_task(learner, task, lab.train_config(epochs=3))
        handle.remove()
    return *seen, learner


def test_the_teacher_is_asked_once_for_a_training_set_whose_images_stay_as_they_are(lab: Any) -> None:
    first, second, _ = watched(lab, "none")
    assert sum(first) == 3 * 16
    assert sum(second) == 3 * 16 + 16


def test_the_teacher_is_asked_in_every_step_where_images_are_augmented(lab: Any) -> None:
    first, second, learner = watched(lab, "crop")
    assert sum(first) == 3 * 16
    assert sum(second) == 2 * 3 * 16
    assert all(torch.isfinite(p).all() for p in learner.parameters())


def test_recorded_scores_are_what_the_teacher_says_at_any_time(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2, blocks='1') + lwf"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    task = stream.tasks[1]
    learner.grow(task)
    learner.train()
    learner.prepare()
    learner.method.begin_task(learner, task)
    kept = learner.cache.precomputed(learner.cache.lower_blocks(task.train)).__getitems__(range(len(task.train)))[
        "lwf/scores"
    ]
    lab.descend(learner, task, steps=0)
    optimizer = torch.optim.Adam(learner.trainable().values(), 2e-2)
    for _ in range(4):
        optimizer.zero_grad()
        learner.loss(whole(task) | {"lwf/scores": kept}).backward()
        optimizer.step()
    lwf = learner.method.parts[1]
    with torch.no_grad():
        assert not torch.allclose(learner.objective.scores(learner.encode(whole(task))), kept, atol=1e-2)
    torch.testing.assert_close(lwf.teacher(learner, whole(task))["scores"], kept)


def test_replayed_images_are_distilled_with_the_new_ones(lab: Any) -> None:
    learner, task, lwf = begun(lab, "lora(rank=2) + lwf + replay(size=12)")
    kept = learner.cache.precomputed(task.train)
    batch = learner.method.batch(learner, kept.__getitems__(range(8)))
    assert set(batch["label"].tolist()) - set(task.classes)
    torch.testing.assert_close(batch["lwf/scores"], lwf.teacher.ask(learner, batch)["scores"])


def test_the_order_of_the_sum_does_not_matter_even_where_the_rank_is_chosen(lab: Any) -> None:
    one, other = (lab.taught(spec) for spec in ("lwf + inflora(ranks=(1, 2, 4))", "inflora(ranks=(1, 2, 4)) + lwf"))
    a, b = (
        dict(zip(sorted(m), map(m.get, sorted(m)), strict=True)) for m in (one.learnt_state(), other.learnt_state())
    )
    heads = [key for key in a if key.startswith("objective.")]
    assert heads
    assert all(torch.equal(a[key], b[key]) for key in heads)


def test_bfloat16_distils_from_answers_of_the_same_precision(lab: Any) -> None:
    for carrier in ("lora(rank=2)", "finetune"):
        learner, stream = lab.learner(f"{carrier} + lwf"), lab.stream()
        learner.precision = torch.bfloat16
        lab.teach(learner, stream.tasks[:1])
        learner.grow(stream.tasks[1])
        lab.descend(learner, stream.tasks[1], steps=0)
        batch = whole(stream.tasks[1])
        penalty = learner.method.penalty(learner, batch, learner.encode(batch))
        assert penalty.abs() < 1e-6, carrier
