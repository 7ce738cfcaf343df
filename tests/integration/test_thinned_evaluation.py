"""Runs that measure old tasks less often, or on samples: what is left out is known to be left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from perdure.cli.main import main
from perdure.mechanisms.task_experts import TaskExperts
from perdure.metrics import average_after
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults, grouped
from perdure.reporting.tables import markdown, tabulate
from perdure.training.config import RunConfig, measured_between
from perdure.training.run import run
from perdure.types import Row

TASKS = 4  # of 8 test images each


@pytest.fixture(scope="module")
def runs(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, bench = tmp_path_factory.mktemp("thinned"), lab.but(tasks=TASKS)
    for evaluate in ("every", "last", "sample:3"):
        bench.run("lora(rank=2)", root / evaluate, evaluate=evaluate)
    return {folder.name: folder for folder in root.iterdir()}


def matrix(folder: Path) -> list[list[float | None]]:
    return list(json.loads((folder / "summary.json").read_text())["matrix"])


def test_last_measures_a_task_when_it_was_learnt_and_all_in_the_end_and_nothing_else(runs: dict[str, Path]) -> None:
    every, last = matrix(runs["every"]), matrix(runs["last"])
    for i in range(TASKS):
        measured = range(TASKS) if i == TASKS - 1 else [i]
        assert last[i] == [every[i][j] if j in measured else None for j in range(TASKS)]


def test_a_sample_measures_old_tasks_on_so_many_examples_and_the_rest_whole(runs: dict[str, Path]) -> None:
    every, sampled = matrix(runs["every"]), matrix(runs["sample:3"])
    assert sampled[-1] == every[-1]
    for i, row in enumerate(sampled[:-1]):
        assert row[i:] == every[i][i:]
        for value in row[:i]:
            assert value is not None
            assert 3 * value == pytest.approx(round(3 * value))


def test_what_was_not_measured_is_in_no_mean_and_no_drift_and_is_said(runs: dict[str, Path]) -> None:
    summary = json.loads((runs["last"] / "summary.json").read_text())
    whole = json.loads((runs["every"] / "summary.json").read_text())
    same = ("acc", "bwt", "retention", "acc_with_task_id", "feature_drift")
    assert {name: summary[name] for name in same} == {name: whole[name] for name in same}
    assert summary["aaa"] is summary["forgetting"] is None
    seconds = [task["evaluate"] for task in summary["seconds_per_task"]]
    assert summary["evaluation_seconds"] == pytest.approx(sum(seconds))
    found = RunResults.read(runs["last"])
    assert found.learnt() == TASKS
    assert found.numbers()["new_task_acc"] == RunResults.read(runs["every"]).numbers()["new_task_acc"]
    for name in ("last", "sample:3"):
        drift = RunResults.read(runs[name]).drift()
        assert all(value is None for row in drift[:-1] for value in row)
    page = write_report([runs["last"]], runs["last"] / "report.html").read_text()
    assert "--evaluate last" in page
    shown = markdown(tabulate([("lora", found)]))
    assert "backward transfer" in shown
    assert "backward transfer" not in markdown(tabulate([("lora", RunResults.read(runs["every"]))]))


def test_no_average_is_told_where_no_old_task_was_measured() -> None:
    rows = [Row(1, 1, "accuracy", 0.5)]
    assert average_after(rows, 1) is None
    assert average_after([*rows, Row(1, 0, "accuracy", 1.0)], 1) == 0.75


@pytest.mark.parametrize("evaluate", ["last", "sample:3"])
def test_a_run_that_was_stopped_goes_on_measuring_as_it_began(
    evaluate: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    bench = lab.but(tasks=TASKS)
    bench.run("lora(rank=2)", tmp_path / "whole", evaluate=evaluate)
    bench.broken_run("lora(rank=2)", tmp_path / "broken", (1, 2), (3, None), evaluate=evaluate, save_every=1)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("method", ["probe", "ncm", "lora(rank=2) + lwf"])
def test_constant_features_and_teachers_are_sampled_alike(method: str, lab: Any, tmp_path: Path) -> None:
    every, sampled = (lab.run(method, tmp_path / e, evaluate=e)["matrix"] for e in ("every", "sample:3"))
    assert sampled[-1] == every[-1]
    assert [row[i] for i, row in enumerate(sampled)] == [row[i] for i, row in enumerate(every)]
    assert 3 * sampled[1][0] == pytest.approx(round(3 * sampled[1][0]))


@pytest.mark.parametrize(
    ("settings", "evaluate", "why"),
    [
        ({"tasks": 2}, "last", "has no effect on synthetic: no task is old before the last: leave it out"),
        ({"tasks": 3}, "sample:8", "no old task has more than 8 test examples"),
        ({"objective": "retrieve"}, "last", "retrieve searches the images and captions of all tasks"),
    ],
)
def test_leaving_out_nothing_is_refused(
    settings: dict[str, Any], evaluate: str, why: str, lab: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--evaluate") as error:
        run(lab.but(**settings).config("lora(rank=2)", evaluate=evaluate), tmp_path / "run")
    assert why in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("text", ["never", "sample", "sample:0", "sample:-1", "sample:1.5", "sample:²", ""])
def test_other_words_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected every, last, or sample:500"):
        measured_between(text)
    with pytest.raises(SystemExit):
        main(["run", "--stream", "synthetic()", "--out", "o", "--evaluate", text])
    assert ("expected every, last, or sample:500" if text else "needs a value") in capsys.readouterr().err


def test_runs_of_before_the_option_stand_beside_those_of_today(runs: dict[str, Path]) -> None:
    today = RunResults.read(runs["every"])
    config = {name: value for name, value in today.config.items() if name != "evaluate"}
    older = RunResults(today.folder, {**today.facts, "config": config}, today.summary, today.rows)
    assert len(grouped([today, older])) == 1
    assert RunConfig(**config).evaluate == "every"


@pytest.mark.parametrize(
    ("evaluate", "asked"), [("every", [8, 16, 24, 32]), ("last", [8, 8, 8, 32]), ("sample:3", [8, 11, 14, 32])]
)
def test_a_router_is_asked_about_what_is_measured(
    evaluate: str, asked: list[int], lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    measures, routes = TaskExperts.measures, TaskExperts.routes

    def counting(self: TaskExperts, learner: Any) -> dict[str, float]:
        seen.append(0)
        with pytest.MonkeyPatch.context() as within:
            within.setattr(TaskExperts, "routes", lambda *given: count(routes(*given)))
            return measures(self, learner)

    def count(found: Any) -> Any:
        seen[-1] += len(found)
        return found

    monkeypatch.setattr(TaskExperts, "measures", counting)
    lab.but(tasks=TASKS).run("lora_experts(rank=2)", tmp_path / "run", evaluate=evaluate)
    assert seen == asked
