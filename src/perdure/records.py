"""What runs left on disk, read back: facts, results and summaries, finished or not."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perdure import drift, metrics
from perdure.figures import Series
from perdure.spec import parse
from perdure.types import Row
from perdure.wording import RARE

PHASES = ("prepare", "train", "finish", "evaluate")
"""What the time of a task is spent on."""
_COSTS = ("trainable_parameters", "stored_bytes", "seconds", "images_per_second", "peak_rss_bytes")


@dataclass(frozen=True)
class Run:
    """What a run's folder says; fields of files that are missing so far are empty."""

    folder: Path
    facts: dict[str, Any]
    """run.json"""
    summary: dict[str, Any]
    """summary.json"""
    rows: tuple[Row, ...]
    """results.jsonl"""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a folder that `perdure run` wrote, even while it is still being written.

        Raises:
            ValueError: when `run.json` is missing or a file is damaged.
        """
        if not (folder / "run.json").is_file():
            raise ValueError(
                f"{folder} has no run.json: it is not the folder of a run; give one that `perdure run` wrote"
            )
        facts, summary = _object(folder / "run.json"), _object(folder / "summary.json")
        for key in _OBJECTS:
            facts[key] = {} if facts.get(key) is None else facts[key]
        if wrong := _misshapen(facts):
            raise ValueError(f"{folder / 'run.json'} is damaged: {wrong}; restore it or run again")
        if not _is(summary.get("seconds_per_task"), [dict]):
            raise ValueError(
                f"{folder / 'summary.json'} is damaged: 'seconds_per_task' is no list of objects; restore it, or "
                f"remove it and 'perdure resume {folder}' writes it anew"
            )
        return cls(folder, facts, summary, tuple(_rows(folder / "results.jsonl")))

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for."""
        return dict(self.facts["config"])

    @property
    def method(self) -> str:
        """The method's spec, as text."""
        return str(self.config.get("method", "unknown method"))

    def tasks(self) -> list[dict[str, Any]]:
        """Descriptions of all tasks; empty ones for those that only the results mention."""
        listed = [t for t in self.facts["stream"].get("tasks") or [] if isinstance(t, dict)]
        seen = 1 + max((max(r.after, -1 if r.on is None else r.on) for r in self.rows), default=-1)
        return [*listed, *({} for _ in range(max(seen, len(self._stored())) - len(listed)))]

    def names(self) -> list[str]:
        """Names of all tasks."""
        return [str(task.get("name") or f"task {i + 1}") for i, task in enumerate(self.tasks())]

    @property
    def scored(self) -> tuple[str, str, str]:
        """Names of the score and its kin: accuracy, or recall."""
        return metrics.scored(self.rows)

    def matrix(self, metric: str | None = None) -> list[list[float | None]]:
        """Scores of all tasks, learnt or not: from the results, or from the summary where these are missing.

        Args:
            metric: its name; the run's score when None.
        """
        if metric is None and not self.rows and (stored := self._stored()):
            return stored
        return metrics.matrix_of(self.rows, metric or self.scored[0], len(self.tasks()))

    def averages(self) -> list[float | None]:
        """Mean accuracy over the tasks learnt so far, after each task."""
        return metrics.running_averages(self.matrix())

    def learnt(self) -> int:
        """Number of tasks after which all tasks so far were evaluated."""
        averages = self.averages()
        return next((i for i, value in enumerate(averages) if value is None), len(averages))

    def numbers(self) -> dict[str, float | None]:
        """Scores and costs by their key in summary.json, else from the results so far; `gap` and `seconds` besides."""
        done = self.learnt()
        given, with_id, task_id = ([row[:done] for row in self.matrix(m)[:done]] for m in (None, *self.scored[1:]))
        baseline = metrics.baseline_of(self.rows, self.scored[0], len(self.tasks()))[:done]
        so_far: dict[str, float | None] = {**dict.fromkeys(_COSTS), **metrics.summarise(given, baseline)}
        so_far |= {"acc_with_task_id": metrics.acc(with_id), "task_id_acc": metrics.acc(task_id)}
        so_far["feature_drift"] = drift.final([row[:done] for row in self.drift()[:done]])
        found = {k: v if (stored := _number(self.summary.get(k))) is None else stored for k, v in so_far.items()}
        found |= {key: _number(self.summary.get(key)) for key in RARE}
        acc, told = found["acc"], found["acc_with_task_id"]
        found["gap"] = None if acc is None or told is None else told - acc
        if seconds := self.seconds():
            found["seconds"] = sum(sum(task.values()) for task in seconds)
        return found

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each phase, for each task."""
        listed = self.summary.get("seconds_per_task") or []
        return [{p: _number(task.get(p)) or 0.0 for p in PHASES} for task in listed if isinstance(task, dict)]

    def _stored(self) -> list[list[float | None]]:
        stored = self.summary.get("matrix") or []
        if not isinstance(stored, list) or any(not isinstance(r, list) or len(r) != len(stored) for r in stored):
            raise ValueError(
                f"{self.folder / 'summary.json'} is damaged: 'matrix' is not square; restore it, or remove it and "
                f"'perdure resume {self.folder}' writes it anew"
            )
        return [[_number(v) for v in row] for row in stored]

    def drift(self) -> list[list[float | None]]:
        """Feature drift of each task (columns) after each task (rows)."""
        return self.matrix(drift.METRIC)

    def drifts(self) -> list[float | None]:
        """Mean feature drift of the old tasks after each task."""
        return [_mean(row) for row in self.drift()]

    def facts_of_tasks(self) -> dict[str, list[float | None]]:
        """What the method said of itself as a whole after each task, such as `rank` and `complexity`."""
        found: dict[str, list[float | None]] = {}
        for row in self.rows:
            if row.on is None and row.after >= 0 and "/" not in row.metric:
                found.setdefault(row.metric, [None] * len(self.tasks()))[row.after] = row.value
        return found

    def layers(self, measure: str) -> dict[str, list[float | None]]:
        """What the method said of each layer's input after each task, such as `free_dimension`."""
        found: dict[str, list[float | None]] = {}
        for row in self.rows:
            kind, _, layer = row.metric.partition("/")
            if row.on is None and row.after >= 0 and kind == measure and layer:
                found.setdefault(layer, [None] * len(self.tasks()))[row.after] = row.value
        return found

    def over_layers(self, measure: str) -> list[float | None]:
        """The mean of `layers` over layers, after each task."""
        columns = zip(*self.layers(measure).values(), strict=True)
        return [_mean(column) for column in columns] or [None] * len(self.tasks())


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed and the order of classes."""

    label: str
    runs: tuple[Run, ...]

    def spread(self, key: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation of a number over the runs that have it."""
        values = [v for run in self.runs if (v := run.numbers().get(key)) is not None]
        return metrics.spread(values) if values else None

    def curve(self, values: Callable[[Run], list[float | None]], colour: int) -> Series | None:
        """A number of each run after each task: mean over the runs that have it, and its standard deviation.

        None when no run has any.
        """
        columns = [[v for v in c if v is not None] for c in _transposed([values(run) for run in self.runs])]
        if not any(columns):
            return None
        both = [metrics.spread(column) if column else (None, None) for column in columns]
        return Series(self.label, [m for m, _ in both], [s for _, s in both] if len(self.runs) > 1 else (), colour)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of the same method and settings together, in the order given; other settings are added to the label."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_settings(run), sort_keys=True, default=str), []).append(run)
    groups = []
    for members in found.values():
        same = [_settings(other[0]) for other in found.values() if other[0].method == members[0].method]
        mine = _settings(members[0])
        differing = [k for k in mine if any(other.get(k) != mine[k] for other in same)]
        groups.append(Group(" · ".join([members[0].method, *(f"{k} {mine[k]}" for k in differing)]), tuple(members)))
    return groups


