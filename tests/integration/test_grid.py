"""A grid that is killed again and again repeats nothing that is finished, and ends in the table of an unbroken one."""

import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from perdure.cli import main as cli
from perdure.cli.commands import COMMANDS
from perdure.cli.console import Screen
from perdure.experiments.grid import cells, compare
from perdure.types import Task

METHODS = ["inflora(rank=2)", "lora(rank=2) + ewc(samples=8)", "probe + replay(size=6)", "ncm"]
SEEDS = [0, 1]
TIMED = ("seconds", "evaluation_seconds", "images_per_second", "step_cost", "step")


def ask(arguments: list[str], said: Path, out: Path | None = None, enough: int = 0, moments: int = 0) -> None:
    """The body of a child process: the command line, with what it says in a file.

    It kills itself so many moments after `enough` runs in `out` are finished, of all 8 after a step was measured too;
    a moment is whatever happens to a file there.
    """
    left = [moments]

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(details[0]).startswith(str(out)):
            left[0] -= len(finished(Path(str(out)))) >= enough and (enough < 8 or Path(f"{out}/steps.json").exists())
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if out:
        sys.addaudithook(heard)
    sys.stdout = sys.stderr = said.open("w")
    cli.main(arguments)


def finished(out: Path) -> list[Path]:
    return [path.parent for path in out.glob("*/summary.json")]


