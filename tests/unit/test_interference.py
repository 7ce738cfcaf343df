"""Why a method forgot or not: how far old features moved, and how much of an update reaches old inputs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perdure.core import checkpoint
from perdure.core.checkpoint import DamagedCheckpoint
from perdure.evaluation import feature_drift as drift
from perdure.evaluation.per_class import ANSWERS
from perdure.mechanisms.subspace import Subspace
from perdure.training.config import make_method
from perdure.training.run import resume, run
from perdure.training.summary import TAUGHT
from perdure.types import Row, Task

# Layers have more inputs (64) than a task has tokens, so that each leaves some free.
WIDE = {
    "backbone": "tiny(dim=64, size=8)",
    "stream": "synthetic(tasks=3, classes_per_task=2, per_class=4, test_per_class=4, size=8, noise=0.3)",
}


def rows_of(folder: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in (folder / "results.jsonl").read_text().splitlines()]


def drifts(folder: Path) -> dict[tuple[int, int | None], float]:
    return {(row.after, row.on): row.value for row in rows_of(folder) if row.metric == drift.FEATURE_DRIFT}


def shares(folder: Path) -> dict[int, list[float]]:
    """Per task: the share of the update that reaches old inputs, of each layer."""
    found: dict[int, list[float]] = {}
    for row in rows_of(folder):
        if row.metric.startswith("old_space_share/"):
            found.setdefault(row.after, []).append(row.value)
    return found


def test_the_part_of_a_row_inside_the_taken_space_is_the_same_whichever_basis_is_stored() -> None:
    whole = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    taken, free = Subspace(whole[:, :2]), Subspace(whole[:, 2:], "free")
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = (rows.double() @ whole[:, :2]) @ whole[:, :2].T
    torch.testing.assert_close(taken.inside(rows), expected)
    torch.testing.assert_close(free.inside(rows), expected)
    assert not Subspace.empty(6).inside(rows).any()


@pytest.mark.parametrize("keep", [0.9, 1.0])  # 1.0 takes more than half, so that the free basis is stored
def test_nothing_of_an_update_reaches_old_inputs(keep: float, lab: Any, tmp_path: Path) -> None:
    run(lab.config(f"inflora(rank=4, keep={keep}, power=1)", **WIDE), tmp_path)
    found = shares(tmp_path)
    assert [(after, len(of)) for after, of in found.items()] == [(1, 2), (2, 2)]
    assert max(max(of) for of in found.values()) < 1e-3


def test_without_the_projection_most_of_an_update_reaches_old_inputs(lab: Any, tmp_path: Path) -> None:
    run(lab.config("inflora(rank=4, keep=0.99, power=1, project=False)", **WIDE), tmp_path)
    assert min(min(of) for of in shares(tmp_path).values()) > 0.5


def test_the_share_is_that_of_the_dense_update_over_all_layers_that_read_the_input(lab: Any) -> None:
    learner, tasks = lab.learner("inflora(rank=3, keep=0.5, power=1, at='kv')"), lab.stream().tasks
    lab.teach(learner, tasks[:1])
    learner.grow(tasks[1])
    for key, adapter in learner.method.adapters.items():
        torch.nn.init.normal_(adapter.down)
        for up in adapter.up:
            torch.nn.init.normal_(up)
        update = torch.cat([up @ adapter.down for up in adapter.up]).double()
        basis = learner.method._space(key).basis
        expected = ((update @ basis).norm() / update.norm()).item()
        assert learner.method._old_space_share(key) == pytest.approx(expected, rel=1e-4)
    for up in adapter.up:
        torch.nn.init.zeros_(up)
    assert learner.method._old_space_share(key) == 0.0


def test_features_of_a_frozen_encoder_never_drift_and_nothing_is_kept_for_it(lab: Any, tmp_path: Path) -> None:
    assert lab.run("probe", tmp_path)["feature_drift"] == 0.0
    assert drifts(tmp_path) == {(1, 0): 0.0, (2, 0): 0.0, (2, 1): 0.0}
    assert not list(tmp_path.rglob(drift.FEATURES))


def test_drift_is_small_where_old_inputs_are_protected_and_larger_where_not(lab: Any, tmp_path: Path) -> None:
    found = {}
    for name, method in {"ours": "inflora(rank=4, keep=1.0, power=1)", "lora": "lora(rank=4)"}.items():
        summary = run(lab.config(method, **WIDE), tmp_path / name)
        found[name] = drifts(tmp_path / name)
        assert list(found[name]) == [(1, 0), (2, 0), (2, 1)]
        assert summary["feature_drift"] == pytest.approx((found[name][2, 0] + found[name][2, 1]) / 2)
    assert 0 < max(found["ours"].values()) < 0.03
    assert min(found["lora"].values()) > 0.03
    assert all(found["ours"][place] < found["lora"][place] / 3 for place in found["ours"])


def test_drift_is_the_mean_relative_distance_to_the_features_right_after_the_task(lab: Any, tmp_path: Path) -> None:
    lab.run("lora(rank=2)", tmp_path)
    learner, tasks = lab.learner("lora(rank=2)"), lab.stream().tasks
    lab.teach(learner, tasks[:1])
    then = learner.features(tasks[0].test)[0]
    torch.testing.assert_close(load_file(tmp_path / "task-000" / drift.FEATURES)["features"], then)
    lab.teach(learner, tasks[1:2])
    now = learner.features(tasks[0].test)[0]
    expected = ((now - then).norm(dim=1) / then.norm(dim=1)).mean().item()
    assert drifts(tmp_path)[1, 0] == pytest.approx(expected, rel=1e-4)


def test_a_large_test_set_is_sampled_and_always_in_the_same_way(lab: Any) -> None:
    learner = lab.learner("lora(rank=2)")
    counts = {20: 20, 100: 32, 800: 100, 5000: 128}
    assert {n: len(set(drift._chosen(learner, 3, range(n)).tolist())) for n in counts} == counts
    data = range(1000)
    chosen = drift._chosen(learner, 3, data)
    assert torch.equal(chosen, drift._chosen(lab.learner("probe"), 3, data))
    assert not torch.equal(chosen, drift._chosen(learner, 4, data))


def test_measuring_drift_does_not_change_what_is_learnt(lab: Any, tmp_path: Path) -> None:
    lab.run("lora(rank=2)", tmp_path)
    learner = lab.learner("lora(rank=2)")
    for task in lab.stream():
        lab.teach(learner, [task])
        for each in learner.tasks:
            learner.objective.evaluate(learner, [each])[0]
    kept = load_file(tmp_path / "task-002" / "learner.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in learner.learnt_state().items())


def test_the_features_are_no_part_of_the_learner(lab: Any, tmp_path: Path) -> None:
    summary = lab.run("lora(rank=2)", tmp_path)
    folder = tmp_path / "task-002"
    assert summary["stored_bytes"] == (folder / "learner.safetensors").stat().st_size
    assert not any("features" in name for name in load_file(folder / "learner.safetensors"))
    assert set(checkpoint.whole(tmp_path)[2].manifest["sha256"]) == {
        "learner.safetensors",
        drift.FEATURES,
        TAUGHT,
        ANSWERS,
    }


@pytest.mark.parametrize("method", ["inflora(rank=2)", "finetune"])
def test_a_stopped_run_measures_the_same_drift(method: str, lab: Any, content_of: Any, tmp_path: Path) -> None:
    lab.run(method, tmp_path / "unbroken")
    lab.broken_run(method, tmp_path / "broken", (0, 3), (0, None), (1, 3), (1, None), save_every=2)
    unbroken = content_of(tmp_path / "unbroken")
    assert sum(drift.FEATURES in name and ":" not in name for name in unbroken) == 3
    assert content_of(tmp_path / "broken") == unbroken


def test_damaged_features_are_refused_by_name_before_anything_is_learnt(lab: Any, tmp_path: Path) -> None:
    lab.run("lora(rank=2)", tmp_path)
    for name in ("task-002", "summary.json"):
        (tmp_path / name).rename(tmp_path / f"old {name}")
    path = tmp_path / "task-000" / drift.FEATURES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=rf"task-000/{drift.FEATURES} is damaged: .* restore it, or remove"):
        resume(tmp_path)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=rf"task-000/{drift.FEATURES} is missing: restore it, or remove"):
        resume(tmp_path)
    assert not (tmp_path / "task-002").exists()


def test_what_cannot_be_compared_has_no_row(lab: Any, tmp_path: Path) -> None:
    first, second, third = lab.stream().tasks
    learner, features = lab.teach(lab.learner("lora(rank=2)"), [first]), drift.Drift([])

    def measured(*tasks: Task) -> list[int | None]:
        tests = [replace(task, test=learner.cache.features([task.test])[0]) for task in tasks if len(task.test)]
        return [row.on for row in features.measure(learner, tasks[-1], tests)]

    assert measured(first) == []
    without = Task.described(second.describe())
    lab.teach(learner, [second])
    assert measured(first, without) == [0], "the second task has no test images"
    assert features.files(without) == {}
    lab.teach(learner, [third])
    assert measured(first, second, third) == [0], "nothing was noted of the second task"
    fewer = Task.described(first.describe())
    object.__setattr__(fewer, "test", second.test)
    assert measured(fewer, second, third) == [], "these are other images than those noted"


def test_the_method_of_a_loaded_learner_reports_no_share_of_an_update_it_did_not_make(lab: Any) -> None:
    learner = lab.learner("inflora(rank=2)")
    assert not any(k.startswith("old_space_share") for k in make_method("inflora(rank=2)").measures(learner))
    lab.teach(learner, lab.stream().tasks[:1])
    assert not any(k.startswith("old_space_share") for k in learner.method.measures(learner))
    lab.teach(learner, lab.stream().tasks[1:2])
    assert sum(k.startswith("old_space_share") for k in learner.method.measures(learner)) == 2
