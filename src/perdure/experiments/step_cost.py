"""What a training step costs, as a multiple of plain LoRA's: both learn a stream in turns, within one process.

Turns, because whatever else the machine does then meets both alike; a task after the first, because penalties, memories
and projections begin there; the loop itself, because what is measured is what a run does. What happens once a task
(moments, statistics, features of a frozen encoder) is no part of a step; a run's seconds contain it.
"""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from perdure.core import checkpoint
from perdure.core.learner import Core
from perdure.options.spec import parse_one
from perdure.reporting.runs import STEPS, steps_of
from perdure.storage.schema import Cost
from perdure.training.building import build_learner
from perdure.training.config import RunConfig, make_stream
from perdure.training.loop import Quiet, fit_task
from perdure.training.runtime import Runtime
from perdure.types import Batch, Data, Stream

PLAIN, SPEAKING = "lora", "lora(tower='language')"
"""The methods that all are measured against: of encoders, and of language models."""
TURN = 4
"""Steps of one turn, after a first one that is not counted: it makes the optimizer's state."""
_LEAST, _MOST, _SECONDS = 3, 8, 8.0  # turns of each, and how long their steps may take
_DECIDE = ("stream", "backbone", "objective", "augment", "batch_size", "optimizer")


class StepProgress(Protocol):
    """Who is told of the measurement."""

    def step_cost(self, number: int, total: int, method: str) -> None:
        """Method number `number` (from 0) of `total` is measured."""


class TimedLearner:
    """A learner on its way through a stream that was cut to a few images a task.

    Args:
        config: of the run; `epochs` above 1 keep what constant blocks at the bottom give, as in training.
        runtime: how to compute.
        tasks: how many to learn; steps are taken in the last one, which is never ended.
        stream: what `config` names, when that has been read already.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, tasks: int = 2, stream: Stream | None = None) -> None:
        self.learner, _ = build_learner(Core, config, runtime)
        self.stream = stream or make_stream(config, self.learner.backbone.preprocess)
        self.learner.scenario = self.stream.scenario
        self.config, self.begun = config, False
        # One thread's own time leaves out what other processes take; threads and devices only show in wall time.
        alone = (runtime.device, runtime.threads) == ("cpu", 1)
        self.now = time.process_time if alone else time.perf_counter
        count = (TURN + 1) * config.batch_size
        few = [dataclasses.replace(each, train=_Few(each.train, count)) for each in self.stream.tasks[:tasks]]
        for task in few:
            self.learner.grow(task)
            if task is not few[-1]:
                fit_task(self.learner, task, config.but(epochs=1, schedule="constant"))

    def turn(self) -> list[float]:
        """Seconds of a few steps; empty for a method that trains nothing by steps."""
        clock = _Clock(self.now)
        config = self.config.but(epochs=min(self.config.epochs, 2), schedule="constant")
        resumed = (0, _as_it_is) if self.begun else None
        with contextlib.suppress(_Enough):
            fit_task(self.learner, self.learner.task, config, clock, resumed=resumed)
        self.begun = True
        return [after - before for before, after in itertools.pairwise(clock.ticks)]


def ratio(one: TimedLearner, plain: TimedLearner) -> dict[str, Any]:
    """The median step of `one` over that of `plain`, as the median over turns; a first turn of each is not counted.

    Returns:
        `ratio`, the quartiles over turns that it lies `between`, `milliseconds`, `plain_milliseconds` and `steps` (of
        each); `ratio` None and `why` without steps.
    """
    if not one.turn():
        return {"ratio": None, "why": "no steps"}
    plain.turn()
    turns: list[tuple[float, float]] = []
    spent = 0.0
    while len(turns) < _LEAST or (len(turns) < _MOST and spent < _SECONDS):
        mine, theirs = one.turn(), plain.turn()
        turns.append((statistics.median(mine), statistics.median(theirs)))
        spent += sum(mine) + sum(theirs)
    low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4, method="inclusive")
    return {
        "ratio": round(middle, 3),
        "between": [round(low, 3), round(high, 3)],
        "milliseconds": round(1000 * statistics.median(a for a, _ in turns), 2),
        "plain_milliseconds": round(1000 * statistics.median(b for _, b in turns), 2),
        "steps": TURN * len(turns),
    }


def measure_steps(
    config: RunConfig, methods: Sequence[str], runtime: Runtime, out: Path, progress: StepProgress | None = None
) -> None:
    """Measure what `out`/steps.json does not have yet; it is written after each method.

    A method that cannot be measured gets a `ratio` of None and a `why`; its run has succeeded or told the reason.

    Args:
        config: of the grid; its method is replaced.
        methods: of the grid.
        runtime: how the grid computes.
        out: the grid's folder.
        progress: who is told.
    """
    options = {name: getattr(config, name) for name in _DECIDE} | runtime.describe()
    options |= {} if plain_of(config) == PLAIN else {"plain": plain_of(config)}
    written = steps_of(out)
    known = written["methods"] if written["options"] == options else {}
    plain: TimedLearner | None = None
    for number, method in enumerate(methods):
        if method in known:
            continue
        if progress:
            progress.step_cost(number, len(methods), method)
        try:
            plain = plain or TimedLearner(dataclasses.replace(config, method=plain_of(config)), runtime)
            one = TimedLearner(dataclasses.replace(config, method=method), runtime, stream=plain.stream)
            found = ratio(one, plain)
        except ValueError as error:
            found = {"ratio": None, "why": str(error)}
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            found = {"ratio": None, "why": "out of memory beside plain LoRA"}
        known[method] = cast(Cost, found | ({"task": len(plain.learner.tasks)} if plain else {}))
        checkpoint.write_json(out / STEPS, {"options": options, "methods": known})


def plain_of(config: RunConfig) -> str:
    """The plain LoRA of a configuration's objective."""
    return SPEAKING if parse_one(config.objective).name == "generate" else PLAIN


class _Enough(Exception):
    """The turn is over."""


class _Clock(Quiet):
    """Takes the time after each step, and ends the turn."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ticks: list[float] = []

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """Reading the loss waits for the device."""
        float(loss)
        self.ticks.append(self.now())
        if len(self.ticks) > TURN:
            raise _Enough


class _Few:
    """`count` examples of a data set, evenly spread over it; repeated when it has fewer."""

    def __init__(self, data: Data, count: int) -> None:
        there = len(data)
        self.data = data
        self.places = torch.arange(count) * there // count if there >= count else torch.arange(count) % max(there, 1)
        self.labels = data.labels[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        return self.data.__getitems__(self.places[torch.as_tensor(positions)].tolist())


def _as_it_is(_: torch.optim.Optimizer) -> None:
    """The optimizer of a turn is new."""
