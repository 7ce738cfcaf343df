"""Tables for papers: classes and confusions from what was answered, and differences that are as sure as they are."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perdure.core import checkpoint
from perdure.evaluation import per_class
from perdure.evaluation.per_class import Answers
from perdure.reporting.papers import write_tables
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults
from perdure.reporting.significance import classes_of, difference
from perdure.types import Task


@pytest.fixture(scope="module")
def grid(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two methods over two seeds."""
    root = tmp_path_factory.mktemp("grid")
    folders = []
    for method in ("ncm", "lora(rank=2)"):
        for seed in (0, 1):
            folders.append(root / f"{method.partition('(')[0]}-{seed}")
            lab.but(seed=seed, epochs=1).run(method, folders[-1])
    return folders


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_classes_and_confusions_add_up_to_the_accuracy_of_each_task(grid: list[Path]) -> None:
    done = checkpoint.whole(grid[2])
    answers = per_class.read(done[-1])
    last = {row.on: row.value for row in done[-1].rows if row.metric == "accuracy"}
    for task, (labels, given) in answers.items():
        assert float((labels == given).float().mean()) == pytest.approx(last[task])
    facts = per_class.class_facts(done)
    assert math.fsum(facts["class_accuracy"].values()) / 6 == pytest.approx(math.fsum(last.values()) / 3)
    assert all(math.fsum(row) == pytest.approx(1) for row in facts["confusion"])


def test_every_table_is_written_and_says_what_varies(grid: list[Path], tmp_path: Path) -> None:
    files = {file.name: file for file in write_tables(grid, tmp_path, as_csv=True, as_latex=True)}
    assert set(files) == {
        *("methods.csv", "runs.csv", "scores.csv", "classes.csv", "confusion.csv", "confusion_tasks.csv"),
        *("significance.csv", "methods.tex"),
    }
    methods = {row["method"]: row for row in read(files["methods.csv"])}
    assert set(methods) == {"ncm", "lora(rank=2)"}
    assert "start" in methods["ncm"]["varied"]
    counts = [int(row["images"]) for row in read(files["confusion.csv"]) if row["run"] == "ncm-0"]
    assert sum(counts) == 24
    (pair,) = read(files["significance.csv"])
    assert (pair["orders"], pair["p"]) == ("2", "")
    assert float(pair["low_95"]) <= float(pair["difference"]) <= float(pair["high_95"])
    tex = files["methods.tex"].read_text()
    assert r"\texttt{lora(rank=2)} & " in tex
    assert tex.count(r"\textbf") >= 3


def test_tables_are_those_of_the_runs_that_are_given(grid: list[Path], tmp_path: Path) -> None:
    assert (tmp_path / "significance.csv") in write_tables(grid, tmp_path, as_csv=True, as_latex=False)
    write_tables(grid[:1], tmp_path, as_csv=True, as_latex=False)
    assert not (tmp_path / "significance.csv").exists()
    (row,) = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    stored = json.loads((grid[0] / "summary.json").read_text())["stored_bytes"]
    assert row["stored_bytes"] == str(stored)


def test_runs_of_folders_of_one_name_are_told_apart(grid: list[Path], tmp_path: Path) -> None:
    for where in ("first", "second"):
        shutil.copytree(grid[0], tmp_path / where / "run")
    folders = [tmp_path / where / "run" for where in ("first", "second")]
    write_tables(folders, tmp_path / "tables", as_csv=True, as_latex=False)
    for name in ("runs", "scores", "classes"):
        rows = csv.DictReader((tmp_path / "tables" / f"{name}.csv").read_text().splitlines())
        assert {row["run"] for row in rows} == {"first-run", "second-run"}
    write_report(folders, tmp_path / "report.html", tmp_path / "figures")
    assert {path.stem for path in (tmp_path / "figures").glob("matrix-*.pdf")} == {
        "matrix-first-run",
        "matrix-second-run",
    }


def test_the_latex_table_of_a_search_is_of_recall(lab: Any, tmp_path: Path) -> None:
    lab.but(objective="retrieve").run("lora(rank=2)", tmp_path / "run")
    (file,) = write_tables([tmp_path / "run"], tmp_path, as_csv=False, as_latex=True)
    assert "Final recall" in file.read_text()
    assert "ccuracy" not in file.read_text()


def test_the_report_shows_confusions_and_classes(grid: list[Path], tmp_path: Path) -> None:
    page = write_report([grid[2]], tmp_path / "report.html").read_text()
    assert "What is confused with what" in page
    assert "Accuracy of each class after the last task" in page


def test_classes_of_one_name_are_told_apart(tmp_path: Path, lab: Any) -> None:
    stream = "sequence(synthetic(classes_per_task=2), synthetic(classes_per_task=3, noise=0.5), scenario='class')"
    lab.run("ncm", tmp_path / "run", stream=stream)
    (first, second), done = (checkpoint.whole(tmp_path / "run")[-1].tasks, checkpoint.whole(tmp_path / "run"))
    assert set(first.names) < set(second.names), "classes of both have the same names"
    doubled = {f"{task.name}: {name}" for task in (first, second) for name in first.names}
    facts = per_class.class_facts(done)
    assert set(facts["class_accuracy"]) == doubled | (set(second.names) - set(first.names))
    assert "confusion" in facts
    files = write_tables([tmp_path / "run"], tmp_path / "tables", as_csv=True, as_latex=False)
    (classes,) = (read(file) for file in files if file.name == "classes.csv")
    assert {row["class"] for row in classes} == set(facts["class_accuracy"])


