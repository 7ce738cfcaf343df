"""Training step of every low-rank method against plain LoRA, in its second task and after ten, as ratios in one run.

    python benchmarks/steps.py --rounds 20

Contestants take turns, so that what else the machine does meets all of them alike; ratios are of medians.
"""

import argparse
from functools import partial

import torch
from speed import batch_for, learner, step_of, take_turns

from perdure.runtime import Runtime

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    torch.manual_seed(0)
    image = batch_for(options.backbone, options.batch_size)
    runtime = Runtime("cpu", options.precision, "eager", torch.get_num_threads())
    made = partial(learner, options.backbone, runtime=runtime)
    contestants = {(m, t): step_of(made(m, tasks=t), image) for m in METHODS for t in (2, 10)}
    times = take_turns(contestants, options.rounds)
    base = times[METHODS[0], 2]
    print(f"lora: {1000 * base:.0f} ms\n\n| method | task 2 | task 10 |\n|---|---|---|")
    for method in METHODS:
        print(f"| `{method}` | {times[method, 2] / base:.2f} | {times[method, 10] / base:.2f} |")


if __name__ == "__main__":
    main()
