"""A learner that reads larger images from stage to stage: accuracy at every size, before and after each growth.

    python benchmarks/resolution.py --data DATA/cifar100 --backbone 'vision(path="WEIGHTS/pocket-vit")'

Ten classes a stage, drawn by the seed, taught at the stage's size; then `perdure resize` to the next. After each stage
the learner is measured on all classes so far at every size, on a copy of its folder. Class statistics stay those of the
size at which they were taken.
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from perdure.api.learner import Learner
from perdure.api.resizing import resize
from perdure.process import plain
from perdure.streams import ImageSet, build_stream

CLASSES = 10


def taught(
    data: str, backbone: str, method: str, lr: float | None, sizes: Sequence[int], seed: int
) -> list[dict[str, object]]:
    """After each stage, for each size: accuracy on all classes so far, and on those of the first stage."""
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "learner"
        sized = f"{backbone.rstrip(')')}, size={sizes[0]})"
        learner = Learner.create(sized, method, seed=seed, precision="fp32")
        for stage, size in enumerate(sizes):
            if stage:
                resize(folder, size=size)
                learner = Learner.load(folder)
            learner.learn(*images(data, learner, stage, seed, "train"), lr=lr, epochs=3, batch_size=20)
            learner.save(folder)
            for seen in sizes:
                shutil.copytree(folder, other := Path(scratch) / f"{stage}-{seen}")
                if seen != size:
                    resize(other, size=seen)
                asked = Learner.load(other)
                shares = [
                    asked.evaluate(*images(data, asked, earlier, seed, "test"))["accuracy"]
                    for earlier in range(stage + 1)
                ]
                found.append(
                    {"method": method, "seed": seed, "taught at": size, "seen at": seen}
                    | {"all": statistics.fmean(shares), "first": shares[0]}
                )
                print(json.dumps(found[-1]), flush=True)
    return found


def images(data: str, learner: Learner, stage: int, seed: int, part: str) -> tuple[Tensor, list[str]]:
    """The images of a stage's classes, as the learner reads them, and their names."""
    spec = f'parquet(path="{data}", label="fine_label", tasks=1, per_class=20, test_per_class=20)'
    [everything] = build_stream(spec, learner.backbone.preprocess, 0).tasks
    drawn = random.Random(f"resolution {seed}").sample(sorted(everything.classes), len(everything.classes))
    mine = drawn[stage * CLASSES : (stage + 1) * CLASSES]
    whole = everything.train if part == "train" else everything.test
    assert isinstance(whole, ImageSet)
    rows = [row for row, label in enumerate(whole.labels.tolist()) if label in mine]
    names = dict(zip(everything.classes, everything.names, strict=True))
    return whole.__getitems__(rows)["image"], [names[int(whole.labels[row])] for row in rows]


@plain()
def main() -> None:
    """Print a line of JSON a measurement, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet folder of CIFAR-100")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--methods", nargs="+", default=["ncm", "probe + align"])
    parser.add_argument("--lr", type=float)
    parser.add_argument("--sizes", nargs="+", type=int, default=[56, 84, 112])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    rows = [
        row
        for method in asked.methods
        for seed in asked.seeds
        for row in taught(asked.data, asked.backbone, method, asked.lr, asked.sizes, seed)
    ]
    print("| method | after the stage at | " + " | ".join(f"all, seen at {size}" for size in asked.sizes), end="")
    print(" | " + " | ".join(f"first ten, seen at {size}" for size in asked.sizes) + " |")
    for method in asked.methods:
        for stage in asked.sizes:
            of = [row for row in rows if (row["method"], row["taught at"]) == (method, stage)]
            cells = [
                [100 * float(str(row[of_what])) for row in of if row["seen at"] == size]
                for of_what in ("all", "first")
                for size in asked.sizes
            ]
            shown = (
                f"{statistics.fmean(cell):.1f} ± {statistics.stdev(cell):.1f}" if len(cell) > 1 else f"{cell[0]:.1f}"
                for cell in cells
            )
            print(f"| `{method}` | {stage} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
