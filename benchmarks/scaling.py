"""What several processes are worth, in one run or in a grid, and what following a run costs.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 8 --backbone 'clip(path="openai/clip-vit-base-patch16")' --device cuda
    python benchmarks/scaling.py grid
    python benchmarks/scaling.py tracking
    python benchmarks/scaling.py warm

The first: images a second of one process and of several that learn together, a batch of the same size, in turns.
Speed-up is images a second of all over those of one, and as much as there are processes at best. Seconds of the
processor, which what else the machine does cannot change, say how much more all compute together: 1 is nothing.

`grid`: the clock's time of a grid of 12 cells of one thread each with as many jobs as `--processes`, start of Ray
included, over that of the same cells one after another in this process. The machine must have nothing else to do.

`tracking`: the processor's seconds of a step, and of a whole run, with `--track tensorboard` over those without.

`warm`: from the end of a cell in a worker of Ray to the end of the next one's first step there, by the clock and by the
processor's seconds.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perdure.core.learner import Core
from perdure.core.processes import Processes
from perdure.experiments.cluster import Cluster, run_beside
from perdure.experiments.grid import cells, compare
from perdure.reporting.tracking import tracked
from perdure.streams import build_stream
from perdure.training.building import build_learner
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet, fit_task
from perdure.training.run import run
from perdure.training.runtime import joined, shard
from perdure.types import Task

METHODS = ("lora(rank=10)", "inflora(rank=10)")


def seconds(config: RunConfig, processes: Processes, there: Processes) -> tuple[float, float, float]:
    """Of a task's steps the clock's seconds, the processor's of all that learn, and the most bytes held on a GPU."""
    learner, _ = build_learner(Core, config, None, there)
    learner.processes = processes
    if config.shard != "none" and processes.world > 1:
        shard(learner)
    if learner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tasks = build_stream(config.stream, learner.backbone.preprocess, 0).tasks
    learner.grow(Task.described(tasks[0].describe()))
    learner.tasks[0] = tasks[0]
    there.wait()
    before = time.process_time()
    train = fit_task(learner, tasks[0], config).train
    used = torch.tensor(time.process_time() - before, dtype=torch.float64)
    held = torch.cuda.max_memory_allocated() if learner.device.type == "cuda" else 0
    return train, float(processes.sum(used)), float(held)


def measured(options: argparse.Namespace) -> None:
    with joined(options.device) as processes:
        for method in options.methods:
            config = RunConfig(
                stream=options.stream,
                backbone=options.backbone,
                method=method,
                batch_size=options.batch_size,
                epochs=options.epochs,
                device=options.device,
                precision="fp32" if options.device == "cpu" else "auto",
                attention="sdpa",
                accumulate=options.accumulate,
                shard=options.shard,
            )
            alone, together = [], []
            for turn in range(options.turns + 1):
                if processes.first:
                    one = seconds(config, Processes(), processes)
                else:
                    processes.wait()
                processes.wait()
                both = seconds(config, processes, processes)
                if turn and processes.first:  # the first warms up
                    alone.append(one)
                    together.append(both)
            if processes.first:
                wall, cpu, held = (
                    [statistics.median(each[i] for each in found) for found in (alone, together)] for i in range(3)
                )
                steps = options.epochs * math.ceil(options.images / options.batch_size)
                print(
                    f"| `{method}` | {steps / wall[0]:.2f} | {steps / wall[1]:.2f} | {wall[0] / wall[1]:.2f} of "
                    f"{processes.world} | {cpu[1] / cpu[0]:.2f} | {held[0] / 1e9:.2f} | {held[1] / 1e9:.2f} |",
                    flush=True,
                )


class Timed(Quiet):
    """Adds up the processor's seconds of all steps but each task's first, and calls `begun` after a run's first."""

    def __init__(self, begun: Callable[[], None] | None = None) -> None:
        self.begun, self.steps, self.took, self.since = begun, 0, 0.0, 0.0

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        """A step ended."""
        now = time.process_time()
        if self.begun:
            self.begun()
            self.begun = None
        if step > 1:
            self.took += now - self.since
            self.steps += 1
        self.since = now


