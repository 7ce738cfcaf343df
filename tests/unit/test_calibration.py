"""Calibrated scores: images set apart, a temperature that keeps no image, and how sure is how right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.api.learner import Learner
from perdure.api.measuring import evaluate
from perdure.core.temperature import Temperature, calibration_error, fitted
from perdure.evaluation.calibration import set_apart


def drawn(count: int, truth: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 5 classes whose softmax over `truth` is exactly how often each is right."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(count, 5, generator=generator)
    return scores, torch.multinomial((scores / truth).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("truth", [0.2, 1.0, 4.0])
def test_the_temperature_is_the_one_that_made_the_labels(truth: float) -> None:
    scores, target = drawn(20000, truth)
    assert math.exp(fitted(scores, target)) == pytest.approx(truth, rel=0.05)
    sure = scores / math.exp(fitted(scores, target))
    assert calibration_error(sure, target) < 0.02
    assert truth == 1 or calibration_error(scores, target) > 0.1


def test_one_image_that_is_right_is_no_reason_to_be_sure() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.0]])
    share = float((scores / math.exp(fitted(scores, torch.tensor([0])))).softmax(1)[0, 0])
    assert 1 / 3 < share < 0.9
    many = scores.expand(1000, 3)
    assert float((scores / math.exp(fitted(many, torch.zeros(1000, dtype=torch.int64)))).softmax(1)[0, 0]) > 0.99


def test_the_expected_calibration_error_by_hand() -> None:
    sure = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.55, 0.55])
    scores = torch.stack([sure, 1 - sure], dim=1).log()
    target = torch.tensor([0, 0, 0, 1, 0, 1])  # 3 of 4 right where 90 % sure, 1 of 2 where 55 %
    assert calibration_error(scores, target) == pytest.approx((4 * 0.15 + 2 * 0.05) / 6, abs=1e-6)


def test_tasks_combine_as_the_mean_of_logarithms_weighted_by_images() -> None:
    kept, logs = Temperature(), []
    for count, truth in ((300, 0.5), (100, 3.0)):
        scores, target = drawn(count, truth)
        kept.learn(scores, target)
        logs.append(fitted(scores, target))
    assert math.log(kept.value) == pytest.approx((3 * logs[0] + logs[1]) / 4, abs=1e-5)


def test_without_the_option_there_is_no_temperature_and_all_images_are_trained_on(lab: Any, tmp_path: Path) -> None:
    learner = lab.learner("lora(rank=2)")
    task = lab.stream().tasks[0]
    assert set_apart(learner, task) == (task, None)
    lab.run("lora(rank=2)", tmp_path)
    assert not any("temperature" in name for name in Learner.load(tmp_path).learnt_state())


def test_a_share_of_each_class_is_set_apart_and_never_all_of_it(lab: Any) -> None:
    learner = lab.learner("lora(rank=2)")
    for share, apart in ((0.25, 2), (0.01, 1), (0.5, 4)):
        learner.calibrate = share
        task, held = set_apart(learner, lab.stream().tasks[1])
        counts = torch.bincount(held.labels)[list(task.classes)].tolist()
        assert counts == [apart] * 2
        assert torch.bincount(task.train.labels)[list(task.classes)].tolist() == [8 - apart] * 2
    learner.calibrate = 0.5
    single = lab.but(per_class=1).stream().tasks[0]
    with pytest.raises(ValueError, match=r"^task 1: calibrate=0.5 needs a class of 2 images or more"):
        set_apart(learner, single)


@pytest.mark.parametrize("method", ["lora(rank=2) + replay(size=6)", "lora(rank=2) + ncm"])
def test_a_calibrated_run_that_was_stopped_equals_an_unbroken_one(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    lab.run(method, tmp_path / "whole", calibrate=0.25)
    lab.broken_run(method, tmp_path / "broken", (0, None), (1, 3), save_every=1, calibrate=0.25)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")
    assert Learner.load(tmp_path / "whole").temperature.value > 0


def test_calibrated_scores_are_those_of_the_temperature_and_rank_alike(lab: Any, tmp_path: Path) -> None:
    lab.run("ncm", tmp_path, calibrate=0.25)
    learner, images = Learner.load(tmp_path), lab.stream().tasks[0].test
    pixels = images.__getitems__(range(4))["image"]
    plain, sure = learner.predict(pixels), learner.predict(pixels, calibrated=True)
    assert [[n for n, _ in row] for row in plain] == [[n for n, _ in row] for row in sure]
    with learner.inference():
        scores = learner.scores_of(images.subset(torch.arange(4)))
    expected = F.softmax(scores / learner.temperature.value, dim=1).max(1).values
    torch.testing.assert_close(torch.tensor([row[0][1] for row in sure]), expected.cpu())
    assert all(a[0][1] < b[0][1] for a, b in zip(plain, sure, strict=True))  # cosines are surer than their softmax


def test_eval_says_how_far_scores_are_off_and_the_temperature_helps(lab: Any, tmp_path: Path) -> None:
    bench = lab.but(per_class=40, noise=1.2)
    bench.run("ncm", tmp_path, calibrate=0.25)
    found = {row.metric: row.value for row in evaluate(tmp_path, None)[1] if row.on is None}
    assert found["calibration_error_calibrated"] < 0.9 * found["calibration_error"]


def test_a_learner_taught_by_hand_calibrates_too(lab: Any, tmp_path: Path) -> None:
    learner = Learner.create(lab.config("probe").backbone, "probe", calibrate=0.25, epochs=1, precision="fp32")
    for task in lab.stream().tasks[:2]:
        batch = task.train.__getitems__(range(len(task.train)))
        learner.learn(batch["image"], [f"c{c}" for c in batch["label"].tolist()])
    again = Learner.load(learner.save(tmp_path / "it"))
    pixels = lab.stream().tasks[0].test.__getitems__(range(4))["image"]
    assert again.predict(pixels, calibrated=True) == learner.predict(pixels, calibrated=True)


def test_what_cannot_be_calibrated_says_what_to_do(lab: Any, tmp_path: Path) -> None:
    lab.run("probe", tmp_path)
    pixels = lab.stream().tasks[0].test.__getitems__(range(2))["image"]
    with pytest.raises(ValueError, match=r"no temperature, .* teach a new one with calibrate=0.1 \(--calibrate 0.1\)$"):
        Learner.load(tmp_path).predict(pixels, calibrated=True)
    with pytest.raises(ValueError, match=r"leave out calibrated \(--calibrated\), or classes"):
        Learner.load(tmp_path).predict(pixels, classes=["a"], calibrated=True)
    with pytest.raises(ValueError, match=r"^calibrate=0.1 has no effect where no classes are scored: leave it out$"):
        lab.but(objective="retrieve").run("probe", tmp_path / "captions", calibrate=0.1)
