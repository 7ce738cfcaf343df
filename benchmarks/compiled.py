"""A training step with compiled vision blocks (`--compile`) against a plain one, in turns in one process.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --device cuda --backbone 'clip(path="openai/clip-vit-base-patch16")' --precision bf16

On a CPU its own seconds are compared, which nothing else on the machine changes; on a GPU the clock's, once it is done.
Ratios below 1 are faster; medians over turns. Seconds of the first compiled step are what compiling takes.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch

from perdure.core.compiling import compiled
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.building import build_learner
from perdure.training.config import RunConfig

METHODS = ("lora(rank=10)", "inflora(rank=10)", "finetune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)

    def now() -> float:
        if options.device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    print("| method | seconds of a step | compiled | ratio | compiling |\n|---|---|---|---|---|")
    stream = f"synthetic(tasks=1, classes_per_task=8, per_class={options.batch_size // 8}, test_per_class=1)"
    for method in options.methods:
        config = RunConfig(
            stream=stream,
            backbone=options.backbone,
            method=method,
            device=options.device,
            precision=options.precision,
            attention="sdpa",
        )
        learner, _ = build_learner(Core, config)
        task = build_stream(stream, learner.backbone.preprocess, 0).tasks[0]
        learner.grow(task)
        learner.train()
        learner.prepare()
        learner.method.begin_task(learner, task)
        batch = next(learner.batches(task.train, options.batch_size))

        def step(faster: bool, learner: Core = learner, batch: dict[str, torch.Tensor] = batch) -> float:
            begun = now()
            learner.zero_grad()
            with compiled(learner.backbone) if faster else nullcontext():
                learner.loss(batch).backward()
            return now() - begun

        step(False)
        since = time.perf_counter()
        step(True)
        compiling = time.perf_counter() - since
        turns = [(step(False), step(True)) for _ in range(options.turns)]
        plain, faster = (statistics.median(each) for each in zip(*turns, strict=True))
        ratio = statistics.median(mine / theirs for theirs, mine in turns)
        print(f"| `{method}` | {plain:.4f} | {faster:.4f} | {ratio:.2f} | {compiling:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
