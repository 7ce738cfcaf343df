"""A grid of methods and seeds on one stream: every cell a run's folder, so a killed grid goes on where it stood.

Beside the cells stand the table (`compare.json`, `compare.md`), what a step costs (`steps.json`), and what accuracy
costs (`accuracy-bytes.svg`, `accuracy-time.svg`).
"""

import contextlib
import dataclasses
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from perdure import metrics
from perdure.core import checkpoint
from perdure.core.manifests import check_several
from perdure.experiments import step_cost
from perdure.experiments.cluster import Cluster, run_beside
from perdure.experiments.orders import REMEDY, fixed_order
from perdure.formatting import Aside
from perdure.options.paths import refuse_same
from perdure.process import as_found, plain
from perdure.reporting.report import trade_offs
from perdure.reporting.runs import RunResults, ignore, steps_of
from perdure.reporting.tables import check_complete, markdown, tabulate
from perdure.reporting.tracking import tracked
from perdure.training.building import dry_run
from perdure.training.config import BESIDE_RESULTS, RunConfig, make_backbone, make_method, make_stream, with_former
from perdure.training.loop import Progress, Quiet, told_by
from perdure.training.record import recorded_config
from perdure.training.run import resume, run
from perdure.training.runtime import Runtime, resolve
from perdure.training.snapshots import Interrupted
from perdure.types import Row, Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    method: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / "summary.json").exists()

    def configured(self, config: RunConfig) -> RunConfig:
        """What all cells share, with this one's method and seed."""
        return dataclasses.replace(config, method=self.method, seed=self.seed)

    def settled(self, config: RunConfig) -> RunConfig:
        """The same with the learning rate of the method, where none is given."""
        return self.configured(config).settled()


class GridProgress(Progress, step_cost.StepProgress, Protocol):
    """Progress that is also told of the grid."""

    def cell(self, number: int, total: int, method: str, seed: int, left: float | None) -> None:
        """Run number `number` (from 0) of `total` begins; `left` seconds are left for all, as far as one can tell."""

    def beside(self, number: int, total: int, method: str, seed: int, event: str, facts: dict[str, Any]) -> None:
        """A run among others that go on at the same time was scored (`scores`), or has something to say (`note`)."""


def cells(methods: Sequence[str], seeds: Sequence[int], out: str | Path) -> list[Cell]:
    """The grid, seeds outermost: after each seed the table is complete for it.

    Raises:
        ValueError: for a method that cannot be built, for no method or seed, or one that stands twice.
    """
    for what, given in (("methods", methods), ("seeds", seeds)):
        if not given:
            raise ValueError(f"--{what} is empty: give at least one")
    for method in methods:
        make_method(method)
    names = [_folder_name(method) for method in methods]
    for name, method in zip(names, methods, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"{method!r} stands twice among the methods; write each once")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(f"seed {seed} stands twice among the seeds; write each once")
    return [Cell(m, s, Path(out) / f"{n}-seed{s}") for s in seeds for n, m in zip(names, methods, strict=True)]


