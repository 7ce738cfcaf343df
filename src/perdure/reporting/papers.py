"""What a paper takes from runs: tables as CSV and LaTeX, and whether a difference between methods is one."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.core import checkpoint
from perdure.evaluation import per_class
from perdure.evaluation.per_class import Answers
from perdure.formatting import OF_STREAMS, RARE, printable, spread_of, told_apart
from perdure.reporting.numbers import numbers_named, score_of_all
from perdure.reporting.runs import Group, RunResults, grouped, varied
from perdure.reporting.significance import classes_of, difference
from perdure.storage.files import write_text
from perdure.types import Task

_SHARES = ("acc", "aaa", "new_task_acc", "forgetting", "acc_with_task_id", "task_id_acc")
_LATEX = ("acc", "aaa", "forgetting", "acc_with_task_id")
_SMALL = ("forgetting", "performance_drop")
"""Of which less is better."""
_NUMBERS = (*_SHARES, "trainable_parameters", "stored_bytes", "seconds", "step_cost")


def write_tables(folders: Sequence[Path], out: Path, *, as_csv: bool, as_latex: bool) -> list[Path]:
    """Write what `folders` of runs measured into the folder `out`; returns the files.

    CSV: `methods` (mean and standard deviation over repetitions), `runs`, `scores` (each task after each), `classes`,
    `confusion` (class by answer), `confusion_tasks` and `significance`. LaTeX: `methods.tex`, with booktabs.

    Raises:
        ValueError: when a folder is not a run's, or the disk is full.
    """
    runs = [RunResults.read(folder) for folder in dict.fromkeys(map(Path, folders))]
    groups = grouped(runs)
    tables = _tables(runs, groups) if as_csv else {}
    texts = {f"{name}.csv": _csv(rows) for name, rows in tables.items() if rows}
    if as_latex:
        texts["methods.tex"] = latex(groups)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = (out / "methods.csv").exists() and (out / "runs.csv").exists()  # by an earlier call, of other runs
        for name in (f"{name}.csv" for name in tables):
            if written and name not in texts:
                (out / name).unlink(missing_ok=True)
        for name, text in texts.items():
            write_text(out / name, text)
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error.strerror}): make room there, or give another --out"
        ) from error
    return [out / name for name in texts]


def latex(groups: Sequence[Group]) -> str:
    """The methods as a table for LaTeX (booktabs), in per cent, mean ± sample standard deviation, the best in bold."""
    named = numbers_named(score_of_all([r for g in groups for r in g.runs]), OF_STREAMS)
    titles = {key: name for key, name, _ in named}
    keys = [key for key in (*_LATEX, *OF_STREAMS) if any(group.spread(key) for group in groups)]
    best = {
        key: _best([group.spread(key) if group.finished else None for group in groups], smallest=key in _SMALL)
        for key in keys
    }
    lines = [f"\\begin{{tabular}}{{l{'c' * len(keys)}}}", "\\toprule"]
    lines.append(" & ".join(["method", *(_escaped(titles[key]) for key in keys)]) + " \\\\")
    lines.append("\\midrule")
    for i, group in enumerate(groups):
        cells = []
        for key in keys:
            spread = group.spread(key)
            text = "--" if spread is None else f"{100 * spread[0]:.1f}"
            text = f"\\textbf{{{text}}}" if i in best[key] and len(groups) > 1 else text
            cells.append(text if spread is None or spread[1] is None else f"{text} $\\pm$ {100 * spread[1]:.1f}")
        lines.append(" & ".join([f"\\texttt{{{_escaped(group.label)}}}", *cells]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"% {line}" for line in spread_of([(g.label, len(g.runs), varied(g.runs)) for g in groups])]
    return "\n".join(lines) + "\n"


Rows = list[dict[str, Any]]


def _tables(runs: Sequence[RunResults], groups: Sequence[Group]) -> dict[str, Rows]:
    answers = {run.folder: answers_of(run) for run in runs}
    labels = {run.folder: group.label for group in groups for run in group.runs}
    whose = {
        run.folder: {"run": name, "method": labels[run.folder], "seed": run.seed}
        for name, run in zip(told_apart([run.folder for run in runs], "-"), runs, strict=True)
    }
    numbers = {run.folder: run.numbers() for run in runs}
    keys = (*_NUMBERS, *(key for key in RARE if any(found.get(key) is not None for found in numbers.values())))
    classes, confusion, tasks = Rows(), Rows(), Rows()
    for run in runs:
        who, named = whose[run.folder], _names(run)
        for c, (right, count) in sorted(per_class.of_classes(answers[run.folder]).items()):
            classes.append(
                {**who, "class": named.get(c, c), "images": count, "right": right, "accuracy": right / count}
            )
        for (c, given), count in sorted(per_class.confusions(answers[run.folder]).items()):
            confusion.append({**who, "class": named.get(c, c), "answer": named.get(given, given), "images": count})
        for i, row in enumerate(run.summary.get("confusion", [])):
            pairs = [(j, share) for j, share in enumerate(row) if share is not None]
            tasks += [{**who, "task": i + 1, "answered_as": j + 1, "share": share} for j, share in pairs]
    return {
        "methods": [_method(group, keys) for group in groups],
        "runs": [{**whose[folder], **{key: found.get(key) for key in keys}} for folder, found in numbers.items()],
        "scores": [
            {**whose[run.folder], "after": row.after + 1, "task": None if row.on is None else row.on + 1}
            | {"metric": row.metric, "value": row.value}
            for run in runs
            for row in run.rows
        ],
        "classes": classes,
        "confusion": confusion,
        "confusion_tasks": tasks,
        "significance": list(_significance(groups, answers)),
    }


def answers_of(run: RunResults) -> Answers:
    """What a finished run answered after its last task; nothing where it did not keep it."""
    done = checkpoint.whole(run.folder)
    return per_class.read(done[-1]) if done else {}


def _significance(groups: Sequence[Group], answers: Mapping[Path, Answers]) -> Iterable[dict[str, Any]]:
    kept = [{run.seed or 0: answers[run.folder] for run in group.runs if answers[run.folder]} for group in groups]
    for (one, mine), (other, theirs) in itertools.combinations(zip(groups, kept, strict=True), 2):
        classes = {run.seed or 0: classes_of(run) for run in one.runs}
        if (found := difference(mine, theirs, classes)) is not None:
            yield {
                **{"method": one.label, "other": other.label, "orders": found.orders, "difference": found.mean},
                **{"low_95": found.low, "high_95": found.high, "p": found.p},
            }


def _method(group: Group, keys: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": group.label, "runs": len(group.runs), "varied": varied(group.runs)}
    for key in keys:
        mean, std = group.spread(key) or (None, None)
        row |= {key: mean, f"{key}_std": std}
    return row


def _names(run: RunResults) -> dict[int, str]:
    return per_class.class_names(
        [
            Task(i, str(task.get("name")), tuple(task.get("classes") or ()), tuple(map(str, task.get("names") or ())))
            for i, task in enumerate(run.tasks())
        ]
    )


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a heading; what a spreadsheet would take for a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        value = printable(value)
        return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return int(value) if value.is_integer() else f"{value:.6g}"  # bytes and parameters are counted
    return value


def _best(spreads: Sequence[tuple[float, float | None] | None], *, smallest: bool) -> set[int]:
    """Places of what is best as it is shown, to a tenth of a point."""
    shown = {i: round(100 * each[0], 1) * (-1 if smallest else 1) for i, each in enumerate(spreads) if each is not None}
    return {i for i, value in shown.items() if value == max(shown.values())}


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^]", lambda found: _SPECIAL.get(found[0], f"\\{found[0]}"), printable(text))
