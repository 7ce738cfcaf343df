"""Checkpoints: what they hold, whose they are, what is ignored, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.learner import Learner
from perdure.core import checkpoint
from perdure.core.checkpoint import DamagedCheckpoint
from perdure.reporting.runs import RunResults
from perdure.storage.schema import FORMAT
from perdure.training.loop import Quiet
from perdure.training.run import resume, run
from perdure.types import Row, Task

SECONDS = {"prepare": 0.5, "train": 1.5, "finish": 0.0, "evaluate": 2.0}


@pytest.fixture(scope="module")
def learnt(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three tasks."""
    out = tmp_path_factory.mktemp("learnt")
    lab.run("lora(rank=2)", out)
    return out


@pytest.fixture
def copied(learnt: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(learnt, tmp_path / "copy"))


def test_a_checkpoint_gives_learner_tasks_and_rows_back(lab: Any, tmp_path: Path) -> None:
    learner, rows = lab.taught("inflora(rank=2)"), [Row(2, 0, "accuracy", 0.1 + 0.2), Row(2, None, "fact", 1.0)]
    learner.learnt = 1
    checkpoint.save_task(tmp_path, learner, rows, {"seconds": SECONDS})
    found = checkpoint.whole(tmp_path)[0]
    assert (found.learnt, found.step, found.rows) == (1, None, rows)
    assert found.tasks == list(lab.stream())
    assert found.manifest["seconds"] == SECONDS
    fresh = lab.learner("inflora(rank=2)")
    checkpoint.restore(fresh, found)
    assert all(torch.equal(v, learner.learnt_state()[k]) for k, v in fresh.learnt_state().items())
    assert fresh.learnt == 1


def test_nothing_is_ever_overwritten(lab: Any, tmp_path: Path) -> None:
    learner = lab.teach(lab.learner("probe"), lab.stream().tasks[:1])
    checkpoint.save_task(tmp_path, learner, [], {})
    with pytest.raises(ValueError, match="task-000 is already there: checkpoints are never overwritten"):
        checkpoint.save_task(tmp_path, learner, [], {})


def test_the_frozen_backbone_is_not_stored(learnt: Path) -> None:
    size = (learnt / "task-002" / "learner.safetensors").stat().st_size
    assert size < 16_000
    assert not list(learnt.rglob("step-*"))
    assert not list(learnt.rglob("*.draft"))


def test_only_the_last_snapshot_within_a_task_is_kept(lab: Any, tmp_path: Path) -> None:
    learner, task = lab.learner("lora(rank=2)"), lab.stream().tasks[0]
    learner.grow(task)
    for step in (2, 4, 1_000_000):
        checkpoint.save_step(tmp_path, learner, step, None, [Row(-1, 0, "accuracy", 0.5)])
        assert [p.name for p in tmp_path.glob("task-000/*")] == [f"step-{step:06d}"]
    found = checkpoint.latest_step(tmp_path, [])
    assert found is not None
    assert (found.step, found.learnt, found.rows) == (1_000_000, 0, [Row(-1, 0, "accuracy", 0.5)])
    assert checkpoint.latest_step(tmp_path / "other", []) is None


def test_the_later_of_two_snapshots_counts_whatever_their_digits(lab: Any, tmp_path: Path) -> None:
    learner = lab.learner("lora(rank=2)")
    learner.grow(lab.stream().tasks[0])
    for step in (999_999, 1_000_000):  # as after a kill between writing the one and removing the other
        checkpoint.save_step(tmp_path / str(step), learner, step, None, [])
        shutil.copytree(tmp_path / str(step), tmp_path / "both", dirs_exist_ok=True)
    assert checkpoint.latest_step(tmp_path / "both", []).step == 1_000_000


def test_more_than_a_thousand_tasks_stay_in_order(lab: Any, tmp_path: Path) -> None:
    learner = lab.learner("ncm")
    for learner.learnt in (*range(1, 4), 1000, 1001, 1002):
        learner.tasks = [Task(i, str(i), (0, 1), ("a", "b")) for i in range(learner.learnt)]
        checkpoint.save_task(tmp_path, learner, [], {"alone": learner.learnt == 1000})
    assert [each.learnt for each in checkpoint.whole(tmp_path)] == [1, 2, 3, 1000, 1001, 1002]


def test_another_backbone_is_refused(lab: Any, learnt: Path) -> None:
    with pytest.raises(ValueError, match=r"was learnt on another backbone .* give the weights it was learnt on"):
        checkpoint.restore(lab.but(fused=False).learner("lora(rank=2)"), checkpoint.whole(learnt)[-1])


@pytest.mark.parametrize(
    "method", ["probe", "lora(rank=3)", "inflora(rank=2)", "lora(rank=2, at='qkv')", "lora(rank=2, at='qv')", "ncm"]
)
def test_another_methods_checkpoint_is_refused(method: str, lab: Any, learnt: Path) -> None:
    with pytest.raises(ValueError, match=r"learner\.safetensors does not fit this learner") as error:
        checkpoint.restore(lab.learner(method), checkpoint.whole(learnt)[-1])
    assert "\n" not in str(error.value)


