"""A run in several processes that are stopped, killed or left alone goes on, and ends as if nothing had happened."""

import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.training.config import flags

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
PATIENCE = 60  # seconds within which all must have ended
METHOD = "inflora(rank=2) + replay(size=8)"


class Started:
    """A command in two processes, and what it says."""

    def __init__(self, words: list[str], out: Path, said: Path) -> None:
        self.out, self.said = out, said
        with said.open("w") as file:
            command = [sys.executable, "-m", "perdure", *words, "--processes", "2"]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def workers(self) -> list[psutil.Process]:
        """The processes that learn, the first one first."""
        found: dict[str, psutil.Process] = {}
        for each in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has ended since; torch asks a few programs what machine it is
                if rank := each.environ().get("RANK"):
                    found[rank] = each
        return [found[rank] for rank in sorted(found)]

    def end(self, seconds: float = PATIENCE) -> int:
        """Exit code, once the launcher and all that it has started have ended."""
        return self.process.wait(seconds)

    def text(self) -> str:
        return " ".join(self.said.read_text().split())


@pytest.fixture
def start(lab: Any, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start a run in a folder, or go on with it; whatever is left at the end is ended."""
    options = lab.but(epochs=60, tasks=2).config(METHOD, save_every=1).describe()
    all_of_them: list[Started] = []

    def started(out: Path) -> Started:
        begun = (out / "run.json").exists()
        words = ["resume", str(out)] if begun else ["run", *flags(options), "--out", str(out)]
        all_of_them.append(Started(words, out, tmp_path / f"said {len(all_of_them)}"))
        return all_of_them[-1]

    yield started
    for each in all_of_them:
        if each.process.poll() is None:
            for worker in psutil.Process(each.process.pid).children():
                worker.kill()
            each.process.kill()
            each.process.wait()


def reach(out: Path, each: Started, step: int) -> None:
    """Wait until a run has taken so many steps of its first task, or has ended."""
    begun = [out / "task-000" / f"step-{number:06d}" for number in range(step, 200)]
    while each.process.poll() is None and not any(path.exists() for path in begun):
        time.sleep(0.01)


def kill_a_worker(of: Started) -> None:
    """All end soon and say in one line which it was, and what goes on."""
    of.workers()[1].kill()
    since = time.monotonic()
    assert of.end() == 1, of.text()
    assert time.monotonic() - since < PATIENCE
    assert of.text().count("perdure:") == 1, of.text()
    assert "process 1 of 2 was killed by SIGKILL" in of.text()
    assert f"perdure resume {of.out} --processes 2" in of.text()


def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_leaves_nothing(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aside").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "aside"))
    begun = start(tmp_path / "out")
    reach(tmp_path / "out", begun, 3)
    kill_a_worker(begun)
    left = [path.name for path in (tmp_path / "aside").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []  # which torch keeps on purpose


def test_processes_that_are_stopped_before_they_learn_say_so_in_one_line(start: Any, tmp_path: Path) -> None:
    asked = start(tmp_path / "out")
    while not asked.workers() and asked.process.poll() is None:
        time.sleep(0.01)
    asked.process.send_signal(signal.SIGTERM)  # modules are imported then
    assert asked.end() == 130, asked.text()
    assert asked.text().count("perdure: stopped") == 1, asked.text()


LOST = """
import os, signal, sys
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
real = subprocess_handler.SubprocessHandler.__init__
def begun(self, *given, **how):
    real(self, *given, **how)
    os.kill(os.getpid(), signal.SIGTERM)  # it runs, and torch has not noted it
subprocess_handler.SubprocessHandler.__init__ = begun
from perdure.__main__ import main
main()
"""


def test_a_process_that_was_started_as_the_signal_came_is_ended_too(lab: Any, tmp_path: Path) -> None:
    words = ["run", *flags(lab.config(METHOD).describe()), "--out", str(tmp_path / "out"), "--processes", "2"]
    (tmp_path / "aside").mkdir()
    aside = os.environ | {"TMPDIR": str(tmp_path / "aside")}
    with (tmp_path / "said").open("w") as said:  # no pipe, which what is lost would hold open
        code = subprocess.run([sys.executable, "-c", LOST, *words], check=False, stderr=said, env=aside).returncode
    assert code == 130
    assert (tmp_path / "said").read_text().count("perdure: stopped") == 1
    assert not any((tmp_path / "aside").glob("perdure-*"))
    assert [each.pid for each in psutil.process_iter() if str(tmp_path / "aside") in _environment(each)] == []


def _environment(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.environ())
    return ""


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_killed_end_as_if_nothing_had_happened(
    start: Any, content_of: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = start(out)
    reach(out, asked, 3)
    asked.process.send_signal(signal.SIGTERM)
    assert asked.end() == 130, asked.text()
    assert asked.text().count("perdure:") == 1
    assert "all is saved" in asked.text()
    assert f"perdure resume {out} --processes 2" in asked.text()
    stopped = next(out.glob("task-000/step-*"))

    killed = start(out)
    while not [p for p in out.glob("task-000/step-*") if p != stopped] and killed.process.poll() is None:
        time.sleep(0.01)
    kill_a_worker(killed)

    assert start(out).end(200) == 0
    assert start(tmp_path / "unbroken").end(200) == 0
    assert content_of(out) == content_of(tmp_path / "unbroken")


def place(out: Path) -> tuple[int, float]:
    """(task, step) up to which all is saved; the step of a task that is done is infinite."""
    steps = [(path.parts[-3], int(path.parts[-2][-6:])) for path in out.glob("task-*/step-*/manifest.json")]
    done = [(path.parts[-2], math.inf) for path in out.glob("task-*/manifest.json")]
    return max(((int(task[-3:]), step) for task, step in steps + done), default=(-1, 0))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_kills_of_any_process_lose_nothing(start: Any, content_of: Any, tmp_path: Path) -> None:
    out, draw, kills = tmp_path / "out", random.Random(7), 0
    while kills < 10:
        before, running = place(out), start(out)
        while not running.workers() and running.process.poll() is None:
            time.sleep(0.01)
        # two of three once it learns, at any moment of a few steps; the others while it starts
        learns = draw.random() < 2 / 3
        while learns and place(out) == before and running.process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        if running.process.poll() is not None:
            assert running.process.returncode == 0, running.text()
            shutil.rmtree(out)  # it came to its end: from the start again
            continue
        family = [psutil.Process(running.process.pid), *running.workers()]
        saved = place(out)
        draw.choice(family).kill()
        kills += 1
        _, alive = psutil.wait_procs(family, PATIENCE)
        assert alive == [], f"kill {kills}: {running.text()}"
        assert place(out) >= saved
    assert start(out).end(1200) == 0
    assert start(tmp_path / "unbroken").end(1200) == 0
    assert content_of(out) == content_of(tmp_path / "unbroken")
