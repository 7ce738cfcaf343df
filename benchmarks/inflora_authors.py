"""InfLoRA's whole run beside the authors' own code, in one process and in turns.

    git clone https://github.com/liangyanshuo/InfLoRA ../InfLoRA
    python benchmarks/inflora_authors.py --authors ../InfLoRA

Both start from the same weights (a DINOv2 in Hugging Face's format, which their transformer holds with layer scale) and
learn the same images in the same order with the same rank, epochs, batch size and Adam, and after each task both score
all test images so far and save. Compared is CPU time from reading the weights and decoding the images to the last
score. Their code runs as it is: what it imports and does not need on a CPU is replaced by nothing (`ipdb`, `accimage`,
and scikit-learn's k-means where that is not installed: its centres are never read). Nothing of it is kept here.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from perdure.backbones.preprocess import Preprocess
from perdure.streams import build_stream
from perdure.training.config import RunConfig
from perdure.training.run import run
from perdure.types import Stream

_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "encoder.layer.": "blocks.",
    "layernorm.": "norm.",
}


def commit_of(folder: Path) -> str:
    """The commit of the authors' code.

    Raises:
        SystemExit: when the folder is no checkout of it.
    """
    if not (folder / "methods" / "inflora.py").is_file():
        raise SystemExit(f"{folder} holds no methods/inflora.py: give a checkout of github.com/liangyanshuo/InfLoRA")
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown (no git checkout)"


def import_authors(folder: Path) -> tuple[Any, Any]:
    """Their modules `methods.inflora` and `models.sinet_inflora`."""
    sys.path.insert(0, str(folder))
    absent = {"ipdb": {}, "sklearn": {}, "sklearn.cluster": {"KMeans": _NoClusters}}
    for name, content in absent.items():
        try:
            import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(content, __spec__=ModuleSpec(name, None))  # which torch asks for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("methods.inflora"), import_module("models.sinet_inflora")


class _NoClusters:
    """Stands for k-means, whose centres InfLoRA's evaluation never reads."""

    def __init__(self, n_clusters: int, **_: Any) -> None:
        self.n_clusters = n_clusters

    def fit(self, features: np.ndarray) -> "_NoClusters":
        self.cluster_centers_ = features[: self.n_clusters]
        return self


