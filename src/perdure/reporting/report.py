"""One self-contained `report.html` about one or several runs, from what they wrote to disk."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from perdure import metrics
from perdure.core.manifests import recorded_size
from perdure.formatting import RARE, printable_lines, spread_of, told_apart
from perdure.reporting import charts, figures
from perdure.reporting import texts as language
from perdure.reporting.charts import duration, show
from perdure.reporting.figures import Drawing, Point
from perdure.reporting.numbers import STEP, numbers_named, score_of_all
from perdure.reporting.runs import PHASES, Group, RunResults, grouped, ignore, varied
from perdure.storage.files import write_page
from perdure.training.summary import unlike_scores

_COMPARED = ("acc", "aaa", "new_task_acc", "forgetting", "acc_with_task_id", "task_id_acc", "gap", "feature_drift")
# What tells why old tasks were kept or lost: heading, explanation, where it comes from, whether it ends at 1.
_REASONS: tuple[tuple[str, str, Callable[[RunResults], list[float | None]], bool], ...] = (
    (
        "How far old features moved",
        "Distance between the features of old test images now and right after their task was learnt, in per cent of "
        "their length, mean over old tasks. At 0 the encoder has forgotten nothing: if accuracy falls, tasks are "
        "confused with each other.",
        RunResults.drifts,
        False,
    ),
    (
        "How much of an update reaches old inputs",
        "Share of a task's update that acts on the directions protected for earlier tasks' inputs, mean over layers. "
        "At 0 the layers answer what lies there as before; unprotected parts of the inputs can still move features.",
        lambda run: run.over_layers("old_space_share"),
        True,
    ),
    (
        "How much room is left",
        "Share of the directions of a layer's input that no task has taken, mean over layers. More is better: at 0 "
        "nothing new can be learnt without disturbing the past.",
        lambda run: [None if v is None else 1 - v for v in run.over_layers("occupied_share")],
        True,
    ),
    (
        "Accuracy on all classes seen",
        "Share of right answers on all test images of the base classes and of the few-shot classes so far: the base "
        "has most of them.",
        lambda run: run.few_shot("accuracies"),
        True,
    ),
    (
        "Harmonic mean of old and new",
        "Of the accuracies on the base classes and on all few-shot classes so far. At 0 nothing new was learnt, or "
        "nothing of the base is left.",
        lambda run: run.few_shot("harmonic_means"),
        True,
    ),
    (
        "How much zero-shot accuracy is kept",
        "Accuracy on data sets that were never taught, relative to the pre-trained model's, mean over data sets. Below "
        "100 the model loses what it could do before.",
        language.zero_shot_kept,
        False,
    ),
    (
        "How much of held-out answers is kept",
        "Lenient score of questions that were never taught, relative to the pre-trained model's, mean over the sets in "
        "which it had any. Below 100 the model loses what it knew before.",
        language.answers_kept,
        False,
    ),
)
_TRADES: tuple[tuple[str, str, str, str, Callable[[float], str]], ...] = (
    (
        "bytes",
        "Accuracy against what is stored",
        "stored_bytes",
        "stored after the last task",
        lambda value: show("stored_bytes", value).striptags(),
    ),
    (
        "time",
        "Accuracy against time",
        "seconds",
        "time of a run: preparing, training, finishing and evaluating all tasks",
        lambda value: duration(value).removesuffix(" 0 s").removesuffix(" 0 min"),
    ),
)
_COSTS = (
    "trainable_parameters",
    "stored_bytes",
    "seconds",
    "evaluation_seconds",
    "images_per_second",
    "peak_rss_bytes",
)


def write_report(
    folders: Sequence[Path], out: Path, drawings: Path | None = None, note: Callable[[str], None] = ignore
) -> Path:
    """Write the report about `folders` to the file `out` (or `report.html` in it, when it is a folder).

    Unfinished runs are shown as far as they got. The same folders give the same bytes.

    Args:
        folders: of the runs.
        out: the file, or a folder for it.
        drawings: a folder for the figures as PDF and PNG, for papers.
        note: is told of files that say something else than the manifests, which are believed.

    Returns:
        The file written.

    Raises:
        ValueError: when there is no folder, one is not a run's or is damaged, or the disk is full.
    """
    if not folders:
        raise ValueError("no run to report: give at least one folder that `perdure run` wrote")
    runs = [RunResults.read(folder, note) for folder in dict.fromkeys(map(Path, folders))]
    target = out / "report.html" if out.is_dir() else out
    page = _Page(runs)
    text, place = page.render(), target
    try:
        write_page(target, text)
        if drawings:
            place = drawings
            page.save(drawings)
    except OSError as error:  # what was learnt is not concerned
        why = f"{place} cannot be written ({error.strerror})"
        raise ValueError(
            f"{why}: make room there, or give another {'--out' if place == target else '--figures'}"
        ) from error
    return target


def trade_offs(
    methods: Sequence[tuple[str, Callable[[str], Sequence[float | None] | None]]],
) -> dict[str, Drawing]:
    """Figures of final accuracy against what it costs, by short name; none for fewer than two methods.

    Args:
        methods: label, and mean and standard deviation of a number by its key.
    """
    drawings = {}
    for name, title, key, cost, text in _TRADES:
        points = []
        for label, number in methods:
            share, spent = number("acc"), number(key)
            if share and spent and share[0] is not None and spent[0] is not None:
                points.append(Point(label, spent[0], share[0], share[1]))
        if len(points) > 1:
            drawings[name] = figures.scatter(title, points, cost, text)
    return drawings


class _Page:
    """The report about some runs: its figures, and the page that shows them."""

    def __init__(self, runs: Sequence[RunResults]) -> None:
        self.runs, self.groups = runs, grouped(runs)
        self.score = score_of_all(runs)
        self.streams = list(dict.fromkeys(str(run.config.get("stream", "–")) for run in runs))
        self.backbones = list(dict.fromkeys(str(run.config.get("backbone", "–")) for run in runs))
        longest = max((run.names() for run in runs), key=len, default=[])
        self.curves = _figure(
            f"Mean {self.score} over the tasks learnt so far",
            self.groups,
            RunResults.averages,
            longest,
            beside=("lenient", lambda run: run.averages("lenient")),
        )
        self.reasons = [
            (title, meaning, figure)
            for title, meaning, values, share in _REASONS
            if (figure := _figure(title, self.groups, values, longest, zero=True, share=share))
        ]
        if passes := [str(n) for n in max((run.online("images") for run in runs), key=len, default=[])]:
            meaning = "Mean accuracy on the tasks of the stream that had begun, after so many images of one pass."
            title = "Accuracy along the pass"
            if figure := _figure(title, self.groups, lambda run: run.online("begun"), passes, zero=True):
                self.reasons.append((title, meaning, figure))
        same = len(self.streams) == len(self.backbones) == 1
        self.trades = trade_offs([(g.label, g.spread) for g in self.groups]) if same else {}

    def save(self, folder: Path) -> None:
        """Write each figure, and each run's matrix of scores, as PDF and PNG."""
        folder.mkdir(parents=True, exist_ok=True)
        drawings = {f"accuracy-against-{name}": drawing for name, drawing in self.trades.items()}
        drawings |= {re.sub(r"\W+", "-", title.lower()): drawing for title, _, drawing in self.reasons}
        if self.curves:
            drawings[f"{self.score}-over-time"] = self.curves
        for name, run in zip(told_apart([run.folder for run in self.runs], "-"), self.runs, strict=True):
            rows = run.matrix()[: run.learnt()]
            if rows:
                drawings[f"matrix-{name}"] = figures.matrix(f"Scores of {run.method}", rows, run.names())
        for name, drawing in drawings.items():
            for kind in ("pdf", "png"):
                drawing.save(folder / f"{name}.{kind}")

    def render(self) -> str:
        """The page."""
        runs, groups, score = self.runs, self.groups, self.score
        facts = [_facts(run) for run in runs]
        keys = list(dict.fromkeys(k for each in facts for k in each))
        shared = [k for k in keys if all(each.get(k) == facts[0].get(k) for each in facts)]
        methods = list(dict.fromkeys(run.method for run in runs))
        rare = {key for key in RARE if any(run.numbers()[key] is not None for run in runs)}
        named = numbers_named(score, rare)
        steps = any(group.spread("step_cost") for group in groups)
        page = _template().render(
            title=", ".join(methods) if len(methods) <= 3 else f"{len(methods)} methods compared",
            streams=self.streams,
            backbones=self.backbones,
            created=_dates(runs),
            groups=groups,
            runs=[_view(run) for run in runs],
            score=score,
            curves=self.curves.inline() if self.curves else None,
            reasons=[(title, meaning, drawing.inline()) for title, meaning, drawing in self.reasons],
            trades=[(drawing.title, drawing.inline()) for drawing in self.trades.values()],
            numbers=named,
            meanings=[*named, STEP] if steps else named,
            spreads=spread_of([(group.label, len(group.runs), varied(group.runs)) for group in groups]),
            compared=[(k, name) for k, name, _ in named if k in {*_COMPARED, *rare}],
            costs=[(k, name) for k, name, _ in named if k in _COSTS] + ([STEP[:2]] if steps else []),
            winners={
                k: _winner([g for g in groups if g.finished], k)
                for k in ("acc", "aaa", "new_task_acc", "acc_with_task_id", "task_id_acc")
            },
            shared=[(k, facts[0][k]) for k in shared],
            differing=[k for k in keys if k not in shared],
            facts=facts,
            colours=figures.COLOURS,
            heat=[(charts.heat_colours(dark=False), ""), (charts.heat_colours(dark=True), "dark")],
        )
        return printable_lines(page)


