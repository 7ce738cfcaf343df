"""What finished runs measured, one row a method: scores and stored bytes after every task, time, and step cost.

Rows that were measured alike stand together in a setting, as JSON:

    {"stream", "data", "scenario", "tasks", "classes", "images", "test_images", "backbone", "training", "computed",
     "created", "perdure", "git", "command", "rows": [{"method", "seeds", "after", "seconds", ...}, ...]}

`after` has a list for each number, one entry a task: `[mean, standard deviation]`, None where it is not defined.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any

from perdure import metrics
from perdure.formatting import RARE, printable, rate, spread_of, times
from perdure.options.spec import parse
from perdure.reporting.charts import show
from perdure.reporting.runs import Group, RunResults, steps_of, varied
from perdure.training.config import BESIDE_RESULTS, RunConfig, flags
from perdure.training.summary import unlike_scores

Spread = tuple[float, float | None] | None
_SPECS = ("stream", "backbone")
_TRAINING = (
    *("objective", "epochs", "batch_size", "lr", "optimizer", "weight_decay"),
    *("schedule", "milestones", "decay", "augment", "calibrate", "online"),
)
KEYS = (
    "acc",
    "aaa",
    "forgetting",
    "acc_with_task_id",
    "forgetting_with_task_id",
    "task_id_acc",
    "images_per_second",
    "stored_bytes",
    *RARE,
)
"""What the table shows of each summary."""
_SURE = ("matrix", "seconds_per_task", "trainable_parameters", "stored_bytes")  # what every summary has
_OWN = ("method", "seed", "device", *BESIDE_RESULTS)


def settings_of(folders: Sequence[Path], seeds: Sequence[int] | None = None, *, shorten: bool = False) -> list[Any]:
    """All finished runs of streams in `folders`, sorted into settings.

    Of two runs of the same method and seed in the same setting, the later one counts.

    Args:
        folders: runs', grids', or any folders with such in them.
        seeds: leave out runs with other seeds; None takes all.
        shorten: of absolute paths in specs keep the last name only, for tables that others read.

    Raises:
        ValueError: when there is no finished run, or one is damaged.
    """
    found: dict[str, dict[tuple[str, Any], RunResults]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("summary.json")):
            run = RunResults.read(file.parent)
            if not run.config.get("stream") or (seeds is not None and run.seed not in seeds):
                continue
            alike = found.setdefault(json.dumps(_settings(run), sort_keys=True, default=str), {})
            key = run.method, run.seed
            if key not in alike or str(run.facts.get("created")) >= str(alike[key].facts.get("created")):
                alike[key] = run
    if not found:
        where = ", ".join(map(str, folders))
        raise ValueError(f"no finished run in {where}: give folders that 'perdure compare' or 'perdure run' wrote")
    return [_setting(list(alike.values()), shorten) for alike in found.values()]


def row_of(runs: Sequence[RunResults]) -> dict[str, Any]:
    """What the runs of one method measured; they differ in nothing but the seed."""
    tasks = min(len(run.names()) for run in runs)
    bytes_after = [_bytes_after(run) for run in runs]
    return {
        "method": runs[0].method,
        "lr": runs[0].facts.get("lr", runs[0].config.get("lr")),
        "seeds": sorted(run.seed or 0 for run in runs),
        "after": {name: _after(runs, tasks, *number) for name, number in _NUMBERS.items()}
        | {"stored_bytes": [_pair(each[i] for each in bytes_after) for i in range(tasks)]},
        "referenced_bytes": max(max(_referenced(run).values(), default=0.0) for run in runs),
        "trainable_parameters": runs[0].summary.get("trainable_parameters"),
        "seconds": _pair(run.numbers().get("seconds") for run in runs),
        "images_per_second": _pair(run.numbers()["images_per_second"] for run in runs),
        "step": steps_of(runs[0].folder.parent)["methods"].get(runs[0].method),
    }


def tabulate(runs: Sequence[tuple[str, RunResults]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the runs of each method: `{"method", "runs", key: [mean, std]}`.

    Args:
        runs: method and what one of its finished runs says.

    Raises:
        ValueError: when a run lacks numbers that every finished one has.
    """
    table = []
    for method in dict.fromkeys(name for name, _ in runs):
        mine = [check_complete(run) for name, run in runs if name == method]
        group, measured = Group(method, tuple(mine)), row_of(mine)
        row: dict[str, Any] = {"method": method, "runs": len(mine), "varied": varied(mine)}
        for key in (*KEYS, "bwt", "seconds", "evaluation_seconds", "new_task_acc"):
            found = group.spread(key)
            row[key] = None if found is None else list(found)
        if why := next(filter(None, (unlike_scores(run.scores()) for run in mine)), ""):
            row["no_means"] = why
        row["lr"] = measured["lr"]
        row["trainable_parameters"] = measured["trainable_parameters"]
        row["stored_bytes_after"] = [None if pair is None else pair[0] for pair in measured["after"]["stored_bytes"]]
        row["referenced_bytes"] = measured["referenced_bytes"]
        row["step_cost"], row["step"] = (measured["step"] or {}).get("ratio"), measured["step"]
        table.append(row)
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, in per cent: mean ± sample standard deviation over the runs."""
    shown = [(key, title) for key, title in _SHOWN if key not in RARE or any(row.get(key) for row in table)]
    if all(row.get("forgetting") for row in table):  # which it stands in for, where old tasks were not always measured
        shown = [(key, title) for key, title in shown if key != "bwt"]
    if any(row.get("unparsable") for row in table):  # answers in words, which nobody is told the task of
        shown = [(key, title.replace("accuracy", "strict")) for key, title in shown if "task_id" not in key]
    own = len({row.get("lr") for row in table}) > 1  # each method has its own
    titles = [*(["learning rate"] if own else []), *(title for _, title in shown)]
    lines = [f"| method | runs | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for row in table:
        cells = [rate(row["lr"], row["images_per_second"])] if own else []
        cells += [times(row["step"]) if key == "step" else _shown(key, row[key]) for key, _ in shown]
        lines.append(f"| {_code(row['method'])} | {row['runs']} | {' | '.join(cells)} |")
    reasons = dict.fromkeys(row["no_means"] for row in table if row.get("no_means"))
    lines += [f"\n{line}." for line in spread_of([(row["method"], row["runs"], row.get("varied")) for row in table])]
    return "\n".join([*lines, *(f"\nNo means: {printable(why)}." for why in reasons)]) + "\n"


def _code(text: str) -> str:
    """A text as code in a table's cell: no bar ends the cell, no backtick the code."""
    text = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