class Images(torch.utils.data.Dataset[Any]):
    """Normalised pixels in memory, in the form of the authors' data sets."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        return index, self.pixels[index], int(self.labels[index])


class Manager:
    """The images of a stream, decoded once, in the place of the authors' data manager."""

    def __init__(self, options: argparse.Namespace, stream: Stream) -> None:
        recipe = json.loads((options.weights / "preprocessor_config.json").read_text())
        self.side = json.loads((options.weights / "config.json").read_text())["image_size"]
        self.mean, self.std = (torch.tensor(recipe[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        self.sets = {
            part: [
                (self._decoded(cells, getattr(task, part).rows), getattr(task, part).labels, task.classes)
                for task in stream
            ]
            for part in ("train", "test")
            for cells in [_cells(options.data, part)]
        }
        self.nb_tasks = len(stream)

    def get_task_size(self, task: int) -> int:
        """Number of the task's classes."""
        return len(self.sets["train"][task][2])

    def get_dataset(self, indices: np.ndarray, source: str, mode: str) -> Images:
        """Images of all classes whose ids are `indices`."""
        chosen = [(pixels, labels) for pixels, labels, classes in self.sets[source] if set(classes) <= set(indices)]
        return Images(*(torch.cat(each) for each in zip(*chosen, strict=True)))

    def _decoded(self, cells: list[bytes], rows: Tensor) -> Tensor:
        images = (Image.open(io.BytesIO(cells[row])).convert("RGB") for row in rows.tolist())
        arrays = [np.asarray(image.resize((self.side, self.side), Image.Resampling.BICUBIC)) for image in images]
        return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def _cells(data: Path, part: str) -> list[bytes]:
    files = sorted(data.glob(f"{part}*.parquet"))
    return [cell["bytes"] for file in files for cell in pq.read_table(file, columns=["image"])["image"].to_pylist()]


def theirs(options: argparse.Namespace, stream: Stream, code: tuple[Any, Any], out: Path) -> list[float]:
    """Accuracy over all classes so far after each task."""
    inflora, network = code
    config = json.loads((options.weights / "config.json").read_text())
    width, classes = config["hidden_size"], len(stream.tasks[0].classes)
    torch.manual_seed(options.seed)

    def encoder(_variant: str, **_: Any) -> Any:
        model = network.ViT_lora_co(
            img_size=config["image_size"],
            patch_size=config["patch_size"],
            num_classes=0,
            embed_dim=width,
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            init_values=1.0,
            n_tasks=len(stream),
            rank=options.rank,
        )
        missing, unexpected = model.load_state_dict(renamed(load_file(options.weights / "model.safetensors")), False)
        assert not unexpected
        assert all("lora" in name or "_grow" in name for name in missing), missing
        return model

    class Learner(inflora.InfLoRA):
        def update_DualGPM(self, mat_list: list[Tensor]) -> None:  # noqa: N802
            super().update_DualGPM([matrix.numpy() for matrix in mat_list])  # since numpy 2 its SVD gives back tensors

    network._create_vision_transformer = encoder
    rates = {"init_lr": options.lr, "lrate": options.lr, "init_lr_decay": 0.1, "lrate_decay": 0.1}
    learner = Learner(
        {
            "memory_size": 0,
            "memory_per_class": 0,
            "fixed_memory": True,
            "device": ["cpu"],
            "net_type": "sip",
            "embd_dim": width,
            "init_cls": classes,
            "total_sessions": len(stream),
            "EPSILON": 1e-8,
            "optim": "adam",
            "init_epoch": options.epochs,
            "epochs": options.epochs,
            "init_weight_decay": 0.0,
            "weight_decay": 0.0,
            "batch_size": options.batch_size,
            "num_workers": 0,
            "rank": options.rank,
            "lamb": 0.95,
            "lame": 1.0,
            "dataset": "cifar100",
        }
        | rates
    )
    manager, curve = Manager(options, stream), []
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for index in range(manager.nb_tasks):
            learner.incremental_train(manager)
            curve.append(float(learner.eval_task()[0]["top1"]) / 100)
            learner.after_task()
            torch.save(learner._network.state_dict(), out / f"task_{index}.pth")
    return curve


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DINOv2 of Hugging Face under the names of timm."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        for theirs_, ours in _NAMES.items():
            name = name.replace(theirs_, ours)
        found[name] = value.float()
    found.pop("embeddings.mask_token", None)
    blocks = {name.split(".attention.")[0] for name in found if ".attention.attention." in name}
    for block in blocks:
        for kind in ("weight", "bias"):
            parts = [found.pop(f"{block}.attention.attention.{p}.{kind}") for p in ("query", "key", "value")]
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def config_of(options: argparse.Namespace) -> RunConfig:
    stream = (
        f"parquet(path={str(options.data)!r}, label='fine_label', tasks={options.tasks}, "
        f"per_class={options.per_class}, test_per_class={options.test_per_class})"
    )
    return RunConfig(
        stream=stream,
        backbone=f"vision(path={str(options.weights)!r})",
        method=options.method or f"inflora(rank={options.rank})",
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        schedule=options.schedule,
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
    parser.add_argument("--authors", type=Path, required=True, help="a checkout of github.com/liangyanshuo/InfLoRA")
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights/pocket-vit"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar100"))
    for name, value in {"tasks": 10, "per-class": 30, "test-per-class": 10, "epochs": 3, "batch-size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--method", help="another of ours, such as 'inflora(rank=10, end_moments=\"training\")'")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--schedule", default="cosine", help="ours; theirs is always cosine-epoch")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa", help="ours; theirs is eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.CRITICAL)
    code = import_authors(options.authors)

    def contestants(options: argparse.Namespace, found: dict[str, list[float]]) -> dict[str, Callable[[], None]]:
        config = config_of(options)
        side = json.loads((options.weights / "config.json").read_text())["image_size"]
        stream = build_stream(config.stream, Preprocess(side, side), options.seed)

        def ours() -> None:
            with tempfile.TemporaryDirectory() as folder:
                matrix = run(config, Path(folder) / "run")["matrix"]
                found["perdure"] = [sum(row[: i + 1]) / (i + 1) for i, row in enumerate(matrix)]

        def authors() -> None:
            with tempfile.TemporaryDirectory() as folder:
                found["authors"] = theirs(options, stream, code, Path(folder))

        return {"perdure": ours, "authors": authors}

    small = argparse.Namespace(**{**vars(options), "tasks": 2, "per_class": 1, "test_per_class": 1, "epochs": 2})
    for warm_up in contestants(small, {}).values():
        warm_up()
    curves: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {"perdure": [], "authors": []}
    for _ in range(options.rounds):
        for name, action in contestants(options, curves).items():
            times[name].append(cpu_seconds(action))
    medians = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "authors": commit_of(options.authors),
        "cpu_seconds": times,
        "ratio": medians["perdure"] / medians["authors"],
        "accuracy after each task": {n: [round(100 * v, 1) for v in each] for n, each in curves.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