@cache
def _template() -> jinja2.Template:
    """The page, compiled once: that takes longer than to fill it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        bar=charts.bar, stack=charts.stack, legend=charts.legend, level=charts.level, percent=charts.percent
    )
    environment.globals.update(show=show, duration=duration)
    text = resources.files("perdure.reporting").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(text)


def _figure(
    title: str,
    groups: Sequence[Group],
    values: Callable[[RunResults], list[float | None]],
    names: Sequence[str],
    beside: tuple[str, Callable[[RunResults], list[float | None]]] | None = None,
    **axis: bool,
) -> Drawing | None:
    """One line a group, in the same colour in every figure; None when there is nothing to draw.

    Args:
        title: what the figure shows.
        groups: of runs.
        values: of a run, after each task.
        names: of the tasks.
        beside: a second number of the same groups, which it names, in their colours with dashes.
        axis: see `figures.curves`.
    """
    curves = []
    for i, group in enumerate(groups):
        if curve := group.curve(values, i):
            curves.append(curve)
        # a colour's number beyond the last begins again with dashes
        if beside and (second := group.curve(beside[1], i + len(figures.COLOURS))):
            curves.append(replace(second, name=f"{second.name}, {beside[0]}"))
    return figures.curves(title, curves, names, **axis) if curves else None


def _view(run: RunResults) -> dict[str, Any]:
    names, done = run.names(), run.learnt()
    lost = metrics.forgetting_per_task([row[:done] for row in run.matrix()[:done]])
    seconds = run.seconds()
    return {
        "run": run,
        "matrices": language.matrices(run),
        "thinned": run.config.get("evaluate", "every").removeprefix("every"),
        "unlike": unlike_scores(run.scores()),
        "scores": list(dict.fromkeys(run.scores())),
        "names": names,
        "tasks": run.tasks(),
        "done": done,
        "numbers": run.numbers(),
        "forgotten": [(i, names[i], v) for i, v in enumerate(lost)],
        "facts": {k: [_plain(v) for v in values] for k, values in run.facts_of_tasks().items()},
        "extent": (min([0.0, *(v for v in lost if v is not None)]), max([0.0, *(v for v in lost if v is not None)])),
        "drift": run.drift()[:done] if any(v is not None for v in run.drifts()) else [],
        "room": _room(run),
        "reach": {k: [_cell(v) for v in values] for k, values in run.layers("old_space_share").items()},
        "seconds": [_time(i, names, task) for i, task in enumerate(seconds)],
        "phases": [(p, duration(sum(task[p] for task in seconds))) for p in PHASES],
        "longest": max((sum(task.values()) for task in seconds), default=0.0),
        "skipped": _skipped(run),
        "confusion": run.summary.get("confusion", []) if len(names) > 1 else [],
        "classes": sorted(run.summary.get("class_accuracy", {}).items(), key=lambda each: each[1]),
        **language.view(run),
    }


def _room(run: RunResults) -> dict[str, list[tuple[str, float] | None]]:
    """For each layer and task: the number of free directions where it was recorded, and their share."""
    counts = run.layers("free_dimension")
    return {
        layer: [
            None if v is None else (charts.percent(1 - v) if n is None else f"{n:,.0f}", 1 - v)
            for v, n in zip(taken, counts.get(layer) or [None] * len(taken), strict=True)
        ]
        for layer, taken in run.layers("occupied_share").items()
    }


def _cell(share: float | None) -> tuple[str, float] | None:
    return None if share is None else (charts.percent(share), share)


def _time(index: int, names: Sequence[str], task: Mapping[str, float]) -> tuple[str, list[charts.Segment], float]:
    parts = [charts.Segment(task[p], i, f"{p} {duration(task[p])}") for i, p in enumerate(PHASES)]
    return names[index] if index < len(names) else f"task {index + 1}", parts, sum(task.values())


def _facts(run: RunResults) -> dict[str, str]:
    """What must be equal for a fair comparison, then everything else that was set."""
    stream, backbone, resized = run.facts["stream"], run.facts["backbone"], recorded_size(run.folder)
    preprocess = backbone.get("preprocess")
    answers = {
        "class": "class-incremental: any class seen so far may be answered, the task is not told",
        "task": "task-incremental: only the classes of the image's own task may be answered",
        "domain": "domain-incremental: the same classes in every task",
    }
    config = run.config | {"lr": run.facts.get("lr", run.config.get("lr"))}
    found: dict[str, Any] = {
        "Seed": run.facts.get("seed", run.config.get("seed")),
        "Backbone": run.config.get("backbone"),
        "Reads since then": ", ".join(f"{name}={value}" for name, value in resized.items()),
        "Backbone fingerprint": backbone.get("fingerprint"),
        "Images and normalisation": ", ".join(f"{k} {v}" for k, v in preprocess.items())
        if isinstance(preprocess, dict)
        else preprocess,
        "What may be answered": answers.get(stream.get("scenario"), stream.get("scenario")),
        "Class order": ", ".join(dict.fromkeys(str(n) for task in run.tasks() for n in task.get("names") or [])),
        **{_words(k): v for k, v in config.items() if k not in ("backbone", "seed")},
        **{f"{_words(k)} used": v for k, v in run.facts["resolved"].items()},
        **{f"Version of {k}": v for k, v in run.facts["versions"].items()},
        "Version of perdure": run.facts.get("perdure"),
        "Git commit": run.facts.get("git"),
    }
    said = {k: v for k, v in found.items() if v not in (None, "")}
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in said.items()}


def _plain(value: float | None) -> str:
    """A number of no known unit."""
    return "·" if value is None else f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _words(key: str) -> str:
    return "Learning rate" if key == "lr" else key.replace("_", " ").capitalize()


def _winner(groups: Sequence[Group], key: str) -> str | None:
    means = {group.label: found[0] for group in groups if (found := group.spread(key))}
    return max(means, key=means.__getitem__) if len(means) > 1 else None


def _skipped(run: RunResults) -> list[str]:
    """Images left out, listed where the run listed them, else counted."""
    listed = run.facts["stream"].get("skipped") or run.summary.get("skipped_images") or []
    return [str(each) for each in listed] if isinstance(listed, list) else [f"{listed} images"]


def _dates(runs: Sequence[RunResults]) -> str:
    days = []
    for created in (str(run.facts.get("created") or "") for run in runs):
        try:
            days.append(datetime.fromisoformat(created).date().isoformat())
        except ValueError:
            days.append(created)
    days = sorted({day for day in days if day})
    return " – ".join(dict.fromkeys([days[0], days[-1]])) if days else "no date"
