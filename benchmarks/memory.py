"""Memory over many tasks, and over a large table of images: what is held must not grow with either.

    python benchmarks/memory.py tasks --tasks 100
    python benchmarks/memory.py images --images 1000000

`tasks` learns a stream of 1,000 classes with a tiny model and prints the
anonymous memory of the process (what no file stands for) after each tenth of the tasks, and the bytes learnt.
`images` writes a parquet file of so many small encoded images, reads its mapped copy in random order,
and prints the same after each tenth. Linux only.
"""

import argparse
import ctypes
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.streams.sources import Parquet
from perdure.training.config import make_backbone, make_method, make_objective
from perdure.training.loop import TrainConfig, fit_task

BYTES, GROUP = 400, 1000


def anonymous() -> float:
    """Megabytes, once the allocator has given back what is free: of matrices that grow, holes of all sizes."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def over_tasks(options: argparse.Namespace) -> None:
    """One learner, many tasks."""
    stream_text = f"synthetic(tasks={options.tasks}, classes_per_task=10, per_class=8, test_per_class=2)"
    for method in options.methods:
        backbone = make_backbone("tiny(dim=32)")
        stream = build_stream(stream_text, backbone.preprocess, 0)
        learner = Core(backbone, make_objective("classify"), make_method(method), stream.scenario)
        held = []
        for task in stream:
            learner.grow(task)
            fit_task(learner, task, TrainConfig(epochs=1, batch_size=32))
            if (task.index + 1) % max(1, options.tasks // 10) == 0:
                held.append(anonymous())
        stored = sum(value.nbytes for value in learner.learnt_state().values())
        print(
            f"{method:<28} MB after each tenth: {' '.join(f'{each:.0f}' for each in held)};  learnt {stored / 1e6:.2f} "
            "MB",
            flush=True,
        )


def over_images(options: argparse.Namespace) -> None:
    """One table, many images."""
    with tempfile.TemporaryDirectory() as folder:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(folder)
        path, noise = Path(folder) / "train.parquet", np.random.default_rng(0)
        schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, options.images, GROUP):
                count = min(GROUP, options.images - start)
                images = pa.array([noise.bytes(BYTES) for _ in range(count)])
                writer.write_table(pa.table({"image": images, "label": [0] * count}, schema))
        order = list(range(options.images))
        random.Random(0).shuffle(order)
        source, held = Parquet([path], "image", memory=0), [anonymous()]
        for tenth in range(10):
            for row in order[tenth::10]:
                source.encoded(row)
            held.append(anonymous())
        size = path.stat().st_size / 1e6
        print(f"{options.images:,} images, {size:.0f} MB; MB at first and after each tenth: ", end="")
        print(" ".join(f"{each:.0f}" for each in held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tasks", "images"))
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=["inflora(rank=4)", "ranpac(dim=500)", "lora(rank=4)"])
    parser.add_argument("--images", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"tasks": over_tasks, "images": over_images}[options.what](options)


if __name__ == "__main__":
    main()
