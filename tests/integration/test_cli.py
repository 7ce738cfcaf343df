"""The command line from end to end: what it prints, what it writes, and how it ends."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import tyro

from perdure.cli.commands import COMMANDS
from perdure.cli.console import Screen, human_bytes, human_seconds
from perdure.cli.main import main
from perdure.cli.suggestions import command_of
from perdure.experiments.grid import cells, seconds_left
from perdure.types import Row, Task

TRAINING = ["--epochs", "--batch-size", "--lr", "--optimizer", "--weight-decay", "--schedule"]
TRAINING += ["--milestones", "--decay"]
RUNNING = ["--stream", "--backbone", "--method", "--objective", "--augment", "--seed", "--precision", "--attention"]
RUNNING += ["--device", "--save-every", "--retain", "--calibrate", "--evaluate", "--cache", "--cache-bytes"]
RUNNING += ["--compile", "--online", "--vary", "--early-stop", "--early-stop-share"]
TRAINING += ["--accumulate"]
FLAGS = {
    "demo": ["--json", "--out"],
    "run": ["--json", *TRAINING, *RUNNING, "--recipe", "--out", "--track", "--processes", "--shard"],
    "resume": ["--json", "FOLDER", "--processes"],
    "learn": ["--json", "FOLDER", "--into", "--backbone", "--method", "--objective", "--epochs", "--lr"],
    "predict": ["--json", "LEARNER", "IMAGES", "--top", "--classes", "--calibrated", "--skip-bad", "--task"],
    "search": ["--json", "LEARNER", "FOLDER", "TEXT", "--top", "--skip-bad", "--task"],
    "ask": ["--json", "LEARNER", "WORDS", "--stdin", "--tokens", "--task"],
    "chat": ["--json", "LEARNER", "--tokens", "--task"],
    "compare": [
        "--json",
        *TRAINING,
        *sorted({*RUNNING} - {"--method", "--seed"}),
        "--methods",
        "--seeds",
        "--out",
        "--track",
    ],
    "tune": [
        "--json",
        *TRAINING,
        *sorted({*RUNNING} - {"--seed"}),
        "--space",
        "--trials",
        "--order-seed",
        "--report-seeds",
    ],
    "advise": ["--json", "--bytes", "--old-data", "--tasks", "--task-id-known", "--step-cost", "--scenario", "--from"],
    "eval": ["--json", "LEARNER", "--stream", "--retain", "--task"],
    "combine": ["--json", "FOLDERS", "--into", "--route", "--gate", "--pool-bytes", "--per-class", "--merge"],
    "report": ["--json", "FOLDERS", "--out", "--figures", "--csv", "--latex"],
    "export": ["--json", "LEARNER", "--out", "--to"],
    "move": ["--json", "FOLDER", "CHANGE"],
    "push": ["--json", "LEARNER", "REPOSITORY", "--to", "--public", "--device"],
    "resize": ["--json", "FOLDER", "--size", "--length", "--positions", "--rope", "--factor"],
    "show": ["--json", "LEARNER"],
    "list": ["--json", "WHAT", "NAME"],
}
FLAGS["app"] = ["--json", "LEARNER", "--images", "--runs", "--host", "--port", "--token", "--uploads", "--max-upload"]
FLAGS["app"] += ["--backbone", "--method", "--objective", "--seed"]
FLAGS["tune"] += ["--out"]
FLAGS["compare"] += ["--jobs", "--on", "--cpus-per-cell", "--gpus-per-cell"]
FLAGS["learn"] += ["--captions", "--batch-size", "--seed", "--precision", "--calibrate", "--skip-bad"]
FLAGS["learn"] += ["--images", "--score"]
FLAGS["forget"] = ["--json", "LEARNER", "NAME", "--device"]
FLAGS["reward"] = ["--json", "TEAM", "REWARDS", "--device"]
FLAGS["report"] += ["--features"]
FLAGS["advise"] += ["--family", "--exportable", "--searchable"]
FLAGS["pretrain"] = ["--json", "DATA", "--into", "--pretext", "--replay", "--backbone", "--method", "--objective"]
FLAGS["pretrain"] += ["--epochs", "--lr", "--batch-size", "--seed", "--precision", "--captions", "--skip-bad"]
FLAGS["combine"] += ["--weights", "--seed", "--distil", "--images", "--epochs", "--lr"]
for _name in ("resume", "learn", "pretrain", "predict", "search", "ask", "chat", "app", "eval", "combine", "export"):
    FLAGS[_name] += ["--device"]
for _name in ("run", "compare", "learn", "pretrain", "tune", "show"):
    FLAGS[_name] += ["--config"]
for _name in FLAGS:
    FLAGS[_name] += ["--quiet", "--verbose", "--import"]
"""All commands and flags; whoever changes this list changes what scripts out there rely on."""


def test_commands_and_flags_are_the_ones_we_promised() -> None:
    found = {}
    for name, command in COMMANDS.items():
        hints = {f.name: command.__annotations__.get(f.name) for f in dataclasses.fields(command)}
        shown = []
        for field in dataclasses.fields(command):
            marks = getattr(hints[field.name], "__metadata__", ())
            if tyro.conf.Suppress not in marks:
                positional = tyro.conf.Positional in marks
                flag = field.name.removesuffix("_").replace("_", "-")
                shown.append(field.name.upper() if positional else f"--{flag}")
        found[name] = shown
    assert {name: sorted(flags) for name, flags in found.items()} == {n: sorted(flags) for n, flags in FLAGS.items()}


def test_a_flag_that_has_another_name_now_is_still_understood(perdure: Any) -> None:
    former, now = (perdure("advise", flag, "yes", "--bytes", "1MB") for flag in ("--id-at-test", "--task-id-known"))
    assert former == now
    assert "the task is known at test" in now.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag(name: str, perdure: Any) -> None:
    answer = perdure(name, "--help")
    assert answer.code == 0
    for flag in FLAGS[name]:
        assert flag in answer.out or flag in ("WHAT", "NAME", "REWARDS")


def test_a_run_is_used_reported_measured_taught_and_resumed(perdure: Any, small: Any, tiny: Any, photos: Any) -> None:
    ran = perdure("run", *small, "--out", "runs/x")
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out
    said, *lines = ran.out.splitlines()
    assert said == "learning rate 0.003, that of inflora(rank=10); --lr gives another"
    assert re.fullmatch(r"  task +new  average  with task id       time", lines[0])
    assert re.fullmatch(r"     1  0: picture \d \.\.\. \(2 classes\) +[\d.]+%+ +[\d.]+% +[\d.]+% +[\d.]+ s", lines[1])
    assert lines[-1] == "report: runs/x/report.html"
    folder = Path("runs/x")
    assert {p.name for p in folder.iterdir()} == {
        *(".lock", "run.json", "results.jsonl", "summary.json", "report.html", "task-000", "task-001")
    }

    pictures = photos("new", "cat dog")
    seen = perdure("predict", "runs/x", pictures / "cat", "--top", 2)
    assert len(seen.out.splitlines()) == 8
    assert re.fullmatch(r"new/cat/00\.png  picture \d [\d.]+%  picture \d [\d.]+%", seen.out.splitlines()[0])

    measured = perdure("eval", "runs/x", "--json").events
    written = json.loads((folder / "summary.json").read_text())
    assert [m["value"] for m in measured if m["metric"] == "accuracy"] == written["matrix"][-1]
    assert f"mean over tasks {written['acc']:.1%}" in perdure("eval", "runs/x").out.splitlines()

    assert perdure("report", "runs/x", "--out", "all.html").out == "report: all.html\n"
    assert "<svg" in Path("all.html").read_text()

    before = {p.name: p.read_bytes() for p in folder.glob("*.json*")}
    assert perdure("resume", "runs/x").code == 0
    assert {p.name: p.read_bytes() for p in folder.glob("*.json*")} == before

    taught = perdure("learn", pictures, "--into", "runs/x")
    assert taught.code == 0
    assert "learnt cat, dog" in taught.out
    assert (folder / "task-002" / "manifest.json").is_file()
    assert perdure("predict", "runs/x", pictures / "cat" / "00.png", "--top", 9).out.count("%") == 6
    assert perdure("eval", "runs/x").out.count("picture") == 2
    assert perdure("resume", "runs/x").code == 0


def test_json_is_one_object_a_line_and_nothing_else(perdure: Any, small: Any, photos: Any) -> None:
    ran = perdure("run", *small, "--out", "x", "--json")
    assert ran.err == ""
    assert [e["event"] for e in ran.events] == ["note", *["task", "step", "scores"] * 2, "done"]
    assert ran.events[-1]["summary"] | {"seal": ANY} == json.loads(Path("x/summary.json").read_text())
    compared = perdure("compare", "--methods", "probe", *small, "--seeds", 0, 1, "--out", "c", "--json")
    assert {"event", "table"} == set(next(e for e in compared.events if e["event"] == "compared"))
    assert [e["cell"] for e in compared.events if e["event"] == "cell"] == [0, 1]
    for words in (("predict", "x", photos("new", "cat")), ("eval", "x"), ("report", "x"), ("list", "methods")):
        assert all(isinstance(event, dict) for event in perdure(*words, "--json").events)
    refused = perdure("predict", "nowhere", "cat.jpg", "--json")
    assert (refused.code, refused.out) == (2, "")


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).result({"loss": float("nan"), "list": [float("inf"), 1.0]})
    assert capsys.readouterr().out == '{"loss": null, "list": [null, 1.0]}\n'


def test_list_says_what_there_is(perdure: Any) -> None:
    methods = perdure("list", "methods").out
    assert re.search(r"^probe +Linear probing: heads on frozen features, the cheapest baseline\.$", methods, re.M)
    assert re.search(r"^ncm +Nearest class mean", methods, re.M)
    assert re.search(
        r"^ +\(rank=10, at='kv', blocks=None, tower='vision', alpha=None, per_task=False, tasks=None; learning rate .*",
        methods,
        re.M,
    )
    assert "args" not in methods
    assert re.search(r"^pocket ", perdure("list", "backbones").out, re.M)
    assert re.search(r"^synthetic ", perdure("list", "streams").out, re.M)
    assert re.search(r"^demo ", perdure("list", "recipes").out, re.M)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert re.fullmatch(r"perdure \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "say what to do: demo, run, resume"),
        ("rnu", "there is no command 'rnu'; did you mean 'run'?"),
        ("frobnicate", "there is no command 'frobnicate'; there are: demo, run, resume"),
        ("run --methd x", "'perdure run' has no option --methd; did you mean '--method'?"),
        ("run --stream", "--stream needs a value"),
        ("run --stream x", "Missing from perdure run: --out PATH"),
        ("predict", "Missing from perdure predict: LEARNER"),
        ("predict x", "'perdure predict' needs IMAGES"),
        ("learn a --into x --epoch 3", "'perdure learn' has no option --epoch; did you mean '--epochs'?"),
        (
            "run --stream s --out o --optimizer adamx",
            "--optimizer 'adamx' is not among the choices; did you mean 'adam'?",
        ),
        ("run --stream s --out o --epochs few", "'few'; expected int from 1 to 100000"),
        ("run --stream s --out o --lr fast", "perdure: --lr 'fast'; expected float above 0 and at most 1e6 or None\n"),
        ("learn a --into x --epochs 1.5", "perdure: --epochs '1.5'; expected int from 1 to 100000 or None\n"),
        ("run --stream s --out o lora(rank=1)", "does not know what to do with 'lora(rank=1)'"),
        ("run --stream s --out=o --lr=0", "--lr 0.0: expected float above 0 and at most 1e6"),
        ("run --stream s --out o --save-every=-1", "--save-every -1: expected int from 0 to 1e9"),
        ("list method", "WHAT 'method' is not among the choices; did you mean 'methods'?"),
        ("list methods lora(rank=2)", "'lora(rank=2)' is not among the methods; did you mean 'lora'?"),
        ("combine a b --into x --route foo", "expected gaussian, linucb, nearest, subspace, text, uniform\n"),
        ("run --stream s --out o --epochs 2.5", "perdure: --epochs '2.5'; expected int from 1 to 100000\n"),
        ("report a --out rr.pdf", "--out rr.pdf: a report is HTML: give a name that ends in .html"),
        ("reward a j.jsonl", "a is no team of specialists, who are chosen by rewards: combine learners with"),
        ("list recipes fm_lora_cub200", "recipe 'fm_lora_cub200' is gone"),
        ("compare --method x", "'perdure compare' has no option --method; did you mean '--methods'?"),
        ("compare --stream s --out o --methods --seeds 0", "--methods needs a value"),
        ("compare --stream s --out o --methods lora --seeds a", "--seeds 'a'; expected int from -1e12 to 1e12, or"),
        ("compare --stream s --out o --methods lora --seeds 0,1,2", ": write --seeds 0 1 2\n"),
        ("compare --stream s --out o --methods lora --seeds 0-2", ": write --seeds 0 1 2\n"),
        ("run --stream s --out=", "--out needs a value, not an empty one"),
        ("run --stream s --out o --weight-decay nan", "--weight-decay nan: expected float from 0 to"),
        ("run --stream s --out o --seed 1e3", "'1e3'; expected int from"),
        ("predict x y --top 0", "--top 0: expected int from 1 to"),
        ("predict x y --top -70", "--top -70: expected int from 1 to"),
    ],
)
def test_what_is_mistyped_is_one_line_with_what_was_meant(typed: str, said: str, perdure: Any) -> None:
    answer = perdure(*typed.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("perdure: ")
    assert said in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    "typed",
    [
        ["run", "--stream", "cifar100(tasks=10)", "--out", "x", "--no-json"],
        ["run", "--stream=s", "--out=x", "--batch_size", "3"],
        ["compare", "--methods", "a", "b + c", "--stream", "s", "--seeds", "0", "-1", "--out", "x"],
        ["predict", "--top", "2", "learner", "a.jpg", "b.jpg"],
        ["learn", "folder", "--into", "x", "--lr", "1e-3", "--skip-bad"],
        ["list", "methods", "--json"],
    ],
)
def test_what_is_typed_well_is_no_mistake(typed: list[str]) -> None:
    assert isinstance(command_of(typed, COMMANDS), COMMANDS[typed[0]])


def test_a_killed_grid_goes_on_and_tells_how_long(perdure: Any, small: Any) -> None:
    first = perdure("compare", "--methods", "probe", "ncm", *small, "--seeds", 0, "--out", "grid")
    assert first.code == 0
    assert "[1/2] probe, seed 0\n" in first.out
    assert re.search(r"^\[2/2\] ncm, seed 0, about [\d.]+ s left$", first.out, re.M)
    more = perdure("compare", "--methods", "probe", "ncm", *small, "--seeds", 0, 1, "--out", "grid")
    assert "seed 0" not in more.out
    assert "[3/4] probe, seed 1" in more.out
    table = json.loads(Path("grid/compare.json").read_text())
    assert [(row["method"], row["runs"]) for row in table] == [("probe", 2), ("ncm", 2)]
    grid = cells(["probe", "ncm"], [0, 1], Path("grid"))
    assert seconds_left(grid) == 0
    took = [
        sum(sum(json.loads(each.read_text())["seconds"].values()) for each in cell.folder.glob("task-*/manifest.json"))
        for cell in (grid[1], grid[3])
    ]
    (grid[3].folder / "summary.json").unlink()
    assert seconds_left(grid) == pytest.approx(max(0.0, took[0] - took[1]))
    other = perdure("compare", "--methods", "probe", *small, "--epochs", 9, "--seeds", 0, "--out", "grid")
    assert other.code == 2
    assert "grid/probe-seed0 was made with epochs=1, not 9: give the same options to go on" in other.err
    assert perdure("report", "grid", "--out", "g.html").code == 0


def summary_of(tasks: int) -> dict[str, Any]:
    matrix = [[0.9 if j == i else 0.5 if j < i else None for j in range(tasks)] for i in range(tasks)]
    shares = {"acc": 0.52, "aaa": 0.61, "forgetting": 0.4, "acc_with_task_id": 0.8, "task_id_acc": None}
    return {"matrix": matrix, "stored_bytes": 12345, **shares}


def row_of(method: str) -> dict[str, Any]:
    keys = ("acc", "aaa", "new_task_acc", "forgetting", "acc_with_task_id", "task_id_acc")
    scores = {key: [0.8134, 0.0123] for key in keys}
    return {
        "method": method,
        "runs": 3,
        **scores,
        "images_per_second": [1234.5, 20],
        "stored_bytes": [2.5e6, 0],
        "seconds": [75, 1],
        "step": {"ratio": 1.234},
    }


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_tables_fit_the_screen(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.out.width = width
    screen.table([row_of("inflora(rank=10) + replay(size=500)"), row_of("lora")])
    screen.matrix(summary_of(20), [], "lora")
    long = [line for line in capsys.readouterr().out.splitlines() if len(line) > width]
    # sentences below a table are broken by the terminal
    assert [line for line in long if not re.match(r"in %|lora: %|all 20|no room", line)] == []


def test_comparison_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.out.width = 80
    screen.table([row_of("inflora(rank=10) + replay(size=500)"), row_of("lora")])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "  accuracy  new task forgetting with task id   task id stored step seconds",
        "inflora(rank=10) + replay(size=500)",
        " 81.3 ±1.2 81.3 ±1.2  81.3 ±1.2    81.3 ±1.2 81.3 ±1.2 2.5 MB 1.23      75",
        "lora",
        " 81.3 ±1.2 81.3 ±1.2  81.3 ±1.2    81.3 ±1.2 81.3 ±1.2 2.5 MB 1.23      75",
        "in %, mean ± standard deviation; new task: right after it was learnt; with task id: when told which task an "
        "image is of; step: its cost, plain LoRA's is 1",
        "no room for images/s, average: in report.html",
    ]


def test_matrix_of_twenty_tasks_shows_its_ends_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.out.width = 80
    screen.matrix(summary_of(20), [], "lora")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "lora: % right on each task (columns), after each task (rows)"
    assert lines[2].split() == ["after", *map(str, range(1, 9)), "…", *map(str, range(14, 21)), "mean"]
    assert lines[3].split() == ["1", "90", "90.0"]
    assert "all 20 tasks are in summary.json and report.html" in lines
    assert lines[-1] == "stored 12.3 kB" or lines[-1].endswith("stored 12.3 kB")


def test_names_are_cut_by_the_columns_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.out.width = 80
    rows = [Row(0, 0, "accuracy", 0.5), Row(0, 0, "accuracy_with_task_id", 0.75)]
    for name in ("cats", "猫和狗", "a very long name that goes on and on and on"):
        screen.scores(Task(0, name, (0,), ("a",)), rows)
    head, *lines = capsys.readouterr().out.splitlines()
    places = {line.index("50.0%") + sum(ord(c) > 0x2E80 for c in line) for line in lines}
    assert len(places) == 1
    assert head.index("new") + 3 == places.pop() + 5
    assert "and on" not in lines[-1]


def test_numbers_read_well() -> None:
    seconds = ", ".join(human_seconds(s) for s in (0.04, 2.34, 9.97, 99, 754, 9000))
    assert seconds == "0.0 s, 2.3 s, 10 s, 99 s, 13 min, 2.5 h"
    counts = "; ".join(human_bytes(b) for b in (12, 1536, 2.5e6, 3e9, 4e12))
    assert counts == "12 B; 1.5 kB; 2.5 MB; 3.0 GB; 4,000.0 GB"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_terminal_shows_a_live_bar_and_narrow_tables(
    tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import pty
    import struct
    import termios

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    child, ours = pty.fork()
    if not child:  # the command, at the terminal's other end
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        main(["run", *map(str, small), "--epochs", "60", "--out", "x"])
        sys.stdout.flush()
        os._exit(0)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # what Linux says when the other end is closed
        pass
    finally:
        os.close(ours)
    assert os.waitpid(child, 0)[1] == 0
    text = shown.decode()
    assert re.search(r"task 1/2.*epoch \d+/60.*loss \d\.\d+.*images/s", text)
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "accuracy" in plain
    assert all(len(piece) <= 80 for line in plain.split("\n") for piece in line.split("\r"))


def test_processes_that_are_started_say_as_much_as_was_asked_for(perdure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    monkeypatch.setattr("perdure.training.launch.launch", lambda _count, given, _out: words.extend(given))
    for option in ("--json", "--quiet", "--verbose"):
        words.clear()
        asked = ("--stream", "synthetic()", "--method", "probe", "--processes", 2, option, "--out", "x")
        assert perdure("run", *asked).code == 0
        assert [each for each in words if each in ("--json", "--quiet", "--verbose")] == [option]


def test_what_has_no_effect_is_told_where_only_results_are_asked_for(perdure: Any, small: Any, photos: Any) -> None:
    idle = perdure("run", *small, "--method", "ncm", "--epochs", 9, "--out", "idle")
    assert "learning rate 0.001" not in idle.out
    assert "ncm trains nothing: epochs, learning rate, schedule and optimizer have no effect" in idle.out
    pictures = photos("new", "cat dog")
    (pictures / "cat" / "torn.png").write_bytes(b"no picture")
    quiet = ("learn", pictures, "--into", "mine", "--backbone", "tiny()", "--method", "ncm", "--skip-bad", "--quiet")
    first, again = perdure(*quiet), perdure(*quiet)
    assert "1 unreadable image was left out" in first.err
    assert "rate" not in first.err + first.out
    assert "nothing is learnt twice" in again.err