def _settings(run: Run) -> dict[str, Any]:
    """Configuration without what repetitions vary: seeds, the order of classes, when and where to save."""
    return {k: _unseeded(v) for k, v in run.config.items() if k not in ("seed", "out", "save_every")}


def _unseeded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        specs = parse(value)
    except ValueError:
        return value
    varied = ("seed", "order", "class_order")
    return " + ".join(str(replace(s, kwargs=tuple((k, v) for k, v in s.kwargs if k not in varied))) for s in specs)


def _transposed(lists: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[each[i] for each in lists if i < len(each)] for i in range(max(map(len, lists), default=0))]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_remedy(path)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (expected a JSON object): {_remedy(path)}")
    return found


def _remedy(path: Path) -> str:
    if path.name != "summary.json":
        return "restore it or run again"
    return f"restore it, or remove it and 'perdure resume {path.parent}' writes it anew"


_OBJECTS = ("config", "resolved", "backbone", "versions", "stream")
_OF_TASK = {"classes": [int], "names": [str], "train": int, "test": int}


def _misshapen(facts: dict[str, Any]) -> str:
    """What of run.json is not what it should be, or nothing."""
    if wrong := next((key for key in _OBJECTS if not _is(facts[key], dict)), None):
        return f"{wrong!r} is not an object"
    if not (_is(facts.get("seed"), int) and _is(facts["stream"].get("scenario"), str)):
        return "'seed' is no number, or 'scenario' of 'stream' no text"
    tasks = facts["stream"].get("tasks")
    if not _is(tasks, [dict]):
        return "'tasks' of 'stream' is no list of objects"
    for task in tasks or ():
        for key, kind in _OF_TASK.items():
            if not _is(task.get(key), kind):
                return f"{key!r} of a task is {json.dumps(task[key])[:40]}"
    return ""


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is None or of a type, or a list of such when `kind` is the list of a type."""
    if isinstance(kind, list):
        return value is None or (isinstance(value, list) and all(isinstance(each, kind[0]) for each in value))
    return value is None or isinstance(value, kind)


def _rows(path: Path) -> Iterable[Row]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # What stands after the last line break is still being written, or was cut when the run was killed.
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            row = Row(int(found["after"]), None if found["on"] is None else int(found["on"]), str(found["metric"]), 0.0)
            value = _number(found["value"])
            if row.after < -1 or (row.on or 0) < 0:
                raise ValueError("no task has such a number")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, is damaged: {error}; remove the line, or resume the run from its last task"
            ) from error
        if value is not None:
            yield Row(row.after, row.on, row.metric, value)
