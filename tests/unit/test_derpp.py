"""DER++: what is stored, what is compared, and that weights of 0 leave nothing of it."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.mechanisms.references import read_references
from perdure.streams.augment import AUGMENTS


@pytest.mark.parametrize("selection", ["reservoir", "herding"])
def test_logits_are_those_of_the_model_at_the_end_of_an_images_task(selection: str, lab: Any) -> None:
    learner, stream = lab.learner(f"lora(rank=2) + derpp(size=20, selection={selection!r})"), lab.stream()
    then = []
    for task in stream:
        lab.teach(learner, [task])
        features, _ = learner.features(task.train)
        then.append(learner.objective.scores(features).detach())
        memory, logits = learner.method.parts[1].memory, learner.method.parts[1].stored_logits["logits"]
        assert logits.shape == (len(memory), len(learner.objective.classes))
        for (index, position, _), row in zip(memory.refs.tolist(), logits, strict=True):
            width = then[index].shape[1]
            torch.testing.assert_close(row[:width], then[index][position], rtol=1e-5, atol=1e-5)
            assert not row[width:].any()
    assert set(memory.refs[:, 0].tolist()) == {0, 1, 2}


def third_task(lab: Any, options: str) -> tuple[Any, dict[str, torch.Tensor]]:
    learner, stream = lab.learner(f"lora(rank=2) + derpp(size=9, {options})"), lab.stream()
    lab.teach(learner, stream.tasks[:2])
    learner.grow(stream.tasks[2])
    learner.train()
    return learner, stream.tasks[2].train.__getitems__(range(8))


def test_the_penalty_is_the_papers(lab: Any) -> None:
    learner, new = third_task(lab, "alpha=0.7, beta=0.2, ratio=0.5")
    part, learner.step = learner.method.parts[1], 5
    refs, stored = part.memory.refs, part.stored_logits["logits"]
    rows = part.memory.pick(4, learner.generator("derpp logits", 5))
    other = part.memory.pick(4, learner.generator("derpp labels", 5))
    assert rows.tolist() != other.tolist()
    z = learner.objective.scores(learner.encode(read_references(learner.tasks, refs[rows])))
    squares = []
    for row, scores in zip(rows.tolist(), z, strict=True):
        width = 2 * (int(refs[row, 0]) + 1)
        squares += (scores[:width] - stored[row, :width]).square().unbind()
    labelled = read_references(learner.tasks, refs[other])
    ce = F.cross_entropy(learner.objective.scores(learner.encode(labelled)), labelled["label"])
    expected = 0.7 * torch.stack(squares).mean() + 0.2 * ce
    torch.testing.assert_close(part.penalty(learner, new, torch.empty(0)), expected, rtol=1e-5, atol=1e-6)
    loss = learner.objective.loss(learner.encode(new), new)  # new images compete among the task's own classes
    torch.testing.assert_close(learner.loss(new), loss + expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "images"), [("alpha=0", 8), ("beta=0", 8), ("alpha=1", 16)])
def test_both_draws_take_one_pass_and_a_draw_without_weight_none(
    options: str, images: int, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, new = third_task(lab, options)
    seen: list[int] = []
    encode = learner.encode
    monkeypatch.setattr(learner, "encode", lambda batch: seen.append(len(batch["label"])) or encode(batch))
    learner.loss(new)
    assert seen == [8, images]


def test_old_images_are_augmented_as_the_run_augments(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, new = third_task(lab, "alpha=1")
    plain: list[torch.Tensor] = []
    encode = learner.encode
    monkeypatch.setattr(learner, "encode", lambda batch: plain.append(batch["image"]) or encode(batch))
    learner.loss(new)
    learner.augment = AUGMENTS["crop"]
    learner.loss(new)
    assert plain[1].shape == plain[3].shape
    assert not torch.equal(plain[1], plain[3])


def test_old_logits_stay_nearer_with_it(lab: Any) -> None:
    bench = lab.but(per_class=16, epochs=4)
    images = bench.stream().tasks[0].test

    def moved(spec: str) -> float:
        learner = bench.learner(spec)
        bench.teach(learner, bench.stream().tasks[:1])
        before = learner.objective.scores(learner.features(images)[0])
        bench.teach(learner, bench.stream().tasks[1:])
        return (learner.objective.scores(learner.features(images)[0])[:, :2] - before).norm().item()

    held, free = (moved(f"lora(rank=2) + derpp(size=32, alpha={alpha}, beta=0)") for alpha in (1, 1e-6))
    assert held < 0.8 * free
