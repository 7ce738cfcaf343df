"""Speed as ratios within one run: InfLoRA against PEFT's LoRA, task 20 against task 1, prediction against the bare.

    python benchmarks/speed.py --backbone 'pocket()' --rounds 30

Contestants take turns, so that what else the machine does meets all of them alike; ratios are of medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from perdure.core.caching import LOWER_BLOCKS
from perdure.core.learner import Core
from perdure.training.config import make_backbone, make_method, make_objective
from perdure.training.runtime import Runtime, attention_for
from perdure.types import Batch, Task

CLASSES = 10


def learner(backbone: str, method: str, runtime: Runtime, tasks: int = 1) -> Core:
    """A learner in the middle of task number `tasks`; the branches before it are merged, with random content."""
    core = Core(make_backbone(backbone), make_objective("classify()"), make_method(method))
    runtime.apply(core.backbone)
    core.precision = runtime.dtype
    for index in range(tasks):
        classes = tuple(range(CLASSES * index, CLASSES * (index + 1)))
        core.grow(Task(index, str(index), classes, tuple(map(str, classes)), tasks))
        if index < tasks - 1:
            for name, p in core.method.named_parameters():
                if "up" in name:
                    nn.init.normal_(p, std=1e-3)
            _end(core)
    core.train()
    core.prepare()
    return core


def _end(core: Core) -> None:
    """End a task without data; what InfLoRA would remember of it has no part in a step."""
    if core.method.name == "inflora":
        for adapter in core.method.adapters.values():
            adapter.merge()
    else:
        core.method.end_task(core, core.task)
    core.learnt += 1


class Peft(nn.Module):
    """The same sites, rank and head through Hugging Face PEFT, with autocast around the model."""

    def __init__(self, backbone: str, runtime: Runtime, rank: int) -> None:
        super().__init__()
        import peft

        self.backbone = make_backbone(backbone)
        runtime.apply(self.backbone)
        names = [site.layer.removeprefix("model.") for site in self.backbone.sites("kv")]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        self.backbone.model = peft.get_peft_model(self.backbone.model, config)
        self.head = nn.Linear(self.backbone.dim, CLASSES)
        self.dtype = runtime.dtype

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the head."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            features = self.backbone(batch)
        return F.cross_entropy(self.head(features.float()), batch["label"])


def step_of(model: Core | Peft, batch: Batch) -> Callable[[], None]:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()

    return step


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 2):
        for name, action in contestants.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def peak_memory(backbone: str, method: str, runtime: Runtime, batch_size: int) -> int:
    """Bytes a fresh process holds holds at most over three training steps, imports of both contestants included."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import peft, speed\n"
        "from perdure.training.runtime import Runtime\n"
        "backbone, method, runtime, size = json.loads(sys.argv[2])\n"
        "runtime = Runtime(**runtime); image = speed.batch_for(backbone, size)\n"
        "model = speed.Peft(backbone, runtime, 10) if method == 'peft' else speed.learner(backbone, method, runtime)\n"
        "step = speed.step_of(model, image); step(); step(); step()\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    arguments = json.dumps([backbone, method, runtime.describe(), batch_size])
    folder = __file__.rpartition("/")[0] or "."
    done = subprocess.run([sys.executable, "-c", code, folder, arguments], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


def batch_for(backbone: str, size: int) -> Batch:
    side = make_backbone(backbone).preprocess.size
    images = torch.randint(0, 255, (size, 3, side, side), dtype=torch.uint8)
    return {"image": images, "label": torch.randint(0, CLASSES, (size,))}


def measure(options: argparse.Namespace, precision: str) -> dict[str, object]:
    image = batch_for(options.backbone, options.batch_size)
    attention = attention_for(make_backbone(options.backbone), "cpu", precision)
    runtime = Runtime("cpu", precision, attention, options.threads)
    first = learner(options.backbone, "inflora(rank=10)", runtime)
    top = learner(options.backbone, "lora(rank=10, blocks='4-7')", runtime)
    kept = image | {LOWER_BLOCKS: top.backbone.before(top.constant_blocks, image)}
    steps = take_turns(
        {
            "inflora": step_of(first, image),
            "inflora, task 20": step_of(learner(options.backbone, "inflora(rank=10)", runtime, tasks=20), image),
            "lora": step_of(learner(options.backbone, "lora(rank=10)", runtime), image),
            "peft lora": step_of(Peft(options.backbone, runtime, 10), image),
            "lora, blocks 4-7": step_of(top, image),
            "lora, blocks 4-7, lower half kept": step_of(top, kept),
        },
        options.rounds,
    )
    bare = make_backbone(options.backbone).requires_grad_(False).eval()
    runtime.apply(bare)
    bare.to(runtime.dtype)
    taught = learner(options.backbone, "inflora(rank=10)", runtime, tasks=20)
    with taught.inference():
        predictions = take_turns(
            {"bare": partial(bare, image), "taught": partial(taught.encode, image)}, 2 * options.rounds
        )
    memory = {m: peak_memory(options.backbone, m, runtime, options.batch_size) for m in ("inflora(rank=10)", "peft")}
    return {
        "attention": attention,
        "step_ms": {name: round(1000 * seconds, 1) for name, seconds in steps.items()},
        "step: inflora / peft lora": round(steps["inflora"] / steps["peft lora"], 3),
        "step: task 20 / task 1": round(steps["inflora, task 20"] / steps["inflora"], 3),
        "step: kept lower half / all": round(steps["lora, blocks 4-7, lower half kept"] / steps["lora, blocks 4-7"], 3),
        "prediction after 20 tasks / bare backbone": round(predictions["taught"] / predictions["bare"], 3),
        "peak memory: inflora / peft lora": round(memory["inflora(rank=10)"] / memory["peft"], 3),
        "peak_bytes": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for precision in options.precision:
        print(precision, json.dumps(measure(options, precision), indent=2), flush=True)


if __name__ == "__main__":
    main()
