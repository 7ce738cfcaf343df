"""Advice does not wait for torch, and its flag `--from` is a word of Python."""

import subprocess
import sys
from typing import Any

import perdure as package
from perdure.commands import COMMANDS
from perdure.mistakes import mistake


def test_advice_imports_neither_torch_nor_what_takes_as_long() -> None:
    code = (
        "import sys; from perdure.cli import main; main(['advise', '--tasks', '20', '--json'])\n"
        "sys.exit(sum(name.split('.')[0] in ('torch', 'transformers', 'timm') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_public_names_are_there_and_others_are_not() -> None:
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert not hasattr(package, "Lerner")


def test_advice_from_a_folder_is_asked_for_with_from(perdure: Any, small: Any) -> None:
    assert mistake(["advise", "--from", "runs/cmp", "--no-old-data"], COMMANDS) is None
    assert perdure("advise", "--frm", "x").err.startswith(
        "perdure: 'perdure advise' has no option --frm; did you mean '--from'?"
    )
    perdure("run", *small, "--method", "probe", "--out", "one")
    assert "1   " in perdure("advise", "--from", ".").out
    assert perdure("advise", "--from", "nowhere").err.startswith("perdure: no finished run in nowhere")
