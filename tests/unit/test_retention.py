"""Zero-shot retention, and the square matrix of a sequence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F

from perdure import metrics
from perdure.evaluation.zero_shot_retention import Retention, kept
from perdure.objectives.zeroshot import class_texts
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults
from perdure.reporting.tables import markdown, tabulate
from perdure.storage.files import write_sealed
from perdure.streams import build_stream
from perdure.training.run import resume, run
from perdure.types import Row

HELD = "synthetic(tasks=2, classes_per_task=2, test_per_class=5)"


@pytest.fixture
def bench(lab: Any) -> Any:
    return lab.but(objective="zeroshot")


def test_what_is_kept_is_told_for_each_data_set() -> None:
    rows = [Row(-1, None, "zero_shot/a", 0.5), Row(0, None, "zero_shot/a", 0.4), Row(1, None, "zero_shot/a", 0.3)]
    rows += [Row(0, None, "zero_shot/b", 0.2), Row(0, 0, "accuracy", 1.0), Row(0, None, "free_dimension/x", 3.0)]
    found = kept(rows)
    assert found["a"] == {"before": 0.5, "after": [0.4, 0.3], "drop": pytest.approx(0.2), "ratio": pytest.approx(0.6)}
    assert found["b"] == {"before": None, "after": [0.2], "drop": None, "ratio": None}
    assert list(found) == ["a", "b"]


def test_accuracy_is_that_of_the_nearest_name(bench: Any) -> None:
    learner = bench.learner("probe")
    retention = Retention((HELD,), learner)
    stream = retention.sets["synthetic"]
    names = [name for task in stream for name in task.names]
    right = []
    with learner.inference():
        texts = class_texts(learner, names, retention.templates)
        for task in stream:
            for i in range(len(task.test)):
                batch = task.test.__getitems__([i])
                nearest = (F.normalize(learner.encode(batch), dim=1) @ texts.T).argmax(1)
                right.append(int(nearest) == int(batch["label"]))
    (row,) = retention.measure(learner, 3)
    assert row == Row(3, None, "zero_shot/synthetic", pytest.approx(sum(right) / len(right)))


def test_a_frozen_learner_keeps_all_and_a_trained_one_is_measured_after_each_task(bench: Any, tmp_path: Path) -> None:
    frozen = run(bench.config("probe", retain=(HELD,)), tmp_path / "frozen")["zero_shot"]["synthetic"]
    assert frozen["ratio"] == 1.0
    assert frozen["drop"] == 0.0
    moved = run(bench.config("finetune(tower='both')", retain=(HELD,), epochs=6, lr=0.3), tmp_path / "moved")
    held = moved["zero_shot"]["synthetic"]
    assert held["before"] == frozen["before"]
    assert len(held["after"]) == 3
    assert any(value != held["before"] for value in held["after"])
    assert moved["zero_shot_ratio"] == held["ratio"]


def test_a_classifier_on_a_clip_is_measured_too_and_a_stopped_run_measures_the_same(
    lab: Any, content_of: Any, tmp_path: Path
) -> None:
    settings = {"backbone": "tiny(dim=16, text=True)", "retain": (HELD,)}
    whole = run(lab.config("lora(rank=2)", **settings), tmp_path / "a")
    assert len(whole["zero_shot"]["synthetic"]["after"]) == 3
    lab.broken_run("lora(rank=2)", tmp_path / "b", (1, 2), **settings)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    assert resume(tmp_path / "a")["zero_shot"] == whole["zero_shot"]


def test_held_out_data_that_has_changed_is_refused(bench: Any, tmp_path: Path) -> None:
    bench.run("probe", tmp_path / "run", retain=(HELD,))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["held_out"]["synthetic"]["tasks"][0]["test"] == 10
    record["held_out"]["synthetic"]["tasks"][0]["test"] = 9
    for task in (tmp_path / "run").glob("task-*"):  # whose manifests would not know such a record
        shutil.rmtree(task)
    write_sealed(tmp_path / "run/run.json", record)
    with pytest.raises(ValueError, match=r"^the held-out data of .* has changed since the run began \(synthetic\)"):
        resume(tmp_path / "run")


def test_two_data_sets_of_one_name_are_told_apart(bench: Any) -> None:
    assert list(Retention((HELD, HELD), bench.learner("probe")).sets) == ["synthetic", "synthetic 2"]


def test_retention_without_texts_or_with_other_features_is_refused(lab: Any, bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^retain=.*needs a text tower, which tiny"):
        run(lab.config("probe", retain=(HELD,)), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"^retain=.*tiny\(.*layers=1\) gives features that texts cannot be compared wi"
    ):
        Retention((HELD,), bench.but(layers=1).learner("ncm"))


SEQUENCE = "sequence(synthetic(classes_per_task=3), synthetic(classes_per_task=2, noise=0.5))"


def test_a_sequence_of_data_sets_has_the_whole_square(bench: Any, tmp_path: Path) -> None:
    summary = run(bench.config("lora(rank=2)", stream=SEQUENCE), tmp_path)
    matrix = summary["matrix"]
    assert all(value is not None for row in matrix for value in row)
    assert summary["transfer"] == matrix[0][1]
    assert summary["average"] == pytest.approx(sum(sum(row) for row in matrix) / 4)


def test_scores_on_a_data_set_before_it_is_learnt_are_among_its_own_names(bench: Any) -> None:
    learner = bench.but(scenario="task").learner("probe")
    stream = build_stream(SEQUENCE, learner.backbone.preprocess, 0)
    learner.grow(stream.tasks[0])
    unseen = learner.objective.evaluate(learner, [stream.tasks[1]])[0]["accuracy"]
    learner.grow(stream.tasks[1])
    assert unseen == learner.objective.evaluate(learner, [stream.tasks[1]])[0]["accuracy"]


def test_tables_and_report_tell_what_is_kept_where_it_was_measured(bench: Any, tmp_path: Path) -> None:
    rows = {}
    for name, more in (("held", {"retain": (HELD,)}), ("sequence", {"stream": SEQUENCE}), ("plain", {})):
        out = tmp_path / name
        run(bench.config("probe", **more), out)
        rows[name] = tabulate([("probe", RunResults.read(out))])
        page = write_report([out], out / "report.html").read_text(encoding="utf-8")
        assert ("Zero-shot accuracy kept" in page) == (name == "held")
        assert (">Transfer<" in page) == (name == "sequence")
    assert "| zero-shot kept |" in markdown(rows["held"])
    assert "| transfer | average over the matrix |" in markdown(rows["sequence"])
    assert not any(word in markdown(rows["plain"]) for word in ("kept", "transfer", "matrix"))


def test_transfer_average_and_last_of_a_square() -> None:
    matrix = [[0.9, 0.4, 0.2], [0.8, 0.9, 0.3], [0.7, 0.8, 1.0]]
    assert metrics.transfer(matrix) == pytest.approx((0.4 + (0.2 + 0.3) / 2) / 2)
    assert metrics.average(matrix) == pytest.approx(6.0 / 9)
    assert metrics.acc(matrix) == pytest.approx(2.5 / 3)
    assert metrics.transfer([[0.9, None], [0.8, 0.9]]) is None
    assert metrics.transfer([[0.9]]) is None


def test_a_captioned_data_set_has_no_classes_to_keep(bench: Any) -> None:
    with pytest.raises(ValueError, match=r"^retain='captions_synthetic\(\)': there are no classes to tell apart"):
        Retention(("captions_synthetic()",), bench.learner("probe"))
