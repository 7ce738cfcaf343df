"""A-GEM: what agrees with old examples stays as it is, what does not loses just that part."""

from typing import Any

import pytest
import torch

from perdure.training.loop import fit_task


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def stepped(lab: Any, spec: str) -> tuple[Any, Any, torch.Tensor]:
    """A learner in its second task after a backward pass, its agem, and the gradient on the drawn old examples."""
    learner, stream = lab.learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:1], epochs=4)
    learner.grow(stream.tasks[1])
    lab.descend(learner, stream.tasks[1], steps=3)
    (agem,) = (part for part in learner.method.parts if part.name == "agem")
    batch = learner.method.batch(learner, stream.tasks[1].train.__getitems__(range(16)))
    params = list(learner.trainable().values())
    loss = learner.objective.losses(learner.encode(agem._old), agem._old, only_task=False).mean()
    reference = flat(torch.autograd.grad(loss, params, materialize_grads=True))
    learner.zero_grad()
    learner.loss(batch).backward()
    return learner, agem, reference


def put(learner: Any, gradient: torch.Tensor) -> None:
    start = 0
    for p in learner.trainable().values():
        p.grad = gradient[start : start + p.numel()].view_as(p).clone()
        start += p.numel()


def gradient_of(learner: Any) -> torch.Tensor:
    return flat(p.grad for p in learner.trainable().values())


CARRIERS = pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune", "lora(rank=2, per_task=True)"])


@CARRIERS
def test_an_agreeing_gradient_stays_as_it_is_bit_for_bit(carrier: str, lab: Any) -> None:
    learner, agem, reference = stepped(lab, f"{carrier} + agem")
    own = gradient_of(learner)
    agreeing = own if own @ reference > 0 else own - 1.5 * (own @ reference) / (reference @ reference) * reference
    assert agreeing @ reference > 0
    put(learner, agreeing)
    before = [p.grad.clone() for p in learner.trainable().values()]
    agem.after_backward(learner)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.trainable().values(), before, strict=True))


@CARRIERS
def test_what_points_against_the_old_examples_is_taken_away_and_no_more(carrier: str, lab: Any) -> None:
    learner, agem, reference = stepped(lab, f"{carrier} + agem")
    own = gradient_of(learner)
    against = own if own @ reference < 0 else own - 1.5 * (own @ reference) / (reference @ reference) * reference
    put(learner, against)
    agem.after_backward(learner)
    after = gradient_of(learner)
    assert abs(float(after @ reference)) < 1e-5 * float(against.norm() * reference.norm())
    expected = against - (against @ reference) / (reference @ reference) * reference
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(after, against, rtol=1e-2)


def test_the_first_task_is_learnt_as_without_bit_for_bit(lab: Any) -> None:
    plain, guarded = (
        lab.teach(lab.learner(spec), lab.stream().tasks[:1]).objective
        for spec in ("lora(rank=2)", "lora(rank=2) + agem")
    )
    assert all(torch.equal(p, guarded.get_parameter(n)) for n, p in plain.named_parameters())


def test_a_frozen_old_head_stays_frozen_though_old_examples_reach_it(lab: Any) -> None:
    learner, stream = lab.learner("finetune + agem"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    before = learner.objective.heads[0].weight.clone()
    lab.teach(learner, stream.tasks[1:2])
    assert torch.equal(learner.objective.heads[0].weight, before)


def test_features_that_cannot_change_are_compared_as_the_batch_holds_them(lab: Any) -> None:
    learner, stream = lab.learner("probe + agem(batch_size=5)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    data = learner.cache.of(stream.tasks[1].train)
    batch = data.__getitems__(range(4))
    assert learner.method.batch(learner, batch) is batch
    old = learner.method.parts[1]._old
    assert old.keys() == batch.keys() == {"features", "label"}
    assert old["features"].shape == (5, learner.backbone.dim)


def test_old_examples_are_augmented_as_new_ones_are(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + agem(batch_size=5)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.augment = lambda batch, generator: batch | {"image": torch.zeros_like(batch["image"])}
    learner.method.batch(learner, stream.tasks[1].train.__getitems__(range(4)))
    assert not learner.method.parts[1]._old["image"].any()


@pytest.mark.parametrize("part", ["agem", "gem", "replay", "derpp"])
def test_what_a_frozen_encoder_makes_of_old_images_is_computed_once_a_task(
    part: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, stream = lab.learner(f"probe + {part}"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    encoded, forward = [], type(learner.backbone).forward
    monkeypatch.setattr(
        type(learner.backbone),
        "forward",
        lambda self, batch: encoded.append(len(batch["label"])) or forward(self, batch),
    )
    learner.grow(stream.tasks[1])
    fit_task(learner, stream.tasks[1], lab.train_config(epochs=4))
    old, new = len(stream.tasks[0].train), len(stream.tasks[1].train)
    assert sum(encoded) <= 2 * (old + new)  # for training, and at most once more at the task's end
