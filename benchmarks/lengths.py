"""A text encoder that reads longer texts: recall by length of the texts, before and after it is taught long ones.

    python benchmarks/lengths.py --data ../shared/data/flickr8k

Texts are the first one, two and five English captions of an image, joined. The encoder reads its own 48 tokens, or more
(`length=`), with its positions stretched or interpolated. It is then taught the texts of five captions at that length.
Recall is the mean of recall at 1, 5 and 10 both ways among all test images; of one caption, that is what is kept of the
original setting.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from perdure.api.learner import Learner
from perdure.process import plain
from perdure.streams import build_stream
from perdure.types import Task


def joined(data: Path, captions: int, folder: Path) -> str:
    """The stream of images whose text is their first `captions`, joined: written to `folder`, as it is spelt."""
    for part in ("train", "test"):
        table = pq.read_table(data / f"{part}.parquet", columns=["image", "captions_en"])
        texts = [" ".join(each[:captions]) for each in table["captions_en"].to_pylist()]
        (folder / str(captions)).mkdir(exist_ok=True)
        pq.write_table(
            table.select(["image"]).append_column("text", pa.array(texts)), folder / str(captions) / f"{part}.parquet"
        )
    return f'captions(path="{folder / str(captions)}", captions="text", tasks=1)'


def recall(learner: Learner, task: Task) -> float:
    """Per cent, among the task's test images and texts."""
    [found] = learner.objective.evaluate(learner, [task])
    return 100 * float(found["recall_own_gallery"])


@plain()
def main() -> None:
    """Print a line of JSON a measurement, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet folder of Flickr8k")
    parser.add_argument("--backbone", default="pocket()")
    parser.add_argument("--method", default='lora(tower="text")')
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lengths", nargs="+", type=int, default=[48, 96, 192])
    parser.add_argument("--captions", nargs="+", type=int, default=[1, 2, 5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        specs = {n: joined(asked.data, n, Path(scratch)) for n in asked.captions}
        for length in asked.lengths:
            for positions in ("stretch", "interpolate") if length > asked.lengths[0] else ("its own",):
                how = f', length={length}, positions="{positions}")' if positions != "its own" else ")"
                backbone = (asked.backbone.rstrip(")") + how).replace("(, ", "(")
                for seed in asked.seeds:
                    learner = Learner.create(backbone, asked.method, "retrieve", seed=seed, precision="fp32")
                    tasks = {
                        n: build_stream(spec, learner.backbone.preprocess, 0).tasks[0] for n, spec in specs.items()
                    }
                    before = {n: recall(learner, task) for n, task in tasks.items()}
                    learner.learn(
                        str(Path(scratch) / str(max(tasks)) / "train.parquet"),
                        captions="text",
                        lr=asked.lr,
                        epochs=5,
                        batch_size=32,
                    )
                    after = {n: recall(learner, task) for n, task in tasks.items()}
                    rows.append((length, positions, before, after))
                    print(
                        json.dumps(
                            {"length": length, "positions": positions, "seed": seed, "before": before, "after": after}
                        ),
                        flush=True,
                    )
    print("| tokens | positions | " + " | ".join(f"{n}, before | {n}, after" for n in asked.captions) + " |")
    for key in dict.fromkeys((length, positions) for length, positions, _, _ in rows):
        of = [row for row in rows if row[:2] == key]
        cells = [[row[when][n] for row in of] for n in asked.captions for when in (2, 3)]
        shown = (
            f"{statistics.fmean(c):.1f} ± {statistics.stdev(c):.1f}" if len(c) > 1 else f"{c[0]:.1f}" for c in cells
        )
        print(f"| {key[0]} | {key[1]} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
