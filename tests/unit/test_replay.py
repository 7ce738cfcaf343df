"""Replay: when old images come, how they are changed, and what is computed of them once."""

from typing import Any

import pytest
import torch

from perdure.streams.augment import AUGMENTS
from perdure.types import Batch


def begun(lab: Any, spec: str) -> tuple[Any, Batch]:
    """A learner in its third task, and that task's images."""
    learner, stream = lab.learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:2], epochs=1)
    learner.grow(stream.tasks[2])
    return learner.train(), stream.tasks[2].train.__getitems__(range(8))


def test_periodic_replay_replaces_the_first_and_every_third_batch(lab: Any) -> None:
    learner, new = begun(lab, "lora(rank=2) + replay(size=9, schedule='periodic', every=3, ratio=2)")
    found = []
    for learner.step in range(7):
        batch = learner.method.batch(learner, new)
        old = not set(batch["label"].tolist()) & {4, 5}
        found.append(old)
        assert len(batch["label"]) == (16 if old else 8)
    assert found == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("augment", ["flip", "crop", "zoom"])
def test_only_old_images_are_changed(augment: str, lab: Any) -> None:
    learner, new = begun(lab, f"lora(rank=2) + replay(size=9, augment={augment!r})")
    plain, _ = begun(lab, "lora(rank=2) + replay(size=9)")
    changed, as_they_are = (each.method.batch(each, new) for each in (learner, plain))
    assert torch.equal(changed["label"], as_they_are["label"])
    assert torch.equal(changed["image"][:8], new["image"])
    expected = AUGMENTS[augment](
        {"image": as_they_are["image"][8:]}, learner.generator("view of old images", learner.step)
    )
    assert torch.equal(changed["image"][8:], expected["image"])
    assert not torch.equal(changed["image"][8:], as_they_are["image"][8:])


def test_changed_images_are_encoded_anew_where_features_stand_for_images(lab: Any) -> None:
    learner, _ = begun(lab, "probe + replay(size=9, augment='flip')")
    plain, images = begun(lab, "lora(rank=2) + replay(size=9, augment='flip')")
    new = learner.cache.of(learner.task.train).__getitems__(range(8))
    batch, seen = learner.method.batch(learner, new), plain.method.batch(plain, images)
    assert batch.keys() == {"features", "label"}
    torch.testing.assert_close(batch["features"], lab.backbone()(seen), rtol=1e-5, atol=1e-5)


def test_what_is_constant_is_computed_once_a_task(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _ = begun(lab, "probe + replay(size=9)")
    new = learner.cache.of(learner.task.train).__getitems__(range(8))
    encoded: list[int] = []
    forward = learner.backbone.forward
    monkeypatch.setattr(learner.backbone, "forward", lambda b: encoded.append(len(b["label"])) or forward(b))
    for learner.step in range(5):
        batch = learner.method.batch(learner, new)
    assert encoded == [9]
    monkeypatch.undo()
    refs = learner.method.parts[1].memory.refs
    rows = learner.method.parts[1].memory.pick(8, learner.generator("replay", 4))
    stream = lab.stream()
    images = torch.cat([stream.tasks[t].train.__getitems__([p])["image"] for t, p, _ in refs[rows].tolist()])
    torch.testing.assert_close(batch["features"][8:], lab.backbone()({"image": images}), rtol=1e-5, atol=1e-5)