_SHOWN = (
    ("acc", "final accuracy"),
    ("new_task_acc", "new-task accuracy"),
    ("forgetting", "forgetting"),
    ("bwt", "backward transfer"),
    ("acc_with_task_id", "with task id"),
    ("forgetting_with_task_id", "forgetting with task id"),
    ("transfer", "transfer"),
    ("average", "average over the matrix"),
    ("performance_drop", "performance drop"),
    ("harmonic_mean", "harmonic mean"),
    ("anytime_acc", "anytime accuracy"),
    ("zero_shot_ratio", "zero-shot kept"),
    ("lenient_acc", "final lenient"),
    ("lenient_forgetting", "lenient forgetting"),
    ("unparsable", "unparsable"),
    ("answers_kept_strict", "held-out kept, strict"),
    ("answers_kept_lenient", "held-out kept, lenient"),
    ("stored_bytes", "stored"),
    ("step", "step / plain LoRA's"),
    ("seconds", "time"),
    ("evaluation_seconds", "of it evaluation"),
)


def _shown(key: str, value: Any) -> str:
    mean, std = value if isinstance(value, list) else (value, None)
    return str(show(key, mean, std, unit=key == "stored_bytes").striptags())


def check_complete(run: RunResults) -> RunResults:
    """A finished run, once it is known to have all numbers that the table needs."""
    if any(run.summary.get(key) is None for key in _SURE):
        raise ValueError(
            f"{run.folder / 'summary.json'} is damaged: numbers are missing; remove it, and the same command writes "
            "it anew"
        )
    return run


