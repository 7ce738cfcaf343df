"""Memory over many tasks, and over a large table of images: what is held must not grow with either.

    python benchmarks/memory.py tasks --tasks 100
    python benchmarks/memory.py tasks --methods 'probe + align' --backbone 'tiny(layers=2)'
    python benchmarks/memory.py images --images 1000000

`tasks` learns a stream of 1,000 classes with a tiny model and prints, after each tenth of the tasks, the anonymous
memory of the process (what no file stands for) and the processor's seconds that the tenth took, which grow where a task
costs more the more there were; then the bytes learnt, the most memory held, and the accuracy on all tasks.
`images` writes a parquet file of so many small encoded images, reads its mapped copy in random order,
and prints the same after each tenth. Linux only.
"""

import argparse
import ctypes
import random
import tempfile
import time
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
from perdure.training.runtime import peak_memory

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
        backbone = make_backbone(options.backbone, method)
        stream = build_stream(stream_text, backbone.preprocess, 0)
        learner = Core(backbone, make_objective("classify", method), make_method(method), stream.scenario)
        held, took, since = [], [], time.process_time()
        for task in stream:
            learner.grow(task)
            fit_task(learner, task, TrainConfig(epochs=1, batch_size=32))
            if (task.index + 1) % max(1, options.tasks // 10) == 0:
                took.append(time.process_time() - since)
                held.append(anonymous())
                since = time.process_time()
        stored = sum(value.nbytes for value in learner.learnt_state().values())
        right = total = 0
        with learner.inference():
            for task in stream:
                best = torch.tensor(learner.objective.classes)[learner.scores_of(task.test).argmax(1).cpu()]
                right, total = right + int((best == task.test.labels).sum()), total + len(best)
        print(
            f"{method:<28} MB after each tenth: {' '.join(f'{each:.0f}' for each in held)};  seconds of each tenth: "
            f"{' '.join(f'{each:.1f}' for each in took)}, {sum(took):.0f} in all;  learnt {stored / 1e6:.2f} MB, at "
            f"most {peak_memory() / 1e6:.0f} MB held, {right / total:.1%} right",
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
    parser.add_argument("--backbone", default="tiny(dim=32)")
    parser.add_argument("--images", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"tasks": over_tasks, "images": over_images}[options.what](options)


if __name__ == "__main__":
    main()
