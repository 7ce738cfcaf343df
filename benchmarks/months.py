"""What `perdure learn` has after four months of photos, five new classes a month, by method: which default is best.

    python benchmarks/months.py --data ../shared/data/caltech101:label ../shared/data/cifar100:fine_label

Development streams: seeds 100, 101 and 102 draw the twenty classes, and which are taught when. No reported stream uses
them. Every month is taught as `learn` does, at the method's own learning rate: 5 epochs, more where that is below 60
steps, batches of 64, fp32; or with --epochs, --batch-size and --precision.
"""

import argparse
import json
import random
import time
from typing import Any

import torch

from perdure.api.learner import Learner
from perdure.process import plain
from perdure.streams import ImageSet, build_stream

MONTHS, CLASSES = 4, 5


def taught(
    backbone: str, method: str, data: str, seed: int, per_class: int, precision: str, given: dict[str, Any]
) -> dict[str, object]:
    """Accuracy among all twenty classes, on those of the last month and on those of the months before."""
    learner = Learner.create(backbone, method, seed=seed, precision=precision)
    path, _, label = data.partition(":")
    spec = f'parquet(path="{path}", label="{label}", tasks=1, per_class={per_class}, test_per_class=20)'
    [everything] = build_stream(spec, learner.backbone.preprocess, 0).tasks
    drawn = random.Random(f"months {seed}").sample(sorted(everything.names), MONTHS * CLASSES)
    ids = dict(zip(everything.names, everything.classes, strict=True))
    months = [drawn[start : start + CLASSES] for start in range(0, len(drawn), CLASSES)]
    start = time.perf_counter()
    for month in months:
        images, labels = chosen(everything.train, {ids[name]: name for name in month})
        learner.learn(images, labels, **given)
    seconds = time.perf_counter() - start
    found = [learner.evaluate(*chosen(everything.test, {ids[name]: name for name in month})) for month in months]
    shares = [each["accuracy"] for each in found]
    return {
        "data": path.rpartition("/")[2],
        "seed": seed,
        "backbone": backbone.rpartition("/")[2].rstrip('")') if "path" in backbone else backbone,
        "method": method,
        "training": {"lr": learner.config.lr, "precision": precision} | given,
        "accuracy": sum(shares) / MONTHS,
        "last_month": shares[-1],
        "months_before": sum(shares[:-1]) / (MONTHS - 1),
        "seconds": round(seconds, 1),
    }


def chosen(data: ImageSet, names: dict[int, str]) -> tuple[torch.Tensor, list[str]]:
    """The images of some classes, uint8 (n, 3, H, W), and their names."""
    rows = [row for row, c in enumerate(data.labels.tolist()) if c in names]
    return data.__getitems__(rows)["image"], [names[int(data.labels[row])] for row in rows]


@plain()
def main() -> None:
    """Print a line of JSON a run, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="PATH:LABEL of parquet folders")
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument(
        "--methods", nargs="+", default=["ncm", "probe + align", "inflora(rank=10) + align", "inflora(rank=10)"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--precision", default="fp32")
    for name, kind in (("lr", float), ("epochs", int), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind)
    asked = parser.parse_args()
    given = {k: v for k in ("lr", "epochs", "batch_size") if (v := getattr(asked, k)) is not None}
    rows = []
    for seed in asked.seeds:
        for data in asked.data:
            for method in asked.methods:
                rows.append(taught(asked.backbone, method, data, seed, asked.per_class, asked.precision, given))
                print(json.dumps(rows[-1]), flush=True)
    for method in asked.methods:
        cells = []
        for data in asked.data:
            name_of_data = data.partition(":")[0].rpartition("/")[2]
            of = [r for r in rows if (r["method"], r["data"]) == (method, name_of_data)]
            for name in ("accuracy", "last_month", "months_before"):
                values = torch.tensor([float(str(r[name])) for r in of]) * 100
                spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.1f}{spread}")
        print(f"| `{method}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
