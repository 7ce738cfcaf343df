"""Training in float16: the loss is scaled, a step that overflows is left out, and a run goes on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.core import checkpoint
from perdure.mechanisms.gradients import gradients_on
from perdure.training.loop import Quiet, fit_task


class Scales(Quiet):
    """The scale and the parameters after each step."""

    def __init__(self, learner: Any) -> None:
        self.learner = learner
        self.scales: list[float] = []
        self.states: list[dict[str, torch.Tensor]] = []

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        self.scales.append(self.learner.scaler.get_scale())
        self.states.append({name: p.detach().clone() for name, p in self.learner.trainable().items()})


def test_a_run_in_float16_learns_what_one_in_float32_does_and_goes_on_bit_for_bit(
    lab: Any, content_of: Any, tmp_path: Path
) -> None:
    half: dict[str, Any] = {"precision": "fp16", "save_every": 1, "epochs": 4}
    found = lab.run("lora(rank=2) + si", tmp_path / "half", **half)
    full = lab.run("lora(rank=2) + si", tmp_path / "full", epochs=4)
    assert found["acc"] == pytest.approx(full["acc"], abs=0.1)
    lab.broken_run("lora(rank=2) + si", tmp_path / "broken", (0, 3), (2, 1), **half)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "half")
    lab.stopped_run("lora(rank=2)", tmp_path / "stopped", (0, 3), **half)
    snapshot = checkpoint.latest_step(tmp_path / "stopped", [])
    assert snapshot is not None
    assert snapshot.manifest["scaler"]["scale"] >= 1


def test_a_step_that_overflows_moves_nothing_and_halves_the_scale(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = lab.learner("lora(rank=2) + si")
    learner.precision = torch.float16
    task = lab.stream().tasks[0]
    learner.grow(task)
    told, loss = Scales(learner), learner.loss

    def overflowing(batch: Any) -> torch.Tensor:
        return loss(batch) * (torch.inf if learner.step == 1 else 1.0)

    monkeypatch.setattr(learner, "loss", overflowing)
    fit_task(learner, task, lab.train_config(epochs=2), told)
    assert told.scales[1] == told.scales[0] / 2 == told.scales[2]
    for name, value in told.states[0].items():
        assert value.equal(told.states[1][name])
    assert any(not value.equal(told.states[2][name]) for name, value in told.states[1].items())
    assert all(torch.isfinite(value).all() for value in learner.learnt_state().values())


def test_who_takes_steps_within_a_step_refuses_float16(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reptile cannot learn with precision='fp16'"):
        lab.run("lora(rank=2) + reptile", tmp_path / "run", precision="fp16")


@pytest.mark.parametrize("scale", [2.0**20, None])
def test_gradients_beside_the_step_are_scaled_too(
    scale: float | None, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, task = lab.learner("finetune"), lab.stream().tasks[0]
    learner.precision = torch.float16
    learner.grow(task)
    learner.train()
    learner.prepare()
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    losses = learner.objective.losses
    monkeypatch.setattr(learner.objective, "losses", lambda *args, **more: losses(*args, **more) * 1e-7)
    trained = [p for name, p in learner.trainable().items() if name.startswith("backbone.")]
    found = gradients_on(learner, task.train.__getitems__(range(8)), trained)
    share = sum(int(g.count_nonzero()) for g in found) / sum(g.numel() for g in found)
    assert share > 0.9 if scale else share < 0.5  # else most is too small for what the encoder computes in
    assert max(float(g.abs().max()) for g in found) < 1e-5


@pytest.mark.parametrize(
    "method", ["lora(rank=2) + expert_distillation", "inflora(ranks=(1, 2))", "lora(rank=2) + ewc"]
)
def test_what_trains_or_measures_beside_the_steps_does_in_float16(method: str, lab: Any, tmp_path: Path) -> None:
    half = lab.run(method, tmp_path / "half", precision="fp16", epochs=4)
    assert half["acc"] == pytest.approx(lab.run(method, tmp_path / "full", epochs=4)["acc"], abs=0.15)


@pytest.mark.parametrize(
    "method", ["lora(rank=2) + mas", "lora(rank=2) + ewc", "lora(rank=2) + gem", "finetune + agem"]
)
def test_a_scale_that_single_examples_or_old_ones_do_not_bear_is_lowered(method: str, lab: Any) -> None:
    learner, state = lab.learner(method), {}
    learner.precision = torch.float16

    class Raises(Quiet):
        """The scale of a long task, which grows as long as a step's own gradient bears it."""

        def step(self, step: int, loss: torch.Tensor, images: int) -> None:
            learner.scaler.update(2.0**20)

    for task in lab.stream():
        learner.grow(task)
        fit_task(learner, task, lab.train_config(epochs=2), Raises())
        state = learner.learnt_state()
        assert [name for name, value in state.items() if not torch.isfinite(value.float()).all()] == []
    weights = [value for name, value in state.items() if ".weights." in name]
    assert all(float(value.float().abs().max()) > 0 for value in weights)


def test_weights_that_are_trained_stay_in_float32(lab: Any) -> None:
    learner = lab.learner("finetune")
    learner.precision = torch.float16
    lab.teach(learner, lab.stream().tasks[:1], epochs=1)
    assert {p.dtype for p in learner.backbone.parameters()} == {torch.float32}