def content(folders: list[Path]) -> dict[str, Any]:
    """Bytes and time of change of every file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def untimed(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in table]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_grid_of_methods_and_seeds_survives_kill_9(lab: Any, tmp_path: Path) -> None:
    bench, out = lab.but(tasks=2, epochs=1), tmp_path / "broken"
    options = {
        k: v
        for k, v in bench.config("probe").describe().items()
        if k not in ("method", "seed", "shard") and v not in ([], "", None, False)
    }
    flags = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    words = ["compare", "--methods", *METHODS, *flags, "--seeds", *map(str, SEEDS), "--out", str(out)]
    whole = compare(
        bench.config("probe"), cells(METHODS, SEEDS, tmp_path / "unbroken"), tmp_path / "unbroken", steps=False
    )

    moments, kept = random.Random(7), {}
    fork = multiprocessing.get_context("fork").Process
    for enough in (1, 3, 6, 8):  # finished runs, after which it is killed at a random moment
        moment = moments.randint(0, 4 if enough == 8 else 15)  # a step is measured in three
        child = fork(target=ask, args=(words, tmp_path / "said", out, enough, moment))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        now = content(finished(out))
        assert now | kept == now
        kept = now
    measured = json.loads((out / "steps.json").read_text())["methods"]
    assert 0 < len(measured) < len(METHODS)
    table = json.loads((out / "compare.json").read_text())
    assert untimed(table) == json.loads(json.dumps(untimed(whole)))

    last = fork(target=ask, args=(words, tmp_path / "said"))
    last.start()
    last.join()
    assert last.exitcode == 0, (tmp_path / "said").read_text()
    assert content(finished(out)) == kept
    again = json.loads((out / "steps.json").read_text())["methods"]
    assert {method: again[method] for method in measured} == measured
    assert list(again) == METHODS
    table = json.loads((out / "compare.json").read_text())
    assert untimed(table) == json.loads(json.dumps(untimed(whole)))
    assert [row["step_cost"] for row in table] == [again[method]["ratio"] for method in METHODS]


def test_the_table_is_also_written_in_markdown_and_drawn(perdure: Any, small: Any) -> None:
    answer = perdure("compare", "--methods", "probe", "ncm", *small, "--seeds", 0, 1, "--out", "grid")
    assert "step cost 2/2: ncm" in answer.out
    (probe, ncm) = json.loads(Path("grid/compare.json").read_text())
    assert probe["step_cost"] > 0
    assert (ncm["step_cost"], ncm["step"]["why"]) == (None, "no steps")
    assert probe["referenced_bytes"] == 0
    assert len(probe["stored_bytes_after"]) == 2
    assert probe["stored_bytes_after"][-1] == probe["stored_bytes"][0]
    matrices = [json.loads(Path(f"grid/probe-seed{seed}/summary.json").read_text())["matrix"] for seed in (0, 1)]
    own = [sum(matrix[i][i] for i in range(2)) / 2 for matrix in matrices]
    assert probe["new_task_acc"][0] == pytest.approx(sum(own) / 2)
    head, _, *lines = Path("grid/compare.md").read_text().splitlines()
    assert head.startswith("| method | runs | learning rate | final accuracy | new-task accuracy | forgetting |")
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| `probe`", "| `ncm`"]
    assert lines[-1].startswith("±")
    assert "| none |" in lines[1]
    for name in ("accuracy-bytes.svg", "accuracy-time.svg"):
        assert Path("grid", name).read_text().startswith("<?xml")
    report = Path("grid/report.html").read_text()
    assert report.count("Best trade-offs") == 2
    assert "× LoRA" in report
    assert "New-task accuracy" in report


def test_one_method_is_compared_with_nothing_and_the_demo_times_no_steps(perdure: Any, small: Any, lab: Any) -> None:
    perdure("compare", "--methods", "probe", *small, "--seeds", 0, "--out", "grid")
    assert not list(Path("grid").glob("*.svg"))
    compare(lab.config("probe"), cells(["ncm"], [0], Path("other")), Path("other"), steps=False)
    assert not Path("other/steps.json").exists()


def test_advice_can_come_from_ones_own_grid(perdure: Any, small: Any) -> None:
    perdure("compare", "--methods", "probe", "probe + replay(size=6)", *small, "--seeds", 0, 1, "--out", "grid")
    advise = COMMANDS["advise"]
    screen = Screen()
    advise(from_=Path("grid"), old_data=False, tasks=2)(screen)
    assert advise(from_=Path("grid")).json is False
    with pytest.raises(ValueError, match="no finished run in nowhere"):
        advise(from_=Path("nowhere"))(screen)


def test_advice_names_numbers_origin_and_what_is_left_out(perdure: Any) -> None:
    answer = perdure("advise", "--bytes", "50MB", "--no-old-data", "--tasks", 20, "--task-id-known", "no")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == "asked: the task is not known at test, 20 tasks, at most 50MB stored, no old data kept"
    assert re.match(r" +accuracy +new task +forgetting +stored +step +method", lines[3])
    assert re.match(r"1=? +\d\d\.\d", lines[4])
    assert re.search(r"^left out, --no-old-data: .*replay", perdure("advise", "--no-old-data").out, re.M)
    assert "scores are for 10 tasks" in perdure("advise", "--tasks", 20, "--task-id-known", "no", "--json").out
    assert re.search(r"^measured \d{4}-\d\d-\d\d.* with perdure [\d.]+", answer.out, re.M)
    assert re.search(r"^  perdure compare --.* --methods .* --out runs/again$", answer.out, re.M)
    (event,) = perdure("advise", "--json", "--task-id-known", "yes").events
    assert event["answers"][0]["choices"][0]["place"] == 1
    assert event["answers"][0]["setting"]["command"].startswith("perdure compare")


def test_the_command_that_is_advised_works(perdure: Any, photos: Any, small: Any) -> None:
    photos("photos/january", "cat dog", 6)
    perdure("compare", "--methods", "probe + align", *small, "--seeds", 0, "--out", "grid")
    lines = perdure("advise", "--from", "grid", "--no-old-data").out.splitlines()
    words = shlex.split(lines[lines.index("to use the first:") + 1])
    assert words[:3] == ["perdure", "learn", "photos/january"]
    assert {"--method", "probe + align", "--backbone", "tiny()"} <= set(words)
    assert perdure(*words[1:], "--precision", "fp32").code == 0
    assert perdure("predict", "my.learner", "photos/january/cat").code == 0


def test_advice_says_when_it_does_not_know(perdure: Any) -> None:
    assert "pacs, 4 tasks" in perdure("advise", "--scenario", "domain").out
    assert "not known: no method that was measured here" in perdure("advise", "--bytes", "1B").out
    refused = perdure("advise", "--bytes", "many")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "perdure: --bytes 'many': expected a positive number of bytes, such as 50e6, 50MB or 50MiB\n"


def test_a_terminal_shows_the_grid_above_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    terminal = screen.live.console
    terminal.width = 80
    monkeypatch.setattr(type(terminal), "is_terminal", True)
    screen.cell(2, 18, "inflora(rank=10)", 1, 600.0)
    screen.task(Task(0, "a", (0,), ("a",), 10), 10, 1, 4)
    with terminal.capture() as shown:
        terminal.print(screen.live.shown)
    screen.close()
    grid, task = shown.get().rstrip("\n").split("\n")
    assert re.match(r"run 3/18 .* inflora\(rank=10\), seed 1 .*10 min left", grid)
    assert task.startswith("task 1/10")


def test_what_would_fail_hours_later_is_refused_before_the_first_run(perdure: Any, small: Any) -> None:
    method = "adapter(rank=3, tasks=1) + feature_distill"
    refused = perdure("compare", "--methods", "probe", method, *small, "--seeds", 0, 1, "--out", "grid")
    assert refused.code == 2
    assert refused.err.startswith(f"perdure: --methods {method!r}: task 2: feature_distill has no effect")
    assert refused.err.count("\n") == 1
    assert not Path("grid").exists()


def test_finished_runs_that_are_not_in_the_table_are_named(perdure: Any, small: Any) -> None:
    asked = ("compare", *small, "--out", "grid")
    assert perdure(*asked, "--methods", "probe", "ncm", "--seeds", 0, 1).code == 0
    one = perdure(*asked, "--methods", "probe", "--seeds", 0)
    said = "grid holds 3 more finished runs, not in this table: ncm-seed0, ncm-seed1, probe-seed1; "
    assert said + "to include, add ncm to --methods and 1 to --seeds" in one.out
    assert [row["method"] for row in json.loads(Path("grid/compare.json").read_text())] == ["probe"]
    Path("grid/ncm-seed1/run.json").write_text("[]")
    other = perdure(*asked, "--methods", "probe", "--seeds", 0, 1, "--json")
    (note,) = [event["text"] for event in other.events if "more finished" in event.get("text", "")]
    assert (
        note
        == "grid holds 2 more finished runs, not in this table: ncm-seed0, ncm-seed1; to include, add ncm to --methods"
    )
    Path("grid/ncm-seed1/run.json").unlink()
    Path("grid/ncm-seed0").rename("elsewhere")
    assert "more finished" not in perdure(*asked, "--methods", "probe", "--seeds", 0, 1).out


QUESTIONS = 'in_turn(conversations(path=["a.json", "b.json"]), conversations(path="c.json"){})'


def test_seeds_that_do_not_change_the_order_of_tasks_are_told_of(perdure: Any) -> None:
    """And each of a stream's orders can be asked for by its seed."""
    for name in "abc":
        rows = [{"question": f"Which of {n}?", "answer": name} for n in range(10)]
        Path(f"{name}.json").write_text(json.dumps(rows))
    given = ["--backbone", "tiny_mllm()", "--objective", "generate(tokens=2)", "--epochs", "1", "--methods", "probe"]
    given += ["--seeds", "0", "1", "2"]
    fixed = "has one order of tasks with all of the seeds 0 1 2"
    told = perdure("compare", *given, "--stream", QUESTIONS.format(""), "--out", "fixed")
    assert told.code == 0
    assert fixed in told.out + told.err
    refused = perdure("compare", *given, "--stream", QUESTIONS.format(""), "--vary", "order", "--out", "alone")
    assert refused.code != 0
    assert fixed in refused.err
    assert 'order="seed"' in refused.err
    own = perdure("compare", *given, "--stream", QUESTIONS.format(', order="seed"'), "--vary", "order", "--out", "own")
    assert own.code == 0, own
    assert fixed not in own.out + own.err
    orders = {tuple(each["name"] for each in tasks_of(file)) for file in Path("own").glob("*/run.json")}
    assert len(orders) > 1


def tasks_of(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["stream"]["tasks"]
    return found