_NUMBERS: dict[str, tuple[int, Callable[[metrics.Matrix], float | None]]] = {
    "acc": (0, metrics.acc),
    "acc_with_task_id": (1, metrics.acc),
    "new_task_acc": (0, metrics.new_task_acc),
    "new_task_acc_with_task_id": (1, metrics.new_task_acc),
    "forgetting": (0, metrics.forgetting),
    "forgetting_with_task_id": (1, metrics.forgetting),
}


def _after(
    runs: Sequence[RunResults], tasks: int, which: int, number: Callable[[metrics.Matrix], float | None]
) -> list[Spread]:
    """A number of the score matrix (`which` of `RunResults.scored`) as it stood after each task."""
    if any(unlike_scores(run.scores()) for run in runs):
        return [None] * tasks
    matrices = [run.matrix(run.scored[which]) for run in runs]
    return [_pair(number([row[:n] for row in matrix[:n]]) for matrix in matrices) for n in range(1, tasks + 1)]


def _bytes_after(run: RunResults) -> list[float | None]:
    """What was stored after each task, with the examples that a memory refers to; None where the files are gone."""
    referenced = _referenced(run)
    found: list[float | None] = []
    for i in range(len(run.names())):
        file = run.folder / f"task-{i:03d}" / "learner.safetensors"
        found.append(file.stat().st_size + referenced.get(i, 0.0) if file.exists() else None)
    if found[-1] is None:
        found[-1] = run.numbers()["stored_bytes"]
    return found


def _referenced(run: RunResults) -> dict[int, float]:
    return {row.after: row.value for row in run.rows if row.metric == "referenced_bytes"}


def _settings(run: RunResults) -> dict[str, Any]:
    """What must be equal for two rows to be compared."""
    known = {f.name: f.default for f in fields(RunConfig)} | run.config
    facts = run.facts["stream"]
    return {name: known[name] for name in (*_SPECS, *_TRAINING)} | {
        **{name: known[name] for name in ("vary", "early_stop", "early_stop_share")},
        "fingerprint": run.facts["backbone"].get("fingerprint"),
        "scenario": facts.get("scenario"),
        "tasks": len(run.names()),
    }


def _setting(runs: Sequence[RunResults], shorten: bool) -> dict[str, Any]:
    first, methods = runs[0], list(dict.fromkeys(run.method for run in runs))
    decided, tasks = _settings(first), first.tasks()
    specs = {name: _shortened(str(decided[name])) if shorten else str(decided[name]) for name in _SPECS}
    return {
        **specs,
        "data": first.facts["stream"].get("name") or specs["stream"],
        "scenario": decided["scenario"],
        "tasks": decided["tasks"],
        "classes": len({c for task in tasks for c in task.get("classes", ())}),
        "images": sum(task.get("train", 0) for task in tasks),
        "test_images": sum(task.get("test", 0) for task in tasks),
        "fingerprint": decided["fingerprint"],
        "training": {name: decided[name] for name in _TRAINING},
        "computed": first.facts["resolved"],
        "created": sorted({str(run.facts.get("created"))[:10] for run in runs}),
        "perdure": sorted({str(run.facts.get("perdure")) for run in runs}),
        "git": sorted({str(run.facts["git"])[:12] for run in runs if run.facts.get("git")}),
        "command": _command(first, specs),
        "rows": [row_of([run for run in runs if run.method == method]) for method in methods],
    }


def _command(run: RunResults, specs: dict[str, str]) -> str:
    """The command that measures the setting, but for `--methods`, `--seeds` and `--out`."""
    return shlex.join(["perdure", "compare", *flags(run.config | specs, _OWN)])


def _shortened(text: str) -> str:
    """`text` with absolute paths cut to their last name."""
    for spec in (inner for outer in parse(text) for inner in (outer, *outer.parts)):
        for _, value in spec.kwargs:
            if isinstance(value, str) and _absolute(value):
                text = text.replace(value, PurePath(value).name)
    return text


def _absolute(text: str) -> bool:
    return Path(text).is_absolute() or text.startswith("~")


def _pair(values: Iterable[float | None]) -> Spread:
    """Mean and standard deviation over runs; None when a run has no such number."""
    listed = list(values)
    known = [v for v in listed if v is not None]
    return metrics.spread(known) if known and len(known) == len(listed) else None
