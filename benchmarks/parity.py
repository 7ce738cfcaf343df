"""InfLoRA here beside the authors' code, on the same images and weights: accuracy after each task, and CPU seconds.

    git clone https://github.com/liangyanshuo/InfLoRA
    python benchmarks/parity.py InfLoRA --backbone 'vision(path="pocket-vit")' --stream 'parquet(path="cifar100", ...)'

Nothing of the authors' code is changed or copied. Its network gets the weights of a DINOv2-like backbone in place of a
download, its data manager our decoded images, and its clustering of features, which no answer uses, is left out. Both
run in float32 on one thread, without augmentation; each is timed as a whole, from reading weights and images to the
last evaluation. See parity.md beside this file.
"""

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from perdure.config import RunConfig, make_backbone
from perdure.run import run
from perdure.streams import build_stream
from perdure.types import Data, Stream

_NAMES = (  # of DINOv2 in transformers -> of the authors' ViT, a timm 0.6
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("attention.o_proj", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


class Images(Dataset[tuple[int, Tensor, int]]):
    """Number, normalised pixels and label of each image, as the authors' loaders give them."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self.pixels, self.labels = (torch.cat(each) for each in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        return index, self.pixels[index], int(self.labels[index])


class Tasks:
    """The authors' data manager: the images of any classes, by their place in the order in which they are learnt."""

    def __init__(self, stream: Stream, normalise: Any) -> None:
        self.sizes = [len(task.classes) for task in stream]
        place = {c: i for i, c in enumerate(c for task in stream for c in task.classes)}
        self.sets = {
            source: [_read(getattr(task, source), place, normalise) for task in stream] for source in ("train", "test")
        }

    def get_task_size(self, task: int) -> int:
        """Number of classes."""
        return self.sizes[task]

    def get_dataset(self, indices: Any, source: str, mode: str) -> Images:
        """Whole tasks; never augmented."""
        wanted = set(map(int, indices))
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return Images([part for end, part in zip(ends, self.sets[source], strict=True) if end - 1 in wanted])


def _read(data: Data, place: dict[int, int], normalise: Any) -> tuple[Tensor, Tensor]:
    batch = data.__getitems__(range(len(data)))
    return normalise(batch["image"]), torch.tensor([place[c] for c in batch["label"].tolist()])


def weights(backbone: torch.nn.Module) -> dict[str, Tensor]:
    """The backbone's weights under the names of the authors' ViT, q, k and v in one layer."""
    found: dict[str, Tensor] = {}
    for name, value in backbone.state_dict().items():
        for ours, theirs in _NAMES:
            name = name.removeprefix("model.").replace(ours, theirs)
        found[name] = value
    for name in [n for n in found if n.endswith(("query.weight", "query.bias", "q_proj.weight", "q_proj.bias"))]:
        parts = [name.replace("query", word).replace("q_proj", short) for word, short in _QKV]
        stem, kind = name.split(".attention")[0], name.rpartition(".")[2]
        found[f"{stem}.attn.qkv.{kind}"] = torch.cat([found.pop(part) for part in parts])
    found.pop("embeddings.mask_token", None)
    return found


_QKV = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))


def theirs(folder: Path, options: argparse.Namespace) -> tuple[list[float], float]:
    """Accuracy over all seen classes after each task, in per cent, and CPU seconds."""
    start = time.process_time()
    backbone = make_backbone(options.backbone)
    stream = build_stream(options.stream, backbone.preprocess, options.seed)
    inflora, network = _imported(folder)
    shape = backbone.model.config

    def build(_variant: str, pretrained: bool, n_tasks: int, rank: int, **_: Any) -> Any:
        model = network.ViT_lora_co(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.hidden_size,
            depth=shape.num_hidden_layers,
            num_heads=shape.num_attention_heads,
            mlp_ratio=shape.mlp_ratio,
            init_values=1.0,
            num_classes=0,
            n_tasks=n_tasks,
            rank=rank,
        )
        missing, unexpected = model.load_state_dict(weights(backbone), strict=False)
        if unexpected or (missing := [n for n in missing if "lora_" not in n and "_grow" not in n]):
            raise SystemExit(f"{options.backbone} does not fit the authors' ViT: {missing[:3]}, {unexpected[:3]}")
        return model

    network._create_vision_transformer = build
    data = Tasks(stream, backbone.normalise)
    torch.manual_seed(options.seed)
    learner = inflora.InfLoRA(_settings(options, data, shape.hidden_size))
    learner.clustering = lambda loader: None
    update = learner.update_DualGPM  # in NumPy of today, an SVD of tensors is no array any more
    learner.update_DualGPM = lambda moments: update([each.numpy() for each in moments])
    curve = []
    for _ in stream:
        learner.incremental_train(data)
        curve.append(float(learner.eval_task()[0]["top1"]))
        learner.after_task()
    return curve, time.process_time() - start


