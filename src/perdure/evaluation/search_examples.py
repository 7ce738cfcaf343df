"""What a retrieval learner finds before and after a stream: queries and pictures for whoever reads the report."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core import checkpoint
from perdure.core.learner import Core
from perdure.evaluation.examples import EXAMPLES, encoded, read_examples
from perdure.types import Batch, Stream, Task

_QUERIES = 10
_SHOWN = 5


def found_before(learner: Core, stream: Stream, out: Path) -> None:
    """Choose queries, and note what the pre-trained model finds; nothing for other objectives.

    Args:
        learner: untaught, grown for all tasks of the stream.
        stream: with its test sets, in all of which is searched.
        out: the run's folder.
    """
    if "captions" not in learner.objective.asks:
        return
    tasks = [task for task in stream if len(task.test)]
    if not tasks:
        return
    each = -(-_QUERIES // len(tasks))
    queries = [_query(tasks[i % len(tasks)], i // len(tasks), each) for i in range(_QUERIES)]
    found = _found(learner, tasks, [query["text"] for query in queries])
    for query, best in zip(queries, found, strict=True):
        query["before"] = best
    searched = [task.index for task in tasks]
    checkpoint.write_sealed(out / EXAMPLES, {"queries": queries, "searched": searched, "pictures": {}})


def found_after(learner: Core, stream: Stream, out: Path) -> None:
    """Note what the learner finds now among the same images, and the pictures of all that was found.

    Where some of them are not at hand any more, what was found when they were stays.
    """
    if "captions" not in learner.objective.asks or not (out / EXAMPLES).exists():
        return
    noted = read_examples(out)
    queries = noted.get("queries", [])
    if noted["pictures"] and noted.get("learnt") == learner.learnt:
        return
    searched = noted.get("searched", range(len(stream)))
    tasks = [task for task in stream if task.index in searched and len(task.test)]
    if "searched" in noted and len(tasks) < len(searched):
        return
    found = _found(learner, tasks, [query["text"] for query in queries])
    for query, best in zip(queries, found, strict=True):
        query["after"] = best
    wanted = {p for query in queries for p in (*query["before"], *query["after"], query["pair"])}
    checkpoint.write_sealed(out / EXAMPLES, {**noted, "learnt": learner.learnt, "pictures": _pictures(tasks, wanted)})


def _query(task: Task, number: int, of: int) -> dict[str, Any]:
    """A caption of the task's test images, the `number`-th of so many that are spread evenly over them."""
    batch = task.test.__getitems__([number * len(task.test) // of])
    return {"task": task.name, "text": batch["text"][0][0], "pair": int(batch["pair"][0])}


def _found(learner: Core, tasks: list[Task], texts: list[str]) -> list[list[int]]:
    """The identities of the images that fit each text best, best first."""
    gallery: dict[int, Tensor] = {}
    with learner.inference():
        asked = F.normalize(learner.embed_texts(texts), dim=1).cpu()
        for task in tasks:
            for batch in learner.batches(learner.cache.test(task.test), 256):
                features = F.normalize(learner.encode(batch), dim=1).cpu()
                gallery |= zip(batch["pair"].tolist(), features, strict=True)
    pairs = list(gallery)
    best = (asked @ torch.stack(list(gallery.values())).T).topk(min(_SHOWN, len(pairs)), dim=1).indices
    return [[pairs[i] for i in row] for row in best.tolist()]


def _pictures(tasks: list[Task], wanted: set[int]) -> dict[str, str]:
    """PNG in base64 of each wanted identity."""
    found: dict[str, str] = {}
    for task in tasks:
        for start in range(0, len(task.test), 256):
            batch: Batch = task.test.__getitems__(range(start, min(start + 256, len(task.test))))
            for pair, image in zip(batch["pair"].tolist(), batch["image"], strict=True):
                if pair in wanted and str(pair) not in found:
                    found[str(pair)] = encoded(image)
    return found
