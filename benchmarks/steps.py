"""Training step of every low-rank method against plain LoRA, in its second task and after ten, as ratios in one run.

    python benchmarks/steps.py --rounds 20

Contestants take turns, so that what else the machine does meets all of them alike; ratios are of medians.
"""

import argparse
from functools import partial

import torch
from speed import CLASSES, batch_for, step_of, take_turns
from torch import nn

from perdure.config import make_backbone, make_method, make_objective
from perdure.learner import Core
from perdure.runtime import Runtime
from perdure.types import Task

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


def learner(backbone: str, method: str, runtime: Runtime, tasks: int) -> Core:
    """A learner within task number `tasks`; what former tasks learnt is random."""
    core = Core(make_backbone(backbone), make_objective("classify()"), make_method(method))
    runtime.apply(core.backbone)
    core.precision = runtime.dtype
    for index in range(tasks):
        classes = tuple(range(CLASSES * index, CLASSES * (index + 1)))
        core.grow(Task(index, str(index), classes, tuple(map(str, classes)), tasks))
        if index < tasks - 1:
            for name, p in core.method.named_parameters():
                if "up" in name:
                    nn.init.normal_(p, std=1e-2)
            _end(core)
    core.train()
    core.settle()
    return core


def _end(core: Core) -> None:
    """End a task without data; InfLoRA's design has no part in a step."""
    if core.method.name == "inflora":
        for adapter in core.method.adapters.values():
            adapter.settle()
    else:
        core.method.end_task(core, core.task)
    core.learnt += 1


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
