"""Runs that an experiment tracker follows, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUN = ["--stream", "synthetic(tasks=2, per_class=8, test_per_class=8)", "--backbone", "tiny()", "--method", "inflora"]
RUN += ["--epochs", "2", "--batch-size", "8"]


def _curves(out: str) -> EventAccumulator:
    found = EventAccumulator(f"{out}/tensorboard", size_guidance={"scalars": 0})
    found.Reload()
    return found


def test_tensorboard_shows_loss_scores_facts_and_the_matrix(perdure: Any) -> None:
    done = perdure("run", *RUN, "--out", "r", "--track", "tensorboard")
    assert done.code == 0, done
    curves = _curves("r")
    loss = [event.step for event in curves.Scalars("loss")]
    assert loss == list(range(1, 13))  # two tasks of 24 images, 3 steps an epoch
    assert [event.step for event in curves.Scalars("accuracy/task 1")] == [6, 12]
    assert [event.step for event in curves.Scalars("accuracy/task 2")] == [12]
    summary = json.loads(Path("r/summary.json").read_text())
    assert curves.Scalars("average accuracy")[-1].value == pytest.approx(summary["acc"])
    assert any("free" in tag for tag in curves.Tags()["scalars"])
    assert curves.Tags()["images"] == ["matrix"]
    assert not PartialState._shared_state


@pytest.mark.filterwarnings("ignore")  # of MLflow's own libraries
def test_a_resumed_run_continues_its_curve(perdure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').absolute()}")
    assert perdure("run", *RUN, "--out", "r", "--track", "tensorboard,mlflow").code == 0
    whole = {e.step: e.value for e in _curves("r").Scalars("loss")}
    run_id = json.loads(Path("r/tracking.json").read_text())["trackers"]["mlflow"]
    for file in ("task-001", "summary.json"):  # as if it had been killed in the second task
        path = Path("r", file)
        path.rename(f"gone-{file}")
    assert perdure("resume", "r").code == 0
    again = _curves("r").Scalars("loss")
    assert [event.step for event in again] == [*range(1, 13), *range(7, 13)]
    assert all(event.value == whole[event.step] for event in again)
    assert json.loads(Path("r/tracking.json").read_text())["trackers"]["mlflow"] == run_id


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorbord", "did you mean 'tensorboard'"), ("dvclive", "pip install dvclive")],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(perdure: Any, name: str, said: str) -> None:
    refused = perdure("run", *RUN, "--out", "r", "--track", name)
    assert refused.code != 0
    assert said in refused.err
    assert not Path("r").exists()
