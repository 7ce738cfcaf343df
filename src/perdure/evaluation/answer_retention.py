"""What a language model still answers of questions that it is never taught: evaluation sets, and held-out streams."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from perdure.core.learner import Core
from perdure.evaluation.zero_shot_retention import kept_of
from perdure.formatting import meant
from perdure.options.spec import build, parse_one
from perdure.scoring.official import COGNITION, PERCEPTION
from perdure.streams import STREAMS, build_stream
from perdure.streams.conversations import Conversation, messages
from perdure.streams.evaluation_sets import EVALUATION_SETS
from perdure.types import Batch, Data, Row, Stream

ANSWERS = "answers"
"""Rows are called `answers/<set>/<number>`; `after` is -1 for the pre-trained model."""
_TOGETHER = 64
"""Images that are held at once."""
_DESCRIBE = "Describe the image in one short sentence."


class AnswerRetention:
    """Questions that are answered before the first task and after each, by the learner as it answers anything.

    Args:
        held_out: evaluation sets such as `mme(path="MME")`; streams of conversations, or of captions, of which all that
            is a test part is asked, else all. Each task of a stream is a set of its own, with its own score.
        learner: with `generate`.

    Raises:
        ValueError: when a set is not as expected, or a stream has neither questions nor captions.
    """

    def __init__(self, held_out: Sequence[str], learner: Core) -> None:
        self.sets: dict[str, Stream] = {}
        for text in held_out:
            spec = parse_one(text)
            if spec.name in EVALUATION_SETS:
                stream = build(spec, EVALUATION_SETS, "evaluation set").stream()
            elif spec.name not in STREAMS:
                there = sorted({**STREAMS, **EVALUATION_SETS})
                near = meant(spec.name, there) or f"; known: {', '.join(there)}"
                raise ValueError(f"retain={text!r}: unknown stream or evaluation set {spec.name!r}{near}")
            else:
                stream = build_stream(spec, learner.backbone.preprocess, 0, measured=True)
            if stream.gives == "captions":
                stream = _described(stream)
            if stream.gives != "conversations":
                known = ", ".join(EVALUATION_SETS)
                raise ValueError(
                    f"retain={text!r}: there is nothing to answer; give conversations(path=...), captions, "
                    f"as_questions(...), or an evaluation set ({known})"
                )
            for task in stream:
                name = stream.name if len(stream) == 1 else f"{stream.name} {task.name}"
                name = name.replace("/", "_")  # what stands between the parts of a row's metric
                name = name if name not in self.sets else f"{name} {len(self.sets) + 1}"
                self.sets[name] = replace(stream, tasks=(learner.objective.planned(task),))

    def measure(self, learner: Core, after: int) -> list[Row]:
        """All numbers of each set, see `perdure.scoring.measure`; `after` says after which task."""
        rows = []
        for name, stream in self.sets.items():
            first = stream.tasks[0].test.__getitems__([0])["conversation"][0]
            size = max(1, _TOGETHER // max(1, len(first["images"])))
            (found,) = learner.objective.evaluate(learner, stream.tasks, size)
            rows += [Row(after, None, f"{ANSWERS}/{name}/{number}", float(value)) for number, value in found.items()]
        return rows


def answered(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each held-out set and number: the value `before`, `after` each task, the `drop` in the end, its `ratio`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        kind, _, rest = row.metric.partition("/")
        if kind == ANSWERS and row.on is None:
            name, _, number = rest.partition("/")
            found.setdefault(name, {}).setdefault(number, {})[row.after] = row.value
    return {name: {n: kept_of(values) for n, values in numbers.items()} for name, numbers in found.items()}


def share_or_points(number: str, value: float) -> str:
    """A number as people read it: shares in per cent, what the tools count or add up as it is."""
    last = number.rpartition("/")[2]
    rule = number.partition("/")[0]
    points = last in ("questions", "answered", "total", "perception", "cognition") or (
        rule in ("official", "guarded") and number.count("/") == 1 and last in (*PERCEPTION, *COGNITION)
    )
    return f"{value:,.4g}" if points else f"{value:.1%}"


def mean_kept(sets: Mapping[str, Mapping[str, Mapping[str, Any]]], number: str) -> float | None:
    """What is left of a number in the end, the mean over sets; None where a set has nothing to lose."""
    ratios = [numbers[number]["ratio"] for numbers in sets.values()]
    return None if not ratios or None in ratios else sum(ratios) / len(ratios)


class _Described:
    """Captioned images as conversations; all captions of an image are right answers."""

    def __init__(self, captioned: Data) -> None:
        self.captioned, self.labels = captioned, captioned.labels

    def __len__(self) -> int:
        return len(self.captioned)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        batch = self.captioned.__getitems__(positions)
        asked = [
            Conversation(
                messages([("user", (None, _DESCRIBE))]),
                (Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()),),
                list(texts),
            )
            for image, texts in zip(batch["image"], batch["text"], strict=True)
        ]
        return {"label": torch.as_tensor(batch["label"]), "conversation": asked}


def _described(stream: Stream) -> Stream:
    tasks = tuple(replace(task, test=_Described(task.test), score="cider") for task in stream)
    notes = {name: value for name, value in stream.notes.items() if name != "captions"}
    return replace(stream, tasks=tasks, notes={"conversations": _DESCRIBE} | notes)
