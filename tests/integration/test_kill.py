"""Runs that are killed again and again, and runs that are asked to stop, end as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure import cli
from perdure.checkpoint import locked, whole
from perdure.run import resume, run
from perdure.train import Quiet
from perdure.types import Row, Task

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # forked on purpose: it spares each child the imports, and the child computes on one thread
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
KILLS = 10  # for each of two methods


class Slow(Quiet):
    """Lingers in every step, so that kills hit training as well as saving and evaluation."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        time.sleep(0.005)

    def scores(self, task: Task, rows: list[Row]) -> None:
        time.sleep(0.01)


def go_on(lab: Any, method: str, out: Path) -> None:
    """The body of a child process: start the run, or go on with it."""
    if (out / "run.json").exists():
        resume(out, Slow())
    else:
        run(lab.config(method, save_every=1), out, Slow())


def command(arguments: list[str], said: Path) -> None:
    """The body of a child process: the command line, with what it says in a file."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    cli.main(arguments)


def fork(target: Any, *arguments: Any) -> Any:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


@pytest.mark.parametrize("method", ["inflora(rank=2) + replay(size=8)", "finetune + ewc(samples=8)"])
def test_run_killed_at_random_moments_equals_unbroken_run(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    bench, moments = lab.but(epochs=3), random.Random(5)
    start = time.perf_counter()
    unbroken = fork(go_on, bench, method, tmp_path / "unbroken")
    unbroken.join(60)
    assert unbroken.exitcode == 0
    took = time.perf_counter() - start

    broken, killed = tmp_path / "broken", 0
    while killed < KILLS:
        child = fork(go_on, bench, method, broken)
        child.join(moments.uniform(0.01, took / 4))
        if child.exitcode == 0:
            break
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= KILLS / 2
    last = fork(go_on, bench, method, broken)
    last.join(60)
    assert last.exitcode == 0
    assert content_of(broken) == content_of(tmp_path / "unbroken")


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(
    asked: signal.Signals, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    bench, out, said = lab.but(epochs=10, tasks=2), tmp_path / "out", tmp_path / "said"
    options = bench.config("lora(rank=2)", save_every=1).describe()
    flags = [f for k, v in options.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    child = fork(command, ["run", *flags, "--out", str(out)], said)
    deadline = time.monotonic() + 60
    while not list(out.glob("task-*/step-00000[3-9]/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child.pid, asked)
    child.join(60)
    text = " ".join(said.read_text().split())
    assert child.exitcode == 130, text
    assert "all is saved" in text
    assert "perdure resume" in text
    assert len(list(out.glob("task-000/step-*/manifest.json"))) == 1
    assert whole(out) == []

    resume(out)
    run(bench.config("lora(rank=2)", save_every=1), tmp_path / "unbroken")
    assert content_of(out) == content_of(tmp_path / "unbroken")


def test_a_second_process_on_the_same_folder_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.run("ncm", tmp_path / "out")
    with locked(tmp_path / "out"):
        child = fork(command, ["resume", str(tmp_path / "out")], tmp_path / "said")
        child.join(60)
    text = " ".join((tmp_path / "said").read_text().split())
    assert child.exitcode == 2, text
    assert "another process is working in" in text