def test_another_stream_is_refused(lab: Any, learnt: Path) -> None:
    tasks = lab.but(classes=3).stream().tasks
    with pytest.raises(ValueError, match=r"learnt task 1 as .* the data has changed; restore it, or start anew"):
        checkpoint.restore(lab.learner("lora(rank=2)"), checkpoint.whole(learnt)[-1], tasks)


@pytest.mark.parametrize("name", ["run.json", "task-001/manifest.json"])
def test_a_format_of_the_future_is_refused(copied: Path, name: str) -> None:
    path = copied / name
    checkpoint.write_sealed(path, json.loads(path.read_text()) | {"format": 99})
    with pytest.raises(ValueError, match=f"{name} has format 99; this version of perdure reads 1 to {FORMAT}: install"):
        checkpoint.whole(copied)


def test_a_task_missing_in_between_is_named(copied: Path) -> None:
    shutil.rmtree(copied / "task-001")
    with pytest.raises(DamagedCheckpoint, match="has task-002 but not task-001: restore that folder"):
        checkpoint.whole(copied)


def test_strays_are_ignored(copied: Path, content_of: Any) -> None:
    before = content_of(copied)
    for name in ("task-001-old", "task-copy", "task-003"):  # the last as of a kill before its manifest was written
        (copied / name).mkdir()
        (copied / name / "learner.safetensors").write_bytes(b"cut")
    shutil.copy(copied / "task-001" / "manifest.json", copied / "task-001-old")
    assert [each.learnt for each in checkpoint.whole(copied)] == [1, 2, 3]
    for stray in copied.glob("task-*"):
        if stray.name not in ("task-000", "task-001", "task-002"):
            shutil.rmtree(stray)
    resume(copied)
    assert content_of(copied) == before


def test_drafts_and_torn_snapshots_of_a_crash_do_no_harm(lab: Any, learnt: Path, copied: Path, content_of: Any) -> None:
    shutil.rmtree(copied / "task-002")
    (copied / "summary.json").unlink()
    torn = copied / "task-002" / "step-000003"
    torn.mkdir(parents=True)
    (torn / "learner.safetensors").write_bytes(b"half of i")
    (torn / ".manifest.json.draft").write_text('{"format": 1, "lear')
    (copied / "task-002" / ".learner.safetensors.draft").write_bytes(b"\x00" * 100)
    (copied / ".summary.json.draft").write_text("{")
    resume(copied)
    assert not (copied / "task-002" / "step-000003").exists()
    for drafts in copied.rglob("*.draft"):
        drafts.unlink()
    assert content_of(copied) == content_of(learnt)


@pytest.mark.parametrize(
    "tail", ['{"after": 2, "on": 0, "metr', '{"after": 9, "on": 0, "metric": "accuracy", "value": 1.0}\n']
)
def test_a_torn_or_foreign_line_of_the_results_is_repaired(tail: str, copied: Path, content_of: Any) -> None:
    before = content_of(copied)
    path = copied / "results.jsonl"
    path.write_text(path.read_text()[:-40] + tail)
    resume(copied)
    assert content_of(copied) == before


def test_lost_results_are_written_again_from_the_checkpoints(copied: Path, content_of: Any) -> None:
    before = content_of(copied)
    (copied / "results.jsonl").unlink()
    (copied / "summary.json").unlink()
    resume(copied)
    assert content_of(copied) == before


def test_a_folder_that_holds_a_run_is_not_run_again(lab: Any, learnt: Path) -> None:
    with pytest.raises(ValueError, match=r"already holds a run: go on with 'perdure resume"):
        run(lab.config("lora(rank=2)"), learnt)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no run\.json"):
        resume(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"str')
    with pytest.raises(ValueError, match=r"run\.json is damaged: it cannot be read as JSON"):
        resume(tmp_path)


def test_the_lock_is_released_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), checkpoint.locked(tmp_path / "new"):
        raise RuntimeError
    with checkpoint.locked(tmp_path / "new"):
        pass


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "a.json", {"名": "é"})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"名": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_in_bfloat16_a_stopped_run_equals_an_unbroken_one(lab: Any, content_of: Any, tmp_path: Path) -> None:
    for objective, spec in (("classify", "inflora(rank=2)"), ("zeroshot", "lora(rank=2)"), ("zeroshot", "finetune")):
        bench, name = lab.but(precision="bf16", objective=objective), f"{objective}-{spec[:4]}"
        bench.run(spec, tmp_path / name)
        bench.broken_run(spec, tmp_path / f"{name}-broken", (0, 3), (1, 3), (1, None), save_every=2)
        assert content_of(tmp_path / f"{name}-broken") == content_of(tmp_path / name)