@plain()
def compare(
    config: RunConfig,
    grid: Sequence[Cell],
    out: str | Path,
    progress: GridProgress | None = None,
    *,
    steps: bool = True,
    track: str = "",
    cluster: Cluster | None = None,
) -> list[dict[str, Any]]:
    """Run what is not finished of a grid; returns the table, one row a method.

    Every cell computes in the same way (device, precision, attention are resolved once). What the tasks' descriptions
    rule out is refused before the first cell runs. The table is also written to `out`, once the cells are finished and
    again with the step costs; it has the methods of `grid` only, and of other finished runs in `out` a note tells.

    Args:
        config: what all cells share; its method and seed are replaced.
        grid: from `cells`.
        out: folder of the grid.
        progress: who is told.
        track: experiment trackers that each run is followed by, see `tracked`.
        cluster: where cells run beside each other; None runs them here, one after another.
        steps: measure what a step costs against plain LoRA's, where that is not known yet.

    Raises:
        ValueError: when a run in `out` was made with other options or is damaged, or anything in `config` cannot be
            done.
        Interrupted: after SIGINT or SIGTERM.
    """
    out = Path(out)
    check_several(out)
    if config.lr is None and progress:
        progress.note(Aside("each method learns at its own rate, see 'perdure list methods'; --lr gives all the same"))
    refuse_same(out, config.stream, *config.retain)
    with checkpoint.locked(out):
        runtime = None
        steps_of(out)  # a damaged one is told of now, not after hours
        for cell in grid:
            runtime = _made(config, cell, progress.note if progress else ignore) or runtime
        if unfinished := [cell for cell in grid if not cell.finished]:
            seeds = list(dict.fromkeys(cell.seed for cell in grid))
            runtime = _ready(config, unfinished, runtime, seeds, progress.note if progress else ignore)
        if unfinished and runtime is not None:
            if cluster is not None and cluster.beside:
                _beside(config, grid, track, progress, dataclasses.replace(runtime, threads=cluster.cpus), cluster)
            else:
                _in_turn(config, grid, track, progress, runtime)
        table = _write(grid, out)
        if steps and runtime is not None:
            methods = list(dict.fromkeys(cell.method for cell in grid))
            with as_found(runtime.threads):
                step_cost.measure_steps(config, methods, runtime, out, progress)
            table = _write(grid, out)
        if progress and (left_out := _left_out(grid, out)):
            progress.note(left_out)
    return table


def _in_turn(
    config: RunConfig, grid: Sequence[Cell], track: str, progress: GridProgress | None, runtime: Runtime
) -> None:
    for number, cell in enumerate(grid):
        if cell.finished:
            continue
        if progress:
            progress.cell(number, len(grid), cell.method, cell.seed, seconds_left(grid))
        try:
            _run_cell(cell.configured(config), cell.folder, track, runtime, told_by(progress))
        except Interrupted as stop:
            raise _stopped(cell, stop) from stop


def _beside(
    config: RunConfig,
    grid: Sequence[Cell],
    track: str,
    progress: GridProgress | None,
    runtime: Runtime,
    cluster: Cluster,
) -> None:
    unfinished = [(number, cell) for number, cell in enumerate(grid) if not cell.finished]
    calls = [
        (
            _run_elsewhere,
            {"config": c.configured(config), "folder": c.folder.absolute(), "track": track, "runtime": runtime},
        )
        for _, c in unfinished
    ]

    def told(place: int, event: str, facts: dict[str, Any]) -> None:
        number, cell = unfinished[place]
        if progress:
            progress.beside(number, len(grid), cell.method, cell.seed, event, facts)

    try:
        run_beside(cluster, calls, told)
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped, all is saved; the same command goes on from here") from stop


def _run_cell(config: RunConfig, folder: Path, track: str, runtime: Runtime, progress: Progress) -> None:
    with tracked(progress, track, folder) as told:
        if (folder / "run.json").exists():
            resume(folder, told)
        else:
            run(config, folder, told, runtime)


def _run_elsewhere(
    config: RunConfig, folder: Path, track: str, runtime: Runtime, tell: Callable[[str, dict[str, Any]], None]
) -> None:
    """A cell in a worker; one that was started again finds what is finished and goes on."""
    if (folder / "summary.json").exists():
        return
    with contextlib.suppress(Interrupted):  # the grid was stopped, and says so
        _run_cell(config, folder, track, runtime, _Telling(tell))


class _Telling(Quiet):
    """Tells the grid what a cell has to say."""

    def __init__(self, tell: Callable[[str, dict[str, Any]], None]) -> None:
        self.tell = tell

    def scores(self, task: Task, rows: list[Row]) -> None:
        average = metrics.average_after(rows, task.index)
        self.tell("scores", {"task": task.index, "tasks": task.total, "average": average})

    def note(self, text: str) -> None:
        self.tell("note", {"text": text})


def _stopped(cell: Cell, stop: Interrupted) -> Interrupted:
    said = str(stop).partition(";")[0]
    return Interrupted(f"{cell.folder.name}: {said}; the same command goes on from here")


def seconds_left(grid: Sequence[Cell]) -> float | None:
    """What the unfinished cells will take, judged by finished ones of the same method, else by all; None at first."""
    took = {cell: _seconds(cell) for cell in grid if cell.finished}
    if not took:
        return None
    left = 0.0
    for cell in grid:
        if cell not in took:
            alike = [seconds for other, seconds in took.items() if other.method == cell.method]
            left += max(0.0, statistics.fmean(alike or took.values()) - _seconds(cell))
    return left


