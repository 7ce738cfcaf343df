"""What a run's checkpoints add up to: summary.json; and which images they were taught."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure import metrics
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint
from perdure.core.manifests import TAUGHT as TAUGHT
from perdure.evaluation import feature_drift as drift
from perdure.evaluation import per_class
from perdure.evaluation.answer_retention import answered, mean_kept
from perdure.evaluation.zero_shot_retention import kept
from perdure.formatting import command
from perdure.metrics import CUTS
from perdure.options.spec import parse_one
from perdure.scoring import common_top
from perdure.storage import schema
from perdure.storage.schema import Damaged, Summary
from perdure.streams import ConversationSet, ImageSet
from perdure.training.early_stop import facts_of_stops
from perdure.training.loop import Fitted
from perdure.training.online import along
from perdure.training.runtime import peak_memory
from perdure.types import Row, Task

SUMMARY = "summary.json"
_HASHES = "hashes"
COSTS = ("finished", "seconds", "images", "trainable_parameters", "peak_rss_bytes")
"""What `facts_of` gives."""


def facts_of(fitted: Fitted, evaluate: float) -> dict[str, Any]:
    """What a task's manifest says of its cost, and when it was done; `evaluate` in seconds."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
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


def write_summary(out: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Write summary.json anew; returns its content.

    Args:
        out: the run's or the learner's folder.
        note: is told when the file said something else of the same tasks.
    """
    done = checkpoint.whole(out)
    path, found = out / SUMMARY, summary_of(out, done)
    if path.exists():
        said = _read_leniently(path)
        earlier = said.get("manifest") in [each.seal for each in done[:-1]]
        if not earlier and (not said or contradicts(said, found)):
            note(f"{path} was not what the manifests say: it was written anew from them")
    checkpoint.write_sealed(path, found)
    return found


def contradicts(said: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a summary says something else than what manifests add up to; other versions may say more, or less."""
    return any(key in found and found[key] != value for key, value in said.items())


def drop_summary_beyond(out: Path, learnt: int) -> None:
    """Remove the summary of more tasks than there are any more: the last ones were removed to go back."""
    matrix = _read_leniently(out / SUMMARY).get("matrix")
    if isinstance(matrix, list) and len(matrix) > learnt:
        (out / SUMMARY).unlink()


def _read_leniently(path: Path) -> dict[str, Any]:
    """What is about to be written anew; nothing when it cannot be read."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_bytes()))
    return {}


def summary_of(out: Path, done: Sequence[Checkpoint]) -> dict[str, Any]:
    """The content of summary.json, from the folder's record and its whole checkpoints, of which there are some.

    Raises:
        Damaged: when a manifest does not say what it cost, or what was learnt is missing.
    """
    tasks = done[-1].learnt
    rows = [row for each in done for row in each.rows]
    seconds = [_cost(each, "seconds") for each in done]
    train = sum(s["train"] for s in seconds)
    referenced = [row.value for row in rows if row.metric == "referenced_bytes"]
    notes: dict[str, Any] = dict(checkpoint.read_record(out)["stream"])
    sources = checkpoint.sources(done).values()
    config = checkpoint.read_record(out)["config"]
    unlabelled = {task.index for task in done[-1].tasks if task.pretext}
    found = scores_of(rows, tasks, scored_by(config, [task.score for task in done[-1].tasks[:tasks]]), unlabelled) | {
        "trainable_parameters": _cost(done[-1], "trainable_parameters"),
        "stored_bytes": checkpoint.stored_bytes(done[-1]) + int(referenced[-1] if referenced else 0),
        "seconds_per_task": seconds,
        "evaluation_seconds": sum(s["evaluate"] for s in seconds),
        "images_per_second": sum(_cost(each, "images") for each in done) / train if train else None,
        "peak_rss_bytes": max(_cost(each, "peak_rss_bytes") for each in done),
        "skipped_images": sum(len(facts.get("skipped", ())) for facts in (notes, *sources)),
        "manifest": done[-1].seal,
    }
    matrix = found["matrix"]
    found |= per_class.class_facts(done)
    if found["score"] == metrics.RECALL[0]:
        found["recall"] = _recall(rows, tasks)
    if notes.get("sequence"):
        whole = {"transfer": metrics.transfer(matrix), "average": metrics.average(matrix)}
        found |= dict.fromkeys(whole) if found.get("unlike_scores") else whole
    if notes.get("online"):
        way = along(rows, notes["train_images"])
        found |= {"online": way, "anytime_acc": sum(way["begun"]) / len(way["begun"])}
    found |= facts_of_stops(config, rows, tasks)
    if notes.get("few_shot"):
        found |= _few_shot(matrix, notes["test_images"][:tasks])
    if zero_shot := kept(rows):
        ratios = [facts["ratio"] for facts in zero_shot.values()]
        known = None not in ratios
        found |= {"zero_shot": zero_shot, "zero_shot_ratio": sum(ratios) / len(ratios) if known else None}
    if answers := answered(rows):
        kept_answers = {f"answers_kept_{number}": mean_kept(answers, number) for number in ("strict", "lenient")}
        found |= {"answers": answers} | kept_answers
    return found


def _few_shot(matrix: metrics.Matrix, images: Sequence[int]) -> dict[str, Any]:
    """What is told of few-shot class-incremental learning, over images and not over tasks: the base has most."""
    after, means = metrics.session_accuracies(matrix, images), metrics.harmonic_means(matrix, images)
    drop = None if after[0] is None or after[-1] is None else after[0] - after[-1]
    both = {"accuracies": after, "harmonic_means": means}
    return {"few_shot": both, "performance_drop": drop, "harmonic_mean": means[-1]}


def scored_by(config: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    """How the answers of each task are scored, where they are.

    Args:
        config: of the run.
        scores: of each task as its stream has it; "" leaves it to the objective.
    """
    objective = parse_one(str(config.get("objective", "classify")))
    default = str(dict(objective.kwargs).get("score") or "exact")
    return [score or default for score in scores] if objective.name == "generate" else []


def scores_of(
    rows: Sequence[Row], tasks: int, scores: Sequence[str] = (), unlabelled: Collection[int] = ()
) -> dict[str, Any]:
    """The numbers that measurements add up to after `tasks` tasks; what was measured beyond them does not count.

    Args:
        rows: all measurements.
        tasks: how many tasks count.
        scores: how the answers of each task are scored, see `scored_by`. Where their scales differ there are no means.
        unlabelled: steps of pre-training, of which there are no scores; means are over the other tasks.
    """
    rows = [row for row in rows if row.after < tasks and (row.on is None or row.on < tasks)]
    score, told, task_id = metrics.scored(rows)
    matrix = metrics.matrix_of(rows, score, tasks)

    def known(metric: str) -> metrics.Matrix:
        return metrics.taught_only(metrics.matrix_of(rows, metric, tasks), unlabelled)

    given, recognised = known(told), known(task_id)
    baseline = [v for i, v in enumerate(metrics.baseline_of(rows, score, tasks)) if i not in unlabelled]
    found: dict[str, Any] = metrics.summarise(known(score), baseline) | {
        "acc_with_task_id": metrics.acc(given),
        "task_id_acc": metrics.acc(recognised),
        "forgetting_with_task_id": metrics.forgetting(given),
        "feature_drift": drift.final(known(drift.FEATURE_DRIFT)),
        "score": score,
        "matrix": matrix,
    }
    return found | _said(rows, tasks, scores[:tasks]) if score == metrics.SAID[0] else found


def _said(rows: Sequence[Row], tasks: int, scores: Sequence[str]) -> dict[str, Any]:
    """What is known of answers besides their strict score."""
    others = {kind: metrics.matrix_of(rows, kind, tasks) for kind in ("lenient", "empty", "unparsable")}
    lenient = others["lenient"]
    found: dict[str, Any] = {f"{kind}_matrix": matrix for kind, matrix in others.items()} | {
        "lenient_acc": metrics.acc(lenient),
        "lenient_forgetting": metrics.forgetting(lenient),
        "empty": metrics.acc(others["empty"]),
        "unparsable": metrics.acc(others["unparsable"]),
        "scores": list(scores),
        "unlike_scores": unlike_scores(scores),
    }
    return found | dict.fromkeys(_MEANS) if found["unlike_scores"] else found


_MEANS = ("acc", "aaa", "forgetting", "bwt", "fwt", "lenient_acc", "lenient_forgetting")
"""What would be means over tasks of scores; `retention`, the mean of ratios, has no scale."""


def unlike_scores(scores: Sequence[str]) -> str:
    """Why scores of tasks have no mean; "" where they have one."""
    try:
        common_top(scores)
    except ValueError as error:
        return str(error)
    return ""


def read_summary(out: Path, must_be_sealed: bool | None = None) -> Summary:
    """summary.json of a finished run.

    Args:
        out: the run's folder.
        must_be_sealed: None judges by run.json.

    Raises:
        ValueError: when the run is not finished, or the file is not what was written.
    """
    path = out / SUMMARY
    if not path.is_file():
        raise ValueError(f"{out} is not finished: it has no {SUMMARY}. Go on with {command('resume', out)}")
    if must_be_sealed is None:
        must_be_sealed = "format" in checkpoint.read_record(out)
    remedy = f"restore it, or remove it and {command('resume', out)} writes it anew"
    found = schema.read_typed(path, Summary, remedy, must_be_sealed)
    matrix = found.get("matrix", [])
    if any(len(row) != len(matrix) for row in matrix):
        raise Damaged(f"{path} is damaged: 'matrix' is not square; {remedy}")
    return found


def _cost(checkpoint: Checkpoint, key: str) -> Any:
    """What a task took, which every manifest says that a run or a learner wrote."""
    facts: dict[str, Any] = dict(checkpoint.manifest)
    if key not in facts:
        raise Damaged(f"{checkpoint.path} is damaged: it has no {key!r}; restore it")
    return facts[key]


def _recall(rows: list[Row], tasks: int) -> dict[str, dict[str, list[float | None]]]:
    """Recall at 1, 5 and 10 both ways on each task in the end, and `rsum` in per cent: own gallery, and the union."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for gallery in ("own", "union"):
        names = [f"{way}@{k}" for way in ("i2t", "t2i") for k in CUTS]
        last = {n: metrics.matrix_of(rows, f"{gallery}/{n}", tasks)[-1] for n in names}
        rsum = [None if None in each else 100 * sum(each) for each in zip(*last.values(), strict=True)]
        found[gallery] = {**last, "rsum": rsum}
    return found


def taught_files(hashes: Mapping[int, Tensor], last: int) -> dict[str, dict[str, Tensor]]:
    """What is kept of the images of one checkpoint's tasks, of which `last` is the last: 8 bytes of hash an image."""
    named = {_HASHES if index == last else f"{_HASHES}/{index}": kept for index, kept in hashes.items()}
    return {TAUGHT: named} if named else {}


def hashes_at_hand(tasks: Sequence[Task]) -> dict[int, Tensor]:
    """Hashes (n,) of the images of those of `tasks` whose data is at hand, by the position of the task."""
    found = {t.index: t.train.hashes() for t in tasks if isinstance(t.train, ImageSet | ConversationSet)}
    return {index: torch.unique(hashes[hashes != 0]) for index, hashes in found.items()}  # 0 is of one that is gone


def taught_hashes(folder: Path) -> dict[int, Tensor]:
    """The same of the images taught to the learner in `folder`, as far as they are known."""
    beside = [(each, checkpoint.beside(each, TAUGHT)) for each in checkpoint.whole(folder)]
    return {each.task_of(name): hashes for each, tensors in beside for name, hashes in tensors.items()}


def of_all_tasks(hashes: Iterable[Mapping[int, Tensor]]) -> Tensor:
    """The hashes (n,) of all tasks of several learners."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(kept for each in hashes for kept in each.values())])
