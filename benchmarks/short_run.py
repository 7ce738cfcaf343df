"""A whole short run beside the script that one would write by hand with transformers and PEFT.

    python benchmarks/short_run.py --weights ../shared/weights/pocket-clip --data ../shared/data/cifar100

Both learn a CLIP's vision tower with LoRA and a linear head a task: the same images of CIFAR-100, sites, rank, steps,
optimizer, schedule and local loss. After each task both score all test images so far among all classes so far, and save
what was learnt. They take turns in one process, after one turn of each that does not count; what is compared is CPU
time from reading the weights to the last score. `--only` times one of them, `--profile` shows where ours goes.
"""

import argparse
import cProfile
import io
import json
import math
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from perdure.backbones.preprocess import Preprocess
from perdure.streams import build_stream
from perdure.training.config import RunConfig
from perdure.training.run import run
from perdure.types import Stream


def by_hand(options: argparse.Namespace, stream: Stream, out: Path) -> float:
    """The script, with the images and the order of classes of `stream`; returns the last accuracy."""
    torch.manual_seed(options.seed)
    model = CLIPVisionModelWithProjection.from_pretrained(
        options.weights, dtype=torch.float32, attn_implementation=options.attention
    )
    side = model.config.image_size
    recipe = json.loads((options.weights / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(recipe[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=["k_proj", "v_proj"])
    model = peft.get_peft_model(model, config)
    heads = nn.ModuleList()

    def read(pattern: str) -> list[bytes]:
        files = sorted(options.data.glob(pattern))
        return [cell["bytes"] for file in files for cell in pq.read_table(file, columns=["image"])["image"].to_pylist()]

    def decoded(cells: list[bytes], rows: Tensor) -> Tensor:
        images = (Image.open(io.BytesIO(cells[row])).convert("RGB") for row in rows.tolist())
        arrays = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def features(images: Tensor) -> Tensor:
        return model(pixel_values=(images.float() / 255 - mean) / std).image_embeds

    train_cells, test_cells = read("train*.parquet"), read("test*.parquet")
    tested: list[tuple[Tensor, Tensor]] = []
    accuracy = 0.0
    for index, task in enumerate(stream):
        images, labels = decoded(train_cells, task.train.rows), task.train.labels
        tested.append((decoded(test_cells, task.test.rows), task.test.labels))
        first = min(task.classes)
        for head in heads:
            head.requires_grad_(False)
        heads.append(nn.Linear(model.config.projection_dim, len(task.classes)))
        trained = [p for p in [*model.parameters(), *heads.parameters()] if p.requires_grad]
        optimizer = torch.optim.Adam(trained, options.lr, fused=True)
        steps = options.epochs * math.ceil(len(images) / options.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(options.epochs):
            for chosen in torch.randperm(len(images)).split(options.batch_size):
                loss = F.cross_entropy(heads[-1](features(images[chosen])), labels[chosen] - first)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        model.eval()
        images, labels = (torch.cat(each) for each in zip(*tested, strict=True))
        with torch.inference_mode():
            found = torch.cat([features(batch) for batch in images.split(256)])
            scores = torch.cat([head(found) for head in heads], dim=1)
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        folder = out / f"task-{index}"
        model.save_pretrained(folder)
        save_file(heads.state_dict(), folder / "heads.safetensors")
    return accuracy


def config_of(options: argparse.Namespace) -> RunConfig:
    stream = (
        f"parquet(path={str(options.data)!r}, label='fine_label', tasks={options.tasks}, "
        f"per_class={options.per_class}, test_per_class={options.test_per_class})"
    )
    return RunConfig(
        stream=stream,
        backbone=f"clip(path={str(options.weights)!r})",
        method=f"lora(rank={options.rank})",
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        precision="fp32",
        attention=options.attention,
        device="cpu",
        seed=options.seed,
    )


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights/pocket-clip"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar100"))
    for name, value in {"tasks": 10, "per-class": 20, "test-per-class": 10, "epochs": 1, "batch-size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("perdure", "by hand"))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config = config_of(options)
    recipe = json.loads((options.weights / "preprocessor_config.json").read_text())
    side = recipe["crop_size"]["height"] if isinstance(recipe.get("crop_size"), dict) else recipe["size"]["height"]
    stream = build_stream(config.stream, Preprocess(side, side), options.seed)
    accuracies: dict[str, float] = {}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            accuracies["perdure"] = run(config, Path(folder) / "run")["acc"]

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            accuracies["by hand"] = by_hand(options, stream, Path(folder))

    contestants = {"perdure": ours, "by hand": theirs}
    contestants = {n: c for n, c in contestants.items() if options.only in (None, n)}
    if options.profile:
        ours()
        with cProfile.Profile() as profile:
            ours()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds + 1):
        for name, action in contestants.items():
            times[name].append(cpu_seconds(action))
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    ratio = medians["perdure"] / medians["by hand"] if len(medians) == 2 else None
    print(json.dumps({"cpu_seconds": times, "medians": medians, "accuracy": accuracies, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
