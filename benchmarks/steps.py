"""Training step of methods against plain LoRA's, in their second task and after more, as ratios in one run.

    python benchmarks/steps.py
    python benchmarks/steps.py --stream 'cifar100(path="cifar-100", tasks=10)' --batch-size 32 --out runs/cifar

Each takes turns with plain LoRA in its second task, so that what else the machine does meets both alike; ratios are
medians over turns. With `--out`, the steps.json of a grid's folder is written, as `perdure compare` does, and only what
it lacks is measured.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from perdure.experiments.step_cost import TimedLearner, measure_steps, plain_of, ratio
from perdure.formatting import times
from perdure.training.config import RunConfig
from perdure.training.runtime import Runtime

METHODS = (
    "lora(at='qv')",
    "lora(at='qv', per_task=True)",
    "inflora(at='qv')",
    "o_lora(at='qv')",
    "c_lora(at='qv')",
    "route_lora",
    "sd_lora",
    "fm_lora(drs='fixed', prompts=0)",
    "fm_lora(drs='fixed')",
)
STREAM = "synthetic(tasks=10, classes_per_task=10, per_class=40)"


class Said:
    """What is being measured."""

    def step_cost(self, number: int, total: int, method: str) -> None:
        """A method begins."""
        print(f"{number + 1}/{total} {method}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--stream", default=STREAM)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--objective", default="classify()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--out", type=Path, help="folder of steps.json")
    options = parser.parse_args()
    config = RunConfig(
        stream=options.stream,
        backbone=options.backbone,
        objective=options.objective,
        batch_size=options.batch_size,
    )
    runtime = Runtime("cpu", options.precision, options.attention, torch.get_num_threads())
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        measure_steps(config, options.methods, runtime, options.out, Said())
        return
    plain = TimedLearner(replace(config, method=plain_of(config)), runtime)
    print(f"| method | {' | '.join(f'task {n}' for n in options.tasks)} |")
    print("|---" * (len(options.tasks) + 1) + "|")
    for method in options.methods:
        mine = replace(config, method=method)
        found = [ratio(TimedLearner(mine, runtime, n, plain.stream), plain) for n in options.tasks]
        print(f"| `{method}` | {' | '.join(map(times, found))} |", flush=True)


if __name__ == "__main__":
    main()
