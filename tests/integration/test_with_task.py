"""Where the task is known, all who answer take what it has taught: in runs, in Python and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from perdure import Learner

ONE_A_TASK = ("pnn(rank=4)", "lora_experts(rank=2)", "modal_prompt(tokens=2)", "disco(rank=2)")


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("method", ONE_A_TASK)
def test_told_the_task_nothing_that_a_task_taught_is_forgotten(
    method: str, scenario: str, lab: Any, tmp_path: Path
) -> None:
    bench = lab.but(scenario=scenario, noise=1.5)
    summary = bench.run(method, tmp_path / "run")
    assert summary["forgetting_with_task_id"] == 0
    if scenario == "task":
        assert summary["forgetting"] == 0
        assert summary["acc"] == summary["acc_with_task_id"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["metric"] == "accuracy_with_task_id"]
    first = {row["on"]: row["value"] for row in told if row["on"] == row["after"]}
    assert len(told) == 6
    assert all(row["value"] == first[row["on"]] for row in told)


def test_eval_of_a_finished_run_tells_the_task_as_the_run_did(lab: Any, perdure: Any, tmp_path: Path) -> None:
    summary = lab.but(scenario="task", noise=1.5).run("pnn(rank=4)", tmp_path / "run")
    found = [each for each in perdure("eval", tmp_path / "run", "--json").events if each.get("metric") == "accuracy"]
    assert sum(each["value"] for each in found) / len(found) == pytest.approx(summary["acc"])


def test_search_and_predict_take_what_the_told_task_has_taught(photos: Any, perdure: Any, tmp_path: Path) -> None:
    made = ["--backbone", "tiny(text=True)", "--objective", "zeroshot", "--precision", "fp32", "--device", "cpu"]
    for name, method in (("l", "lora(rank=2)"), ("m", "moe_adapters(rank=2, tower='both')")):
        for folder, classes in (("pets", "cat dog"), ("birds", "emu kea")):
            more = ["--method", method, "--epochs", 4, "--lr", 0.03, *made] if folder == "pets" else []
            assert perdure("learn", photos(folder, classes), "--into", name, *more).code == 0
    learner, pictures = Learner.load("m"), sorted(Path("pets/cat").glob("*.png"))
    found = {task: dict(learner.search(pictures, "cat", task=task)) for task in (None, "pets", "birds")}
    assert found["pets"] != found["birds"]
    lines = perdure("search", "m", "pets/cat", "cat", "--task", "pets", "--json").events
    assert [each["cosine"] for each in lines] == pytest.approx(sorted(found["pets"].values(), reverse=True))
    free = {task: learner.predict(pictures[:1], classes=["a", "b"], task=task)[0] for task in ("pets", "birds")}
    assert free["pets"] != free["birds"]
    for call, line in (
        (("search", "m", "pets", "cat", "--task", "pet"), "no task 'pet'; did you mean 'pets'?"),
        (("search", "l", "pets", "cat", "--task", "pets"), "task='pets' has no effect: 'lora(rank=2)'"),
    ):
        wrong = perdure(*call)
        assert (wrong.code, line in wrong.err) == (2, True), wrong.err
