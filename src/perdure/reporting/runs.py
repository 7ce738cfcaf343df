"""What runs left on disk, read back: facts, results and summaries, finished or not."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from perdure import metrics
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint, read_record
from perdure.evaluation import feature_drift as drift
from perdure.evaluation.answer_retention import answered, mean_kept
from perdure.formatting import RARE, command
from perdure.options.spec import Spec, parse
from perdure.reporting.figures import Series
from perdure.storage import schema
from perdure.storage.schema import Damaged, Line, RunRecord, Steps, Summary, TaskFacts
from perdure.training.config import BESIDE_RESULTS, VARIED, RunConfig
from perdure.training.summary import (
    SUMMARY,
    contradicts,
    read_summary,
    scored_by,
    scores_of,
    summary_of,
    unlike_scores,
)
from perdure.types import Row

PHASES = ("prepare", "train", "finish", "evaluate")
"""What the time of a task is spent on."""
STEPS = "steps.json"
"""In a grid's folder: the step cost of each of its methods, written by `perdure.experiments.step_cost`."""
_RESULTS = "results.jsonl"
_COSTS = (
    "trainable_parameters",
    "stored_bytes",
    "seconds",
    "evaluation_seconds",
    "images_per_second",
    "peak_rss_bytes",
)


def ignore(text: str) -> None:
    """Who is told nothing."""


