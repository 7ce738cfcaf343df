"""Images a second of one process and of several that learn together, a batch of the same size, in turns in one run.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 8 --backbone 'clip(path="openai/clip-vit-base-patch16")' --device cuda

Speed-up is images a second of all over those of one, and as much as there are processes at best. Seconds of the
processor, which what else the machine does cannot change, say how much more all compute together: 1 is nothing.
"""

import argparse
import math
import os
import statistics
import sys
import time

import torch

from perdure.core.learner import Core
from perdure.core.processes import Processes
from perdure.streams import build_stream
from perdure.training.config import RunConfig
from perdure.training.loop import fit_task
from perdure.training.run import build_learner
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
