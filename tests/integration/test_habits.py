"""What people are used to from other programs: a file of options, quiet and loud, own methods, completion."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from perdure.cli.main import main
from perdure.core.method import METHODS
from perdure.experiments.tune import report_command
from perdure.options.own_methods import OWN_METHODS
from perdure.training.config import RunConfig

TINY = ["--stream", "synthetic(tasks=2, per_class=8)", "--backbone", "tiny()", "--epochs", "2", "--batch-size", "8"]
GUARD = """
from perdure.core.method import Method


class Mine(Method, name="of_mine"):
    \"\"\"Nothing.\"\"\"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OWN_METHODS, "")
    yield tmp_path
    METHODS.pop("of_mine", None)
    sys.modules.pop("my_method", None)


def test_a_runs_configuration_is_printed_and_gives_the_same_run_but_for_flags_that_are_typed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", *TINY, "--method", "lora(rank=2)", "--lr", "0.01", "--out", "first", "--quiet"])
    capsys.readouterr()
    main(["show", "first", "--config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["method"] == "lora(rank=2)"
    (here / "run.yaml").write_text(text)
    main(["run", "--config", "run.yaml", "--out", "second", "--quiet"])
    main(["run", "--seed", "1", "--config=run.yaml", "--out", "third", "--quiet"])
    made = [json.loads((here / run / "run.json").read_text())["config"] for run in ("first", "second", "third")]
    assert made[1] == made[0]
    assert made[2] == made[0] | {"seed": 1}


def test_a_learners_configuration_gives_the_same_learner(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 6)
    small = ("--backbone", "tiny()", "--epochs", "1", "--precision", "fp32")
    for method in ("inflora(rank=10)", "probe + align", "lora(rank=2)"):
        perdure("learn", "january", "--into", method, "--method", method, *small)
        Path("made.yaml").write_text(perdure("show", method, "--config").out)
        perdure("learn", "january", "--into", f"{method} again", "--config", "made.yaml")
        made = [json.loads(Path(folder, "run.json").read_text())["config"] for folder in (method, f"{method} again")]
        assert made[0] == made[1]


def test_the_command_that_reports_a_search_knows_own_methods(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = RunConfig(stream="synthetic()")
    assert "--import" not in report_command(best, [0], here)
    monkeypatch.setenv(OWN_METHODS, str(here / "own.py"))
    assert report_command(best, [0], here).endswith(f" --import {here / 'own.py'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: lora", "there is no option 'metod'; did you mean 'method'?"),
        ("- lora", "expected lines such as 'method: inflora(rank=10)'"),
        ("a: [", "is no YAML"),
        ("method: {lora: 2}", "method is {'lora': 2}, expected a value"),
        ("lr: fast", "lr"),
        ("import: my.py", "import stands on the command line alone: write --import my.py"),
        ("online: 'yes'", "run.yaml: online is 'yes', expected true or false"),
        ("early_stop: true", "run.yaml: early_stop is True, expected a value"),
        ("batch-size: 8\nbatch_size: 4", "run.yaml: batch-size and batch_size are the same option: keep one"),
        ("lr: 0.1\nseed: 1\nlr: 0.2", "run.yaml: lr is given 2 times: keep one"),
        ("milestones: [6, 4]\nschedule: step", "milestones='6,4'"),
        ("!!python/object/apply:os.system [ls]", "is no YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (here / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["run", "--config", "run.yaml", *TINY, "--out", "run"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_quiet_says_the_results_only_and_verbose_a_line_an_epoch(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for flag in ("--quiet", "--verbose"):
        main(["run", *TINY, "--method", "lora(rank=2)", "--out", flag[2:], flag])
        said[flag] = capsys.readouterr().out
    epochs = re.compile(r"^  epoch [12]/2  loss \d", re.M)
    assert len(epochs.findall(said["--verbose"])) == 4
    assert not epochs.search(said["--quiet"])
    assert "with task id" in said["--verbose"]
    assert "with task id " not in said["--quiet"].partition("% right")[0]
    assert "report: " in said["--quiet"]


def test_a_mistake_shows_where_it_was_found_to_who_asks_for_more(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, shown in (([], False), (["--verbose"], True)):
        with pytest.raises(SystemExit):
            main(["predict", "nowhere", "cat.jpg", *flags])
        assert ("Traceback" in capsys.readouterr().err) == shown


def test_a_method_in_a_file_is_known_everywhere_once_it_is_imported(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_method.py").write_text(GUARD)
    main(["run", "--import", "my_method.py", *TINY, "--method", "lora(rank=2) + of_mine", "--out", "run", "--quiet"])
    main(["list", "methods", "of_mine", "--import", "my_method.py"])
    assert "Nothing." in capsys.readouterr().out
    assert os.environ[OWN_METHODS] == str(here / "my_method.py")  # so that processes of a grid know it


def test_what_an_own_method_learnt_names_the_way_to_bring_its_file(
    here: Path, perdure: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_method.py").write_text(GUARD)
    main(["run", "--import", "my_method.py", *TINY, "--method", "lora(rank=2) + of_mine", "--out", "run", "--quiet"])
    Image.new("RGB", (8, 8)).save("cat.png")
    monkeypatch.setenv(OWN_METHODS, "")
    METHODS.pop("of_mine")
    for command in (["predict", "run", "cat.png"], ["resume", "run"]):
        without = perdure(*command)
        assert without.code == 2
        assert "run was learnt with 'of_mine', which is no method of perdure" in without.err
        assert "--import FILE.py" in without.err
        nowhere = perdure(*command, "--import", "your_method.py")
        assert nowhere.err == "perdure: --import your_method.py: expected a Python file, such as my_method.py\n"
    assert perdure("show", "run").code == 0  # which reads no method, but a file that is not there is a mistake
    assert perdure("show", "run", "--import", "your_method.py").code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "expected a Python file"), ("1 +", "cannot be imported: SyntaxError"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_file_that_cannot_be_imported_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], text: Any, message: str
) -> None:
    if text:
        (here / "my_method.py").write_text(text)
    with pytest.raises(SystemExit):
        main(["run", "--import", "my_method.py", *TINY, "--method", "of_mine", "--out", "run"])
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--completion", shell])
    script = capsys.readouterr().out
    for word in ("perdure", "compare", "--batch-size", "predict"):
        assert word in script


def test_a_learner_that_passed_once_is_measured_on_all_of_it_and_learns_on(perdure: Any, photos: Any) -> None:
    stream = "synthetic(tasks=2, per_class=6, test_per_class=3)"
    small = ("--backbone", "tiny()", "--batch-size", "8", "--precision", "fp32")
    made = perdure(
        "run", "--stream", stream, "--online", "--method", "lora(rank=2)", *small, "--out", "passed", "--json"
    )
    assert made.code == 0, made
    [row] = [row for row in perdure("eval", "passed", "--json").events if row["metric"] == "accuracy"]
    assert row["value"] == json.loads(Path("passed/summary.json").read_text())["matrix"][-1][0]
    photos("january", "cat dog", 6)
    assert perdure("learn", "january", "--into", "passed").code == 0
    assert len([row for row in perdure("eval", "passed", "--json").events if row["metric"] == "accuracy"]) == 2
    for asked in ("show", "report", "resume"):
        assert perdure(asked, "passed").code == 0