@dataclass(frozen=True)
class RunResults:
    """What a run's folder says; what is missing so far is empty."""

    folder: Path
    facts: RunRecord
    """run.json, with the tasks that a learner was taught"""
    summary: Summary
    """summary.json, or what it should say"""
    rows: tuple[Row, ...]
    """results.jsonl, or what the manifests know better"""

    @classmethod
    def read(cls, folder: Path, note: Callable[[str], None] = ignore) -> "RunResults":
        """Read a folder that `perdure run` or `perdure learn` wrote, even while it is still being written.

        Where there are manifests they are believed; results and summary only repeat what they say.

        Args:
            folder: of the run.
            note: is told of results or a summary that say something else.

        Raises:
            ValueError: when `run.json` is missing, or a file that counts is damaged.
        """
        facts, done = read_record(folder), checkpoint.whole(folder)
        if facts["config"].get("stream") and not facts["stream"]["tasks"]:
            raise Damaged(f"{folder / 'run.json'} is damaged: it names no tasks; restore it, or run again")
        if not done:
            summary = read_summary(folder, "format" in facts) if (folder / SUMMARY).exists() else Summary()
            rows = tuple(_rows(folder / _RESULTS, facts))
            if not rows:  # the results are gone: the summary has the scores
                score, matrix = summary.get("score", metrics.ACCURACY[0]), summary.get("matrix", [])
                cells = ((i, j, value) for i, row in enumerate(matrix) for j, value in enumerate(row))
                rows = tuple(Row(i, j, score, value) for i, j, value in cells if value is not None)
            return cls(folder, facts, summary, rows)
        declared = facts["stream"]["tasks"]
        taught = [cast(TaskFacts, task.describe()) for task in done[-1].tasks[len(declared) :]]
        facts = {**facts, "stream": {**facts["stream"], "tasks": [*declared, *taught]}}
        measured = [row for each in done for row in each.rows]
        _tell_other_results(folder, measured, note)
        finite = tuple(row for row in measured if math.isfinite(row.value))
        finished = (folder / SUMMARY).exists() or done[-1].learnt >= len(declared)
        return cls(folder, facts, _known_summary(folder, done, note) if finished else Summary(), finite)

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for."""
        return dict(self.facts["config"])

    @property
    def method(self) -> str:
        """The method's spec, as text."""
        return str(self.config.get("method", "unknown method"))

    @property
    def seed(self) -> int | None:
        """Of all randomness, where it is recorded."""
        return self.facts.get("seed")

    def tasks(self) -> list[dict[str, Any]]:
        """Descriptions of all tasks; empty ones for those that only the results mention."""
        listed: list[dict[str, Any]] = [dict(task) for task in self.facts["stream"]["tasks"]]
        seen = 1 + max((max(r.after, -1 if r.on is None else r.on) for r in self.rows), default=-1)
        return [*listed, *({} for _ in range(seen - len(listed)))]

    def names(self) -> list[str]:
        """Names of all tasks."""
        return [str(task.get("name") or f"task {i + 1}") for i, task in enumerate(self.tasks())]

    @property
    def scored(self) -> tuple[str, str, str]:
        """Names of the score and its kin: accuracy, or recall."""
        return metrics.scored(self.rows)

    def matrix(self, metric: str | None = None) -> list[list[float | None]]:
        """Scores of all tasks, learnt or not.

        Args:
            metric: its name; the run's score when None.
        """
        return metrics.matrix_of(self.rows, metric or self.scored[0], len(self.tasks()))

    def averages(self, metric: str | None = None) -> list[float | None]:
        """Mean score over the tasks learnt so far, after each task; none where tasks' scores have other scales.

        Args:
            metric: its name; the run's score when None.
        """
        averages = metrics.running_averages(self.matrix(metric))
        return [None] * len(averages) if unlike_scores(self.scores()) else averages

    def scores(self) -> list[str]:
        """How the answers of each task are scored, where they are."""
        return scored_by(self.config, [str(task.get("score", "")) for task in self.tasks()])

    def learnt(self) -> int:
        """Number of tasks that were measured right after they were learnt; steps of pre-training count as well."""
        matrix, without = self.matrix(), self.unlabelled()
        return next((i for i, row in enumerate(matrix) if row[i] is None and i not in without), len(matrix))

    @property
    def so_far(self) -> str:
        """How many of its tasks an unfinished run has learnt, in words; else empty."""
        learnt, tasks = self.learnt(), len(self.tasks())
        return "" if learnt == tasks or self.summary else f"{learnt} of {tasks} tasks"

    def unlabelled(self) -> set[int]:
        """Which tasks were steps of pre-training, which nothing is measured on."""
        return {i for i, task in enumerate(self.tasks()) if task.get("pretext")}

    def numbers(self) -> dict[str, float | None]:
        """Scores and costs by their key in summary.json, else from the results so far.

        Besides: `new_task_acc`, the `gap` between scores with and without the task told, `seconds` in all, and the
        `step_cost` that was measured in the run's grid.
        """
        done = self.learnt()
        found = scores_of(self.rows, done, self.scores(), self.unlabelled())
        so_far = {k: v for k, v in found.items() if v is None or _number(v) is not None}
        if answers := answered(self.rows):
            so_far |= {f"answers_kept_{number}": mean_kept(answers, number) for number in ("strict", "lenient")}
        known = dict.fromkeys((*_COSTS, *RARE)) | so_far
        found = {k: v if (stored := _number(self.summary.get(k))) is None else stored for k, v in known.items()}
        taught, matrix = [i for i in range(done) if i not in self.unlabelled()], self.matrix()
        new = metrics.new_task_acc([[matrix[i][j] for j in taught] for i in taught])
        found["new_task_acc"] = None if unlike_scores(self.scores()) else new
        acc, told = found["acc"], found["acc_with_task_id"]
        found["gap"] = None if acc is None or told is None else told - acc
        if seconds := self.seconds():
            found["seconds"] = sum(sum(task.values()) for task in seconds)
            found["evaluation_seconds"] = sum(task["evaluate"] for task in seconds)
        step = steps_of(self.folder.parent)["methods"].get(self.method)
        return found | {"step_cost": step["ratio"] if step else None}

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each phase, for each task."""
        listed = self.summary.get("seconds_per_task") or []
        return [{p: _number(task.get(p)) or 0.0 for p in PHASES} for task in listed]

    def few_shot(self, number: str) -> list[float | None]:
        """Of a few-shot stream, once it is learnt: `accuracies` or `harmonic_means` after each task."""
        return self.summary.get("few_shot", {}).get(number) or [None] * len(self.tasks())

    def online(self, number: str) -> list[float | None]:
        """Of a pass without borders, once it is over: `images` seen, or mean accuracy on what had `begun` by then."""
        return list(self.summary.get("online", {}).get(number, ()))

    def drift(self) -> list[list[float | None]]:
        """Feature drift of each task (columns) after each task (rows)."""
        return self.matrix(drift.FEATURE_DRIFT)

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
    runs: tuple[RunResults, ...]

    @property
    def finished(self) -> bool:
        """Whether its scores are final ones."""
        return not self.runs[0].so_far

    def spread(self, key: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation of a number over the runs that have it."""
        values = [v for run in self.runs if (v := run.numbers().get(key)) is not None]
        return metrics.spread(values) if values else None

    def curve(self, values: Callable[[RunResults], list[float | None]], colour: int) -> Series | None:
        """A number of each run after each task: mean over the runs that have it, and its standard deviation.

        None when no run has any.
        """
        columns = [[v for v in c if v is not None] for c in _transposed([values(run) for run in self.runs])]
        if not any(columns):
            return None
        both = [metrics.spread(column) if column else (None, None) for column in columns]
        return Series(self.label, [m for m, _ in both], [s for _, s in both] if len(self.runs) > 1 else (), colour)


