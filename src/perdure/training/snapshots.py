"""Snapshots within a task, and how a run is stopped."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from perdure.core import checkpoint
from perdure.core.learner import Core
from perdure.core.processes import Processes
from perdure.formatting import command
from perdure.training.launch import launched_by_us
from perdure.training.loop import check_finite
from perdure.training.online import Along
from perdure.types import Row


class Interrupted(Exception):
    """The user asked to stop; everything done so far is saved."""


def check_there(out: Path) -> None:
    """Refuse to go on with a run whose folder is gone.

    Raises:
        ValueError: when it is.
    """
    if not (out / "run.json").exists():
        raise ValueError(
            f"{out} is gone or has lost its run.json, and with it what was learnt: start anew, in a folder that stays"
        )


class Saver:
    """Snapshots within a task: every so many steps, or as often as costs at most a fiftieth of the time.

    What a snapshot costs is known from the last one, also of the task before; the first is taken for a tenth of a
    second. So tasks of a few steps, which are saved when they end, do without.
    """

    def __init__(self, every: int, out: Path, learner: Core, stopped: Callable[[], bool]) -> None:
        self.every, self.out, self.learner, self.stopped = every, out, learner, stopped
        self.took = 0.1

    def begin(self, rows: list[Row], along: Along | None = None) -> None:
        """A task begins, before which `rows` were measured; what is measured `along` it is added to them."""
        self.rows, self.along, self.saved = rows, along, time.perf_counter()

    def __call__(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """A step is done; raises `Interrupted` once all is saved that a run which is to stop has learnt."""
        check_there(self.out)  # rather than train to the end for nothing
        if self.along:
            self.rows.extend(self.along(step))
        stopped, now = self.stopped(), time.perf_counter()
        due = step % self.every == 0 if self.every else now - self.saved > 50 * self.took
        if not (due or stopped):
            return
        check_finite(self.learner, self.learner.task)
        if self.learner.processes.first:
            checkpoint.save_step(self.out, self.learner, step, optimizer, self.rows)
        self.saved = time.perf_counter()
        self.took = self.saved - now
        if stopped:
            self.stop(f"after step {step} of task {self.learner.task.number}, all is saved")

    def pause(self) -> None:
        """A batch is encoded, and no step was taken since the task began or was resumed; may raise `Interrupted`."""
        if self.learner.processes.world == 1 and self.stopped():  # several have not the same number of batches
            self.stop(f"while task {self.learner.task.number} was encoded, before a step of it")

    def stop(self, where: str) -> NoReturn:
        """Say what is left to do."""
        raise interrupted(where, self.out, self.learner.processes)


def interrupted(where: str, out: Path, processes: Processes) -> Interrupted:
    """What to raise once a run in `out` has stopped there, with the command that goes on to the same numbers."""
    ours = processes.world > 1 and launched_by_us()  # another launcher is to start it
    there = ["--processes", processes.world] if ours else []
    return Interrupted(f"stopped {where}; go on with {command('resume', out, *there)}")


@contextmanager
def interruptible(processes: Processes) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM finish the step instead of breaking it; a second SIGINT breaks.

    Of several processes all stop at the same step, when any of them was asked; a launcher passes on what a terminal has
    sent to each already, so that a second signal says nothing new.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: processes.any(False)
        return

    def ask(number: int, _frame: object) -> None:
        if asked and number == signal.SIGINT and processes.world == 1:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: processes.any(bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