def configured(options: argparse.Namespace) -> RunConfig:
    return RunConfig(
        stream=f"synthetic(tasks=3, classes_per_task=10, per_class={options.images // 10}, test_per_class=2)",
        backbone=options.backbone,
        batch_size=options.batch_size,
        epochs=options.epochs,
        precision="fp32",
        attention="sdpa",
        device="cpu",
    )


def grid(options: argparse.Namespace) -> None:
    config, found = configured(options), []
    for name, cluster in (("one after another", None), ("beside each other", Cluster(jobs=options.processes))):
        with tempfile.TemporaryDirectory() as folder:
            twelve = cells(options.methods, range(12 // len(options.methods)), Path(folder))
            since = time.perf_counter()
            compare(config, twelve, Path(folder), steps=False, cluster=cluster)
            found.append(time.perf_counter() - since)
            print(f"{len(twelve)} cells {name}: {found[-1]:.1f} s", flush=True)
    print(f"with {options.processes} jobs {found[1] / found[0]:.2f} of the time of one after another")


def tracking(options: argparse.Namespace) -> None:
    print("| method | ms of a step | followed | ratio | of a whole run |\n|---|---|---|---|---|")
    for method in options.methods:
        config, found = replace(configured(options), method=method), []
        for _ in range(options.turns + 1):
            pair = []
            for names in ("", "tensorboard"):
                with tempfile.TemporaryDirectory() as folder:
                    timed, since = Timed(), time.process_time()
                    with tracked(timed, names, Path(folder)) if names else nullcontext(timed) as progress:
                        run(config, Path(folder), progress)
                    pair.append((timed.took / timed.steps, time.process_time() - since))
            found.append(pair)
        found = found[1:]  # the first warms up
        plain, followed = (1e3 * statistics.median(pair[i][0] for pair in found) for i in range(2))
        ratio, whole = (statistics.median(pair[1][i] / pair[0][i] for pair in found) for i in range(2))
        print(f"| `{method}` | {plain:.2f} | {followed:.2f} | {ratio:.3f} | {whole:.3f} |", flush=True)


def cell(config: RunConfig, folder: Path, tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Runs in a worker."""

    def say(event: str) -> None:
        tell(event, {"worker": os.getpid(), "clock": time.time(), "processor": time.process_time()})

    say("called")
    run(config, folder, Timed(lambda: say("begun")))
    say("ended")


def warm(options: argparse.Namespace) -> None:
    config, last, gaps = configured(options), dict[int, dict[str, Any]](), list[tuple[float, float]]()

    def told(_: int, event: str, facts: dict[str, Any]) -> None:
        if event == "ended":
            last[facts["worker"]] = facts
        elif event == "begun" and (before := last.get(facts["worker"])):
            gaps.append((facts["clock"] - before["clock"], facts["processor"] - before["processor"]))

    with tempfile.TemporaryDirectory() as folder:
        calls = [
            (cell, {"config": replace(config, method=method, seed=turn), "folder": Path(folder) / f"{method} {turn}"})
            for turn in range(options.turns + 1)
            for method in options.methods
        ]
        run_beside(Cluster(jobs=2), calls, told)
    clock, processor = (statistics.median(each) for each in zip(*gaps, strict=True))
    print(f"{len(gaps)} cells on warm workers: first step after {clock:.2f} s, {processor:.2f} s of the processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("steps", "grid", "tracking", "warm"), default="steps")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--shard", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.stream = f"synthetic(tasks=1, classes_per_task=10, per_class={options.images // 10}, test_per_class=1)"
    if options.what != "steps":
        torch.set_num_threads(1)
        {"grid": grid, "tracking": tracking, "warm": warm}[options.what](options)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        measured(options)
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = "method", "steps/s of 1", "steps/s of all", "speed-up", "processor of all to 1", "GB of 1", "GB of each"
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    config = LaunchConfig(
        1, 1, options.processes, run_id="scaling", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    elastic_launch(config, sys.executable)(*sys.argv)


if __name__ == "__main__":
    main()