def test_a_name_told_apart_is_no_other_class_s_name() -> None:
    tasks = [
        Task(0, "a", (0, 1), ("cat", "a: cat")),
        Task(1, "a", (2, 3), ("cat", "dog")),
        Task(2, "b", (3,), ("dog",)),
    ]
    assert per_class.class_names(tasks) == {0: "task 1, a: cat", 1: "a: cat", 2: "task 2, a: cat", 3: "dog"}


def test_domains_have_no_confusion_of_tasks(tmp_path: Path, lab: Any) -> None:
    lab.but(tasks=2, scenario="domain", epochs=1).run("ncm", tmp_path / "run")
    assert set(per_class.class_facts(checkpoint.whole(tmp_path / "run"))) == {"class_accuracy"}
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "What is confused with what" not in page
    assert "Tasks share their classes" in page


def test_what_a_spreadsheet_would_compute_is_text() -> None:
    from perdure.reporting.papers import _csv

    assert _csv([{"class": "=cmd|' /C calc'!A0", "n": 1.0}]) == "class,n\n'=cmd|' /C calc'!A0,1\n"


ALIKE = {seed: {(0, 0): "cat"} for seed in range(10)}


def answered(seed: int, right: float, count: int = 400) -> Answers:
    labels = torch.zeros(count, dtype=torch.int32)
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed)) >= right
    return {0: (labels, wrong.to(torch.int32))}


def test_a_difference_needs_five_orders_for_a_p_value_and_sees_what_is_there() -> None:
    def between(one: float, other: float, orders: int) -> Any:
        every = range(orders)
        return difference({s: answered(s, one) for s in every}, {s: answered(100 + s, other) for s in every}, ALIKE)

    assert between(0.8, 0.6, 4).p is None
    clear, none = between(0.8, 0.6, 5), between(0.7, 0.7, 5)
    assert clear.p < 0.01
    assert clear.low > 0.1
    assert none.p > 0.05
    assert none.low < 0 < none.high
    same = answered(3, 0.5)
    assert difference({0: same}, {0: same}, ALIKE).high == 0
    assert difference({0: same}, {0: answered(0, 0.5, 10)}, ALIKE) is None


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    one, other = answered(1, 0.8, 4000), answered(2, 0.7, 4000)
    found = difference({0: one}, {0: other}, ALIKE)
    assert found is not None
    d = (one[0][1] == 0).double() - (other[0][1] == 0).double()
    half = 1.96 * float(d.std()) / 4000**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_answers_that_are_alike_in_every_order_count_once() -> None:
    generator, orders, missed = np.random.default_rng(0), range(10), 0
    for _ in range(100):  # two methods that are equal, on 200 images of two classes; orders change a tenth of answers
        kept: list[dict[int, Answers]] = [{}, {}]
        for method in kept:
            usual = generator.random(200) < 0.7
            for seed in orders:
                right = np.where(generator.random(200) < 0.1, generator.random(200) < 0.7, usual)
                first, second = (0, 1) if seed % 2 else (1, 0)  # the classes are numbered as they come
                labels = torch.tensor([first] * 100 + [second] * 100, dtype=torch.int32)
                given = torch.where(torch.from_numpy(right), labels, 2)
                tasks = {c: (labels[labels == c], given[labels == c].int()) for c in (0, 1)}
                method[seed] = dict(sorted(tasks.items()))
        names = {seed: {(c, c): "cat" if c == seed % 2 else "dog" for c in (0, 1)} for seed in orders}
        found = difference(*kept, names)
        assert found is not None
        missed += not found.low <= 0 <= found.high
    assert missed <= 12  # as 5 % of intervals of 95 % do; of 100 this many in one case of a thousand


def test_classes_of_one_name_in_two_data_sets_are_two(lab: Any, tmp_path: Path) -> None:
    lab.run("probe", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["stream"]["tasks"]
    run = RunResults.read(tmp_path / "run")
    for task in run.facts["stream"]["tasks"]:
        task["names"] = ["cat", "dog"]
    assert len(set(classes_of(run).values())) == len(classes_of(run)) == 2 * len(facts)


def test_of_very_many_images_the_interval_is_that_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ({s: answered(s + more, right, 2000) for s in range(5)} for more, right in ((0, 0.8), (50, 0.75)))
    drawn = difference(one, other, ALIKE)
    monkeypatch.setattr("perdure.reporting.significance._MANY", 100)
    normal = difference(one, other, ALIKE)
    assert drawn is not None
    assert normal is not None
    assert (normal.mean, normal.orders) == (drawn.mean, drawn.orders)
    assert normal.low == pytest.approx(drawn.low, abs=0.001)
    assert normal.high == pytest.approx(drawn.high, abs=0.001)


def test_tables_of_others_in_the_same_folder_stay(grid: list[Path], tmp_path: Path) -> None:
    (tmp_path / "significance.csv").write_text("mine")
    write_tables(grid[:1], tmp_path, as_csv=True, as_latex=False)
    assert (tmp_path / "significance.csv").read_text() == "mine"