def _write(grid: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """Write table and plots of a finished grid."""
    table = tabulate([(cell.method, RunResults.read(cell.folder)) for cell in grid])
    checkpoint.write_json(out / "compare.json", table)
    checkpoint.write_text(out / "compare.md", markdown(table))
    for name, drawing in trade_offs([(row["method"], row.get) for row in table]).items():
        drawing.save(out / f"accuracy-{name}.svg")
    return table


def _made(config: RunConfig, cell: Cell, note: Callable[[str], None]) -> Runtime | None:
    """How a cell that is there computes; other options than it was made with would have no effect on it."""
    if not (cell.folder / "run.json").exists():
        return None
    made = RunResults.read(cell.folder, note if cell.finished else ignore)
    written, runtime = recorded_config(cell.folder, made.facts).describe(), Runtime(**made.facts["resolved"])
    for name, value in cell.settled(config).describe().items():
        if name not in BESIDE_RESULTS and written[name] != value:
            raise ValueError(
                f"{cell.folder} was made with {name}={written[name]!r}, not {value!r}: give the same options "
                "to go on, or another --out to start anew"
            )
    if cell.finished:
        check_complete(made)
    return runtime


def _ready(
    config: RunConfig,
    unfinished: Sequence[Cell],
    runtime: Runtime | None,
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> Runtime:
    """How cells compute; refuses methods that a task would refuse when its turn comes, perhaps after hours.

    And seeds by which the order of tasks alone is to differ, where the stream fixes it; else it is said that it does.
    """
    backbone = make_backbone(config.backbone)
    if runtime is None:
        runtime = resolve(backbone, config.precision, config.attention, config.device)
    runtime.apply(backbone)
    if "order" in config.vary.split(",") and (fixed := fixed_order(config, backbone.preprocess, seeds)):
        if config.vary == "order":
            raise ValueError(f"--vary order has no effect: {fixed}. {REMEDY}")
        say(f"{fixed}. {REMEDY}")
    seed = unfinished[0].seed
    stream = make_stream(dataclasses.replace(config, seed=seed), backbone.preprocess)
    for method in dict.fromkeys(cell.method for cell in unfinished):
        try:
            # a former part may read another backbone
            own = backbone if with_former(config.backbone, "backbone", method) == config.backbone else None
            mine = dataclasses.replace(config, method=method, seed=seed)
            dry_run(mine, own or make_backbone(config.backbone, method), stream)
        except ValueError as error:
            raise ValueError(f"--methods {method!r}: {error}") from error
    return runtime


def _left_out(grid: Sequence[Cell], out: Path) -> str:
    """What `out` holds beside the grid, and how to see it in the table; empty when there is nothing."""
    mine = {cell.folder.name for cell in grid}
    names, methods, seeds = [], [], []
    for file in sorted(out.glob("*/summary.json")):
        if file.parent.name in mine or not (file.parent / "run.json").is_file():
            continue
        names.append(file.parent.name)
        try:
            other = RunResults.read(file.parent)
        except ValueError:  # it is not asked for: its name will do
            continue
        methods.append(other.method)
        seeds.append(other.seed)
    if not names:
        return ""
    more = {
        "--methods": shlex.join(sorted(set(methods) - {cell.method for cell in grid})),
        "--seeds": " ".join(map(str, sorted({s for s in seeds if s is not None} - {cell.seed for cell in grid}))),
    }
    how = " and ".join(f"{values} to {flag}" for flag, values in more.items() if values)
    runs = f"{len(names)} more finished run{'s' if len(names) > 1 else ''}"
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{out} holds {runs}, not in this table: {listed}" + (f"; to include, add {how}" if how else "")


def _seconds(cell: Cell) -> float:
    """What a cell took so far."""
    took = [each.manifest["seconds"] for each in checkpoint.whole(cell.folder) if "seconds" in each.manifest]
    return sum(s["prepare"] + s["train"] + s["finish"] + s["evaluate"] for s in took)


def _folder_name(method: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", method.replace(" ", "")).strip("_")
