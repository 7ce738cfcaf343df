"""What computes nothing waits for nothing: help, lists, mistakes, advice. (Its flag `--from` is a word of Python.)"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import perdure as package
from perdure.backbones import BACKBONES
from perdure.cli import catalogue
from perdure.cli.catalogue import described, entries
from perdure.cli.commands import COMMANDS
from perdure.cli.suggestions import command_of
from perdure.core.method import METHODS, Method
from perdure.options.ranges import Rank
from perdure.streams import STREAMS
from perdure.training.config import register

SLOW = "torch torchvision timm transformers open_clip datasets accelerate pyarrow scipy jinja2 safetensors numpy PIL"
IN_PROCESS = """
import sys
from perdure.cli.main import main
for words in {commands!r}:
    try:
        main(words)
    except SystemExit:
        pass
    for name in {names!r}.split():
        if name in sys.modules:
            sys.exit(f"{{words}} imports {{name}}")
"""


def imports_none(of: str, *commands: list[str], cwd: Path | None = None) -> str:
    """What the commands say in a process of their own, which imports none of these."""
    code = IN_PROCESS.format(commands=commands, names=of)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_computes_nothing_imports_nothing_that_takes_seconds() -> None:
    kinds = ("methods", "streams", "backbones", "recipes")
    imports_none(
        SLOW,
        *(["--version"], ["--help"], [], ["rnu"], ["run", "--methd", "x"], ["run", "--recipe", "demoo"]),
        *([name, "--help"] for name in COMMANDS),
        *(["list", kind] for kind in kinds),
        *(["list", *words] for words in (["methods", "lora"], ["streams", "images"], ["methods", "loar"], ["method"])),
        ["advise", "--tasks", "20", "--json"],
    )
    # which tyro imports to look at defaults of unions, and which takes a seventh of the time of a list
    imports_none("typeguard", *(["list", kind] for kind in kinds))


def test_another_process_answers_alike_and_imports_packages_of_others_only_when_they_are_named(
    perdure: Any, small: Any, photos: Any, tmp_path: Path
) -> None:
    assert perdure("run", *small, "--out", "x").code == 0
    photos("new", "cat")
    others = "torchvision timm transformers open_clip datasets scipy jinja2"
    asked = ["predict", "x", "new/cat/00.png"], ["eval", "x"]
    assert imports_none(others, *asked, cwd=tmp_path) == "".join(perdure(*words).out for words in asked)


@pytest.mark.parametrize("kind", ["methods", "streams", "backbones"])
def test_what_is_read_from_the_sources_is_what_the_code_has(kind: Any) -> None:
    register()
    made: dict[str, Any] = {"methods": METHODS, "streams": STREAMS, "backbones": BACKBONES}[kind]
    ours = {name: each for name, each in made.items() if each.__module__.startswith("perdure.")}
    read = entries(kind)
    assert {name: replace(each, lr="") for name, each in read.items()} == {
        name: described(each) for name, each in ours.items()
    }
    assert all(bool(each.lr) == (kind == "methods") for each in read.values())


def test_methods_of_third_parties_are_listed(perdure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(Method, name="theirs"):
        """A method that another package brings."""

        def __init__(self, rank: Rank = 3) -> None:
            super().__init__()

    monkeypatch.setattr(catalogue, "entry_points", lambda group: [group])
    try:
        assert perdure("list", "methods", "theirs").out.startswith("theirs(rank=3)\n  rank: int from 1 to 4096\n")
    finally:
        del METHODS["theirs"]


def test_public_names_are_there_and_others_are_not() -> None:
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert not hasattr(package, "Lerner")


def test_advice_from_a_folder_is_asked_for_with_from(perdure: Any, small: Any) -> None:
    asked = command_of(["advise", "--from", "runs/cmp", "--no-old-data"], COMMANDS)
    assert (asked.from_, asked.old_data) == (Path("runs/cmp"), False)
    assert perdure("advise", "--frm", "x").err.startswith(
        "perdure: 'perdure advise' has no option --frm; did you mean '--from'?"
    )
    perdure("run", *small, "--method", "probe", "--out", "one")
    assert "1   " in perdure("advise", "--from", ".").out
    assert perdure("advise", "--from", "nowhere").err.startswith("perdure: no finished run in nowhere")
