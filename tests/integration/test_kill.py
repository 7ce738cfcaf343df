"""Runs that are killed again and again, and runs that are asked to stop, end as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure import cli
from perdure.checkpoint import locked
from perdure.run import resume, run
from perdure.train import Quiet
from perdure.types import Row, Task

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else multiprocessing
KILLS = 20


class Beats(Quiet):
    """Sleeps in every step, so that a kill hits training as well as saving and evaluation."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        time.sleep(0.01)

    def scores(self, task: Task, rows: list[Row]) -> None:
        time.sleep(0.02)


def go_on(lab: Any, method: str, out: Path) -> None:
    """The body of a child process: start the run, or go on with it."""
    torch.set_num_threads(1)
    if (out / "run.json").exists():
        resume(out, Beats())
    else:
        run(lab.config(method, save_every=1), out, Beats())


def spawn(target: Any, *args: Any) -> Any:
    child = FORK.Process(target=target, args=args)
    # a process that has used threads is forked on purpose: it spares the import, and the child uses one
    child.start()
    return child


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["inflora(rank=2) + replay(size=8)", "finetune + ewc(samples=8)"])
def test_run_killed_at_random_moments_equals_unbroken_run(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    bench = lab.but(tasks=4, epochs=3)
    start = time.perf_counter()
    whole = spawn(go_on, bench, method, tmp_path / "whole")
    whole.join(60)
    assert whole.exitcode == 0
    took = time.perf_counter() - start
    broken, moments, killed = tmp_path / "broken", random.Random(5), 0
    for _ in range(10 * KILLS):
        child = spawn(go_on, bench, method, broken)
        # at first a child hardly gets anywhere: the moments are spread over all of the run
        child.join(moments.uniform(0.05, 0.05 + 4 * took / KILLS) if killed < KILLS // 2 else 60)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join(60)
            killed += 1
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert killed >= KILLS // 4
    assert content_of(broken) == content_of(tmp_path / "whole")