def test_a_learner_comes_back_without_its_data(lab: Any, learnt: Path) -> None:
    fresh = lab.learner("lora(rank=2)")
    checkpoint.restore(fresh, checkpoint.whole(learnt)[-1])
    assert [len(task.train) for task in fresh.tasks] == [0, 0, 0]


class Deletes(Quiet):
    """Removes the run's folder in a step of the second task."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, 0

    def step(self, step: int, *more: Any) -> None:
        self.steps += 1
        if self.steps == 6:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("method", ["lora(rank=2)", "finetune + ewc(samples=8)"])
def test_a_run_whose_folder_is_deleted_stops_at_once(method: str, lab: Any, tmp_path: Path) -> None:
    progress = Deletes(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is gone or has lost its run\.json, .*: start anew") as error:
        run(lab.config(method), tmp_path / "out", progress)
    assert "\n" not in str(error.value)
    assert progress.steps == 6
    assert not (tmp_path / "out" / "task-001").exists()


def test_a_folder_of_another_run_is_refused_by_name(lab: Any, learnt: Path, copied: Path, tmp_path: Path) -> None:
    lab.run("lora(rank=2)", tmp_path / "other", seed=1)
    for name in ("task-000", "task-001", "task-002"):
        shutil.rmtree(copied / name)
        shutil.copytree(tmp_path / "other" / name, copied / name)
        for ask in (checkpoint.whole, resume, RunResults.read, Learner.load):
            with pytest.raises(DamagedCheckpoint, match=rf"{name}/manifest\.json comes from another run: .*run\.json"):
                ask(copied)
        shutil.rmtree(copied / name)
        shutil.copytree(learnt / name, copied / name)
    assert len(checkpoint.whole(copied)) == 3


def test_a_run_does_not_go_on_from_another_runs_snapshot(lab: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        lab.stopped_run("lora(rank=2)", tmp_path / str(seed), (0, 2), seed=seed, save_every=1)
    (snapshot,) = (tmp_path / "0" / "task-000").glob("step-*")
    shutil.rmtree(snapshot)
    shutil.copytree(tmp_path / "1" / "task-000" / snapshot.name, snapshot)
    with pytest.raises(DamagedCheckpoint, match=rf"{snapshot.name}/manifest\.json comes from another run"):
        resume(tmp_path / "0")


def test_a_lost_last_manifest_of_a_finished_run_is_told(copied: Path) -> None:
    path = copied / "task-002" / "manifest.json"
    path.unlink()
    for kept in ("summary.json", "results.jsonl"):  # each of them knows that there were three
        for ask in (checkpoint.whole, resume, RunResults.read, Learner.load):
            with pytest.raises(DamagedCheckpoint, match=r"task-002/manifest\.json is missing, though this"):
                ask(copied)
        (copied / kept).unlink()
    resume(copied)
    assert path.exists()


def test_each_task_is_described_once(learnt: Path) -> None:
    manifests = [json.loads((learnt / f"task-{i:03d}" / "manifest.json").read_text()) for i in range(3)]
    assert [[task["index"] for task in each["tasks"]] for each in manifests] == [[0], [1], [2]]
    assert [[task.index for task in each.tasks] for each in checkpoint.whole(learnt)] == [[0], [0, 1], [0, 1, 2]]


def as_an_older_version_wrote_it(folder: Path) -> None:
    """Without seals but in manifests, which repeat all tasks and know neither their run nor each other."""
    tasks = [task.describe() for task in checkpoint.whole(folder)[-1].tasks]
    for path in (*folder.glob("*.json"), *folder.glob("task-*/manifest.json")):
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in NEW}
        if path.name == "manifest.json":
            checkpoint.write_sealed(path, content | {"format": 1, "tasks": tasks[: content["learnt"]]})
        else:
            checkpoint.write_json(path, content)


NEW = ("format", "seal", "run", "previous", "bytes", "manifest")


def test_a_run_of_an_older_version_is_resumed_and_chained_from_there(
    lab: Any, copied: Path, learnt: Path, content_of: Any
) -> None:
    as_an_older_version_wrote_it(copied)
    told: list[str] = []
    assert RunResults.read(copied, told.append).numbers() == RunResults.read(learnt).numbers()
    assert told == []
    assert Learner.load(copied).learnt == 3
    shutil.rmtree(copied / "task-002")
    resume(copied)
    # what describes tasks is laid out otherwise, what was learnt is the same
    whole = {k: v for k, v in content_of(learnt).items() if "manifest" not in k}
    assert {k: v for k, v in content_of(copied).items() if "manifest" not in k} == whole
    record = json.loads((copied / "run.json").read_text())
    record["config"]["lr"] = 0.5
    checkpoint.write_json(copied / "run.json", record)
    with pytest.raises(DamagedCheckpoint, match=r"task-002/manifest\.json comes from another run"):
        resume(copied)
