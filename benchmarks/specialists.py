"""Specialists on a stream: a learner for each task, taught apart, behind one face; beside its controls and mergings.

    python benchmarks/specialists.py --stream 'cifar100(tasks=10, per_class=100, test_per_class=30)' --method lora

No learner sees another's images. `combine` puts them together, and the team is measured on the test images of all
tasks, with no task told: routed, each alone, a random one, all averaged, the oracle, and merged into one in each way.
With a stream of questions, `--objective generate` and a language model the same, by what is answered.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perdure.api.combine import combine
from perdure.api.folders import teach_folder
from perdure.api.routing_scores import measure_routing
from perdure.process import plain
from perdure.streams import ConversationSet, build_stream
from perdure.training.config import RunConfig, make_backbone
from perdure.types import Task


def written(task: Task, folder: Path) -> Path:
    """A task's images as class folders, at the size that the model reads; or its questions as files with images."""
    for part, data in (("train", task.train), ("test", task.test)):
        place = folder / part
        place.mkdir(parents=True)
        if isinstance(data, ConversationSet):
            asked = data.__getitems__(range(len(data)))["conversation"]
            lines = []
            for i, each in enumerate(asked):
                [image] = each.images
                image.save(place / f"{i:05}.png")
                line = {"image": f"{part}/{i:05}.png", "question": each.question, "answer": each.answer}
                lines.append(json.dumps(line if each.options is None else line | {"options": each.options}) + "\n")
            (folder / f"{part}.jsonl").write_text("".join(lines))
            continue
        for i, label in enumerate(data.labels.tolist()):
            named = place / task.names[task.classes.index(label)]
            named.mkdir(exist_ok=True)
            pixels = data.__getitems__([i])["image"][0]
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(named / f"{i:05}.png")
    return folder


def measured(options: argparse.Namespace, seed: int, scratch: Path) -> list[dict[str, Any]]:
    """The rows of the team's table, its routing accuracy in each."""
    settings: dict[str, Any] = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    settings |= {"precision": options.precision, "attention": options.attention, "seed": seed}
    made = {"backbone": options.backbone, "method": options.method, "objective": options.objective}
    config = RunConfig(stream="", **made, **settings)
    folders = []
    for task in build_stream(options.stream, make_backbone(config.backbone).preprocess, seed):
        folders.append(scratch / f"task-{task.number}")
        teach_folder(written(task, scratch / f"images-{task.number}"), folders[-1], config, settings)
    table = measure_routing(combine(folders, scratch / "team", options.route, options.gate))
    return [row | {"routing_accuracy": table["routing_accuracy"], "seed": seed} for row in table["rows"]]


@plain()
def main() -> None:
    """Print a line of JSON for each row of each seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--objective", default="classify")
    parser.add_argument("--route", default="gaussian")
    parser.add_argument("--gate", default=None)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            for row in measured(options, seed, Path(scratch)):
                print(json.dumps(row), flush=True)
                found.setdefault(row["who"], []).append(100 * row["accuracy"])
                if row["who"].startswith("routed"):
                    found.setdefault("images sent to a member that knows them", []).append(
                        100 * row["routing_accuracy"]
                    )
    for who, values in found.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{who}: {statistics.fmean(values):.1f}{spread} %")


if __name__ == "__main__":
    main()
