"""Zero-shot retention: what a CLIP still knows of data sets that it is never taught."""

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any

from perdure.core.learner import Core
from perdure.objectives.zeroshot import class_texts
from perdure.options.spec import parse_one
from perdure.streams import STREAMS, build_stream
from perdure.types import Row, Stream, Union

ZERO_SHOT = "zero_shot"
"""Rows are called `zero_shot/<data set>`; `after` is -1 for the pre-trained model."""


class Retention:
    """Held-out data sets on which zero-shot accuracy is measured before the first task and after each.

    Images are encoded as the learner encodes them (with its prompts, experts and adapters), class names by its text
    tower; heads have no part in it.

    Args:
        held_out: streams; all their test images are scored among all their classes.
        learner: with a text tower.
        measured: whether of a stream without a test part all images are scored, and not those held out of it.

    Raises:
        ValueError: when the backbone has no text tower, or a stream is not as expected.
    """

    def __init__(self, held_out: Sequence[str], learner: Core, measured: bool = False) -> None:
        if held_out and "text" not in learner.backbone.towers():
            raise ValueError(
                f"retain={held_out[0]!r}: zero-shot accuracy needs a text tower, which {learner.backbone.spec} lacks: "
                "use clip(path=...) or pocket(), or leave retain out"
            )
        if held_out and learner.backbone.layers:
            raise ValueError(
                f"retain={held_out[0]!r}: {learner.backbone.spec} gives features that texts cannot be compared with: "
                "leave layers or retain out"
            )
        self.sets: dict[str, Stream] = {}
        for text in held_out:
            spec = parse_one(text)
            options = inspect.signature(STREAMS[spec.name]).parameters if spec.name in STREAMS else {}
            divided = {name for name, _ in spec.kwargs} & {"tasks", "increments", "scenario"}
            whole = {"tasks": 1} if "tasks" in options and not divided else {}
            stream = build_stream(text, learner.backbone.preprocess, 0, measured, **whole)
            if stream.gives != "classes" or len({c for task in stream for c in task.classes}) < 2:
                raise ValueError(f"retain={text!r}: there are no classes to tell apart; give a labelled data set")
            name = stream.name if stream.name not in self.sets else f"{stream.name} {len(self.sets) + 1}"
            self.sets[name] = stream
        self.templates = learner.objective.templates

    def measure(self, learner: Core, after: int) -> list[Row]:
        """Accuracy on each data set; `after` says after which task."""
        return [Row(after, None, f"{ZERO_SHOT}/{name}", self._accuracy(learner, s)) for name, s in self.sets.items()]

    def _accuracy(self, learner: Core, stream: Stream) -> float:
        names = dict(chain.from_iterable(zip(task.classes, task.names, strict=True) for task in stream))
        place = {c: i for i, c in enumerate(names)}
        right = total = 0
        with learner.inference():
            classes = class_texts(learner, list(names.values()), self.templates)
            tests = Union([learner.cache.test(task.test) for task in stream])
            for batch in learner.batches(tests, 256):
                answer = (learner.encode(batch) @ classes.T).argmax(1).tolist()
                wanted = [place[c] for c in batch["label"].tolist()]
                right += sum(a == w for a, w in zip(answer, wanted, strict=True))
                total += len(wanted)
        return right / total


def kept(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each held-out data set: accuracy `before`, `after` each task, the `drop` in the end, and its `ratio`."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        kind, _, name = row.metric.partition("/")
        if kind == ZERO_SHOT and row.on is None:
            found.setdefault(name, {})[row.after] = row.value
    return {name: kept_of(values) for name, values in found.items()}


def kept_of(values: dict[int, float]) -> dict[str, Any]:
    """What became of a number: `before`, `after` each task, the `drop` in the end, and what is left as `ratio`.

    Args:
        values: by the task after which it was measured, -1 for the pre-trained model.
    """
    before = values.get(-1)
    after = [value for task, value in sorted(values.items()) if task >= 0]
    facts: dict[str, Any] = {"before": before, "after": after, "drop": None, "ratio": None}
    if before is not None and after:
        facts |= {"drop": before - after[-1], "ratio": after[-1] / before if before else None}
    return facts