def _settings(options: argparse.Namespace, data: Tasks, dim: int) -> dict[str, Any]:
    """The authors' configuration, with our options in the places of theirs."""
    rates = {"lr": options.lr, "lr_decay": 0.1, "weight_decay": 0.0, "epoch": options.epochs}
    return {
        **{f"init_{name}": value for name, value in rates.items()},
        **{"lrate": options.lr, "lrate_decay": 0.1, "weight_decay": 0.0, "epochs": options.epochs},
        **{"dataset": "cifar100", "net_type": "sip", "optim": "adam", "EPSILON": 1e-8, "num_workers": 0},
        **{"init_cls": data.sizes[0], "total_sessions": len(data.sizes), "embd_dim": dim, "rank": options.rank},
        **{"lamb": options.keep, "lame": 1.0, "batch_size": options.batch_size, "device": [torch.device("cpu")]},
        **{"memory_size": 0, "memory_per_class": 0, "fixed_memory": True},
    }


def _imported(folder: Path) -> tuple[Any, Any]:
    """The authors' modules of method and network; what they import and never use here may be missing."""
    for name in ("ipdb", "sklearn", "sklearn.cluster"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    if not hasattr(sys.modules["sklearn.cluster"], "KMeans"):
        sys.modules["sklearn.cluster"].KMeans = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import methods.inflora as method  # type: ignore[import-not-found]
        import models.sinet_inflora as network  # type: ignore[import-not-found]
    return method, network


def ours(options: argparse.Namespace) -> tuple[list[float], float]:
    """The same of `inflora` here."""
    start = time.process_time()
    config = RunConfig(
        stream=options.stream,
        backbone=options.backbone,
        method=f"inflora(rank={options.rank}, keep={options.keep})",
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        schedule=options.schedule,
        seed=options.seed,
        precision="fp32",
        attention="sdpa",
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        matrix = run(config, Path(folder))["matrix"]
    return [100 * sum(row[: i + 1]) / (i + 1) for i, row in enumerate(matrix)], time.process_time() - start


def commit(folder: Path) -> str:
    """Which state of the authors' repository it is."""
    digest = hashlib.sha256((folder / "methods" / "inflora.py").read_bytes()).hexdigest()[:12]
    asked = ["git", "-C", str(folder), "log", "-1", "--format=%H"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    own = (folder / ".git").exists()
    return f"commit {found if own else 'unknown'}, sha256 of methods/inflora.py {digest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of the authors' repository")
    parser.add_argument("--stream", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--keep", type=float, default=0.95)
    parser.add_argument("--schedule", default="cosine-epoch", help="ours; the authors' is always cosine-epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=["ours", "theirs"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"authors' code: {commit(options.folder)}", flush=True)
    for seed in options.seeds:
        options.seed, seconds = seed, {}
        for side in ("theirs", "ours"):
            if options.only in (None, side):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    curve, seconds[side] = theirs(options.folder, options) if side == "theirs" else ours(options)
                shown = " ".join(f"{value:5.1f}" for value in curve)
                print(f"seed {seed} {side:>6}: {shown} | {seconds[side]:7.1f} CPU s", flush=True)
        if len(seconds) == 2:
            print(f"seed {seed}: ours takes {seconds['ours'] / seconds['theirs']:.2f} of the authors'", flush=True)


if __name__ == "__main__":
    main()
