"""First-time users: whole command lines, as the README and the pages it leads to have them, in an empty folder."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from perdure.cli.main import main

Shell = Callable[[str], str]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """`typed("perdure show my.learner")`: what the command writes; it must end without a mistake."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> str:
        words = shlex.split(line)
        assert words[0] == "perdure"
        code: Any = 0
        try:
            main(words[1:])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert not code, f"{line}\n{err}"
        return out

    return command


@pytest.fixture
def served(tmp_path: Path) -> Callable[[str], Any]:
    """Within `served("perdure app my.learner")` a process of its own answers at the address that it gives."""

    @contextmanager
    def running(line: str) -> Iterator[str]:
        pytest.importorskip("gradio", reason="the extra 'app' is not installed")
        command = [sys.executable, "-m", *shlex.split(line), "--port", "0", "--json"]
        with (tmp_path / "app.err").open("w") as errors:
            process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1", "no_proxy": "*"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout
            said = process.stdout.readline()
            assert said, (tmp_path / "app.err").read_text()
            yield json.loads(said)["address"]
        finally:
            process.terminate()
            process.communicate(timeout=60)

    return running
