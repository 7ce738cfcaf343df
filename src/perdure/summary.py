"""What a run's checkpoints add up to: summary.json."""

from pathlib import Path
from typing import Any

from perdure import checkpoint, drift, metrics
from perdure.ranking import CUTS
from perdure.retention import kept
from perdure.runtime import peak_memory
from perdure.train import Fitted
from perdure.types import Row, Stream


def facts_of(fitted: Fitted, evaluate: float) -> dict[str, Any]:
    """What a task's manifest says of its cost; `evaluate` in seconds."""
    return {
        "seconds": {
            "prepare": fitted.prepare,
            "train": fitted.train,
            "finish": fitted.finish,
            "evaluate": evaluate,
        },
        "images": fitted.images,
        "trainable_parameters": fitted.trainable,
        "peak_rss_bytes": peak_memory(),
    }


def summarise(out: Path, stream: Stream) -> dict[str, Any]:
    """The content of summary.json, from the folder's whole checkpoints."""
    done = checkpoint.whole(out)
    tasks = done[-1].learnt
    rows = [row for each in done for row in each.rows if row.on is None or row.on < tasks]
    score, told, task_id = metrics.scored(rows)
    matrices = {m: metrics.matrix_of(rows, m, tasks) for m in (score, told, task_id)}
    seconds = [each.manifest["seconds"] for each in done]
    train = sum(s["train"] for s in seconds)
    referenced = [row.value for row in rows if row.metric == "referenced_bytes"]
    stored = (done[-1].folder / "learner.safetensors").stat().st_size + int(referenced[-1] if referenced else 0)
    found = metrics.summarise(matrices[score], metrics.baseline_of(rows, score, tasks)) | {
        "acc_with_task_id": metrics.acc(matrices[told]),
        "task_id_acc": metrics.acc(matrices[task_id]),
        "forgetting_with_task_id": metrics.forgetting(matrices[told]),
        "feature_drift": drift.final(metrics.matrix_of(rows, drift.METRIC, tasks)),
        "score": score,
        "matrix": matrices[score],
        "trainable_parameters": done[-1].manifest["trainable_parameters"],
        "stored_bytes": stored,
        "seconds_per_task": seconds,
        "images_per_second": sum(each.manifest["images"] for each in done) / train if train else None,
        "peak_rss_bytes": max(each.manifest["peak_rss_bytes"] for each in done),
        "skipped_images": len(stream.notes.get("skipped", [])),
    }
    if score == metrics.RECALL[0]:
        found["recall"] = _recall(rows, tasks)
    if stream.notes.get("sequence"):
        found |= {"transfer": metrics.transfer(matrices[score]), "average": metrics.average(matrices[score])}
    if zero_shot := kept(rows):
        ratios = [facts["ratio"] for facts in zero_shot.values()]
        known = None not in ratios
        found |= {"zero_shot": zero_shot, "zero_shot_ratio": sum(ratios) / len(ratios) if known else None}
    return found


def _recall(rows: list[Row], tasks: int) -> dict[str, dict[str, list[float | None]]]:
    """Recall at 1, 5 and 10 both ways on each task in the end, and `rsum` in per cent: own gallery, and the union."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for gallery in ("own", "union"):
        names = [f"{way}@{k}" for way in ("i2t", "t2i") for k in CUTS]
        last = {n: metrics.matrix_of(rows, f"{gallery}/{n}", tasks)[-1] for n in names}
        rsum = [None if None in each else 100 * sum(each) for each in zip(*last.values(), strict=True)]
        found[gallery] = {**last, "rsum": rsum}
    return found
