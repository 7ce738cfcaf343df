"""Training step of prompt methods with queries recorded once a task, against queries in every step, and plain LoRA.

    python benchmarks/prompts.py l2p 'prompt(deep=True)' --batch-size 32

Prompts are chosen by what the pre-trained encoder makes of an image, which costs a second forward pass in every step
unless it is kept; it is where a task has more than one epoch. Ratios are of steps of the loop itself, in turns.
"""

import argparse
import dataclasses

import torch

from perdure.core.method import parts_of
from perdure.experiments.step_cost import PLAIN, TimedLearner, ratio
from perdure.training.config import RunConfig
from perdure.training.runtime import Runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["l2p", "prompt", "prompt(deep=True)"])
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    runtime = Runtime("cpu", options.precision, "eager", torch.get_num_threads())
    recording = RunConfig(
        stream="synthetic(tasks=2, per_class=8)",
        backbone=options.backbone,
        method=PLAIN,
        epochs=2,
        batch_size=options.batch_size,
    )
    plain = TimedLearner(recording, runtime)
    print("| method | queries recorded / lora | in every step / lora | every step / recorded |\n|---|---|---|---|")
    for method in options.methods:
        config = dataclasses.replace(recording, method=method)
        once = TimedLearner(config, runtime, stream=plain.stream)
        found = [ratio(once, plain)]
        if any(part.records for part in parts_of(once.learner.method)):
            always = TimedLearner(dataclasses.replace(config, epochs=1), runtime, stream=plain.stream)
            found += [ratio(always, plain), ratio(always, once)]
        cells = [f"{each['ratio']:.2f} ({each['between'][0]:.2f} to {each['between'][1]:.2f})" for each in found]
        print(f"| `{method}` | {' | '.join(cells + ['–'] * (3 - len(cells)))} |", flush=True)


if __name__ == "__main__":
    main()