def varied(runs: Sequence[RunResults]) -> str:
    """What differs between repetitions, as words: what a standard deviation over them is of; "" for nothing."""
    if len(runs) > 1 and len({run.seed for run in runs}) == 1:
        return "nothing, their seed included"
    seeds = {what: {_seed_of(run, what) for run in runs} for what in VARIED}
    orders = {str([(task.get("name"), task.get("names")) for task in run.tasks()]) for run in runs}
    splits = {str(run.facts["stream"].get("split")) for run in runs}
    made_up = any(spec.name.endswith("synthetic") for run in runs for spec in all_specs(run.config.get("stream")))
    differ = {
        "order": len(orders) > 1,
        "images": len(seeds["images"] if not made_up else seeds["order"]) > 1 or len(splits) > 1,
        "start": len(seeds["start"]) > 1,
    }
    return ", ".join(name for what, name in VARIED.items() if differ[what])


def _seed_of(run: RunResults, what: str) -> int:
    known = str(run.config.get("vary", RunConfig.vary)).split(",")
    return (run.seed or 0) if what in known else 0


def all_specs(text: Any) -> Iterator[Spec]:
    """What a description consists of, parts of parts too; nothing where there is none."""
    waiting = list(parse(text)) if isinstance(text, str) and text else []
    while waiting:
        yield (spec := waiting.pop())
        waiting += spec.parts


def grouped(runs: Sequence[RunResults]) -> list[Group]:
    """Runs of the same method and settings together, in the order given; other settings are added to the label.

    So is how far they are, where they are not at their end: such scores are no final ones.
    """
    found: dict[str, list[RunResults]] = {}
    for run in runs:
        found.setdefault(json.dumps([_settings(run), run.so_far], sort_keys=True, default=str), []).append(run)
    groups = []
    for members in found.values():
        same = [_settings(other[0]) for other in found.values() if other[0].method == members[0].method]
        mine = _settings(members[0])
        differing = [k for k in mine if any(other.get(k) != mine[k] for other in same)]
        parts = [members[0].method, *(f"{k} {mine[k]}" for k in differing), members[0].so_far]
        groups.append(Group(" · ".join(filter(None, parts)), tuple(members)))
    return groups


def steps_of(folder: Path) -> Steps:
    """steps.json of a grid's folder: `options` and, by method, what was measured; empty when there is none.

    Raises:
        ValueError: when the file is damaged.
    """
    path = folder / STEPS
    if not path.is_file():
        return {"options": {}, "methods": {}}
    return schema.read_typed(path, Steps, "remove it, the grid's command measures it anew")


def _settings(run: RunResults) -> dict[str, Any]:
    """Configuration without what repetitions vary: seeds, the order of classes, when and where to save.

    What an older version did not know of has its default.
    """
    known = {f.name: f.default for f in fields(RunConfig) if f.default is not MISSING} | run.config
    return {k: _unseeded(v) for k, v in known.items() if k not in ("seed", "out", *BESIDE_RESULTS)}


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


def _known_summary(folder: Path, done: Sequence[Checkpoint], note: Callable[[str], None]) -> Summary:
    """What the manifests add up to."""
    path = folder / SUMMARY
    try:
        said = read_summary(folder, done[-1].manifest["format"] > 1) if path.exists() else None
        why = "is not what the manifests say"
    except Damaged:
        said, why = None, "is damaged"
    try:
        found = summary_of(folder, done)
    except Damaged:  # the numbers do not need the tensors, of which the sum counts the bytes
        if said is None or said.get("manifest") != done[-1].seal:
            raise
        return said
    if path.exists() and (said is None or contradicts(said, found)):
        note(f"{path} {why}: its numbers are taken from the manifests; {command('resume', folder)} writes it anew")
    return cast(Summary, found)


def _tell_other_results(folder: Path, rows: Sequence[Row], note: Callable[[str], None]) -> None:
    """A line that is missing at the end is still to be written, or of a process that was killed."""
    path = folder / _RESULTS
    said = "".join(checkpoint.lines_of(rows)).encode()
    if path.exists() and not said.startswith(path.read_bytes()):
        note(
            f"{path} is not what the manifests say: what is shown is taken from these; {command('resume', folder)} "
            "writes it anew"
        )


def _rows(path: Path, facts: RunRecord) -> Iterable[Row]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    most = max(len(facts["stream"]["tasks"]), len(lines))  # each task has a line at least
    # What stands after the last line break is still being written, or was cut when the run was killed.
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        remedy = "remove the line, or resume the run from its last task"
        found = schema.parse_typed(line, Line, f"{path}, line {number},", remedy)
        if max(found["after"], found["on"] or 0) >= most:
            raise Damaged(f"{path}, line {number}, is damaged: no task has such a number; {remedy}")
        value = _number(found["value"])
        if value is not None:
            yield Row(found["after"], found["on"], found["metric"], value)
