"""A grid of methods and seeds on one stream: every cell a run's folder, so a killed grid goes on where it stood."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure import checkpoint, metrics
from perdure.config import RunConfig, make_backbone, make_method
from perdure.run import read_summary, resume, run
from perdure.runtime import resolve
from perdure.train import Progress

KEYS = ("acc", "aaa", "forgetting", "acc_with_task_id", "forgetting_with_task_id", "task_id_acc", "images_per_second", "stored_bytes")
"""What the table shows of each summary."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    method: str
    seed: int
    folder: Path


def cells(methods: Sequence[str], seeds: Sequence[int], out: Path) -> list[Cell]:
    """The grid, seeds outermost: after each seed the table is complete for it.

    Raises:
        ValueError: for a method that cannot be built, or one that stands twice.
    """
    for method in methods:
        make_method(method)
    names = [_folder_name(method) for method in methods]
    for name, method in zip(names, methods, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"{method!r} stands twice among the methods; write each once")
    return [Cell(m, s, out / f"{n}-seed{s}") for s in seeds for n, m in zip(names, methods, strict=True)]


def compare(
    config: RunConfig, grid: Sequence[Cell], out: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Run what is not finished of a grid; returns the table, one row a method.

    Every cell computes in the same way (device, precision, attention are resolved once). The table is also written to
    `out`/compare.json.

    Args:
        config: what all cells share; its method and seed are replaced.
        grid: from `cells`.
        out: folder of the grid.
        progress: who is told.
    """
    runtime = None
    with checkpoint.locked(out):
        for number, cell in enumerate(grid):
            if progress:
                progress.note(f"{cell.method}, seed {cell.seed} ({number + 1} of {len(grid)})")
            if (cell.folder / "summary.json").exists():
                continue
            if (cell.folder / "run.json").exists():
                resume(cell.folder, progress)
                continue
            if runtime is None:
                backbone = make_backbone(config.backbone)
                runtime = resolve(backbone, config.precision, config.attention, config.batch_size, config.device)
            run(dataclasses.replace(config, method=cell.method, seed=cell.seed), cell.folder, progress, runtime)
        table = tabulate([(cell.method, read_summary(cell.folder)) for cell in grid])
        checkpoint.write_json(out / "compare.json", table)
    return table


def tabulate(summaries: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the runs of each method: `{"method", "runs", key: [mean, std]}`."""
    table = []
    for method in dict.fromkeys(name for name, _ in summaries):
        mine = [summary for name, summary in summaries if name == method]
        row: dict[str, Any] = {"method": method, "runs": len(mine)}
        for key in KEYS:
            values = [s[key] for s in mine if s.get(key) is not None]
            row[key] = list(metrics.spread(values)) if values else None
        seconds = [sum(sum(task.values()) for task in s["seconds_per_task"]) for s in mine]
        row["seconds"] = list(metrics.spread(seconds))
        row["trainable_parameters"] = mine[0]["trainable_parameters"]
        table.append(row)
    return table


def _folder_name(method: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", method.replace(" ", "")).strip("_")
