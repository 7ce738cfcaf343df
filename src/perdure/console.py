"""What a person sees: live progress and tables on a terminal, plain lines elsewhere, JSON events on request."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from perdure.types import Row, Task

_REFRESH = 0.5  # seconds between readings of the loss, which waits for the device


class Screen:
    """Implements `perdure.train.Progress`.

    Args:
        as_json: one JSON object per event on standard output, and nothing else there.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.json = as_json
        self.out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.live = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._images, self._start, self._read, self._epochs, self._steps = 0, 0.0, 0.0, 1, 0

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """A task begins."""
        self._close()
        self._images, self._start, self._read = 0, time.perf_counter(), 0.0
        self._epochs, self._steps = epochs, steps
        self._event("task", task=task.index, tasks=tasks, name=task.name, epochs=epochs, steps=steps)
        if self.json or not self.live.is_terminal:
            return
        self._bar = Progress(
            TextColumn(f"task {task.index + 1}{f'/{tasks}' if tasks else ''}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.live,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task("", total=max(steps, 1), line="preparing")

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """A step ended."""
        self._images += images
        now = time.perf_counter()
        if now - self._read < _REFRESH and step != self._steps:
            return
        self._read = now
        rate = self._images / (now - self._start)
        epoch = min(self._epochs, 1 + (step - 1) * self._epochs // max(self._steps, 1))
        if self._bar is not None:
            line = f"epoch {epoch}/{self._epochs}  loss {float(loss):.3f}  {rate:,.0f} images/s"
            self._bar.update(self._bar.task_ids[0], completed=step, line=line)
        elif self.json:
            self._event("step", step=step, steps=self._steps, epoch=epoch, loss=float(loss), images_per_second=rate)

    def scores(self, task: Task, rows: list[Row]) -> None:
        """A task was learnt and evaluated."""
        self._close()
        self._event("scores", task=task.index, rows=[asdict(row) for row in rows])
        if self.json:
            return

        def mean(metric: str) -> float:
            values = [row.value for row in rows if row.metric == metric and row.after == task.index]
            return sum(values) / len(values) if values else float("nan")

        new = [r.value for r in rows if r.metric == "accuracy" and r.on == task.index == r.after]
        if not new:
            self.out.print(f"  task {task.index + 1:>2}  {task.name[:38]:<38}  no test images", markup=False)
            return
        self.out.print(
            f"  task {task.index + 1:>2}  {task.name[:38]:<38}  new {new[0]:6.1%}  all so far {mean('accuracy'):6.1%}  "
            f"with task id {mean('accuracy_with_task_id'):6.1%}  {time.perf_counter() - self._start:6.1f} s"
        )

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._close()
        self._event("note", text=text)
        if not self.json:
            self.out.print(text, markup=False)

    def result(self, content: Any, text: str = "") -> None:
        """The outcome of a command: `content` as JSON, or `text` for a person."""
        self._close()
        if self.json:
            print(json.dumps(content, ensure_ascii=False))
        elif text:
            self.out.print(text, markup=False)

    def matrix(self, summary: dict[str, Any], names: Sequence[str], title: str) -> None:
        """A run's score matrix and summary."""
        self._close()
        if self.json:
            return
        tasks = len(summary["matrix"])
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
        table.add_column("after task", justify="right")
        for j in range(tasks):
            table.add_column(f"on {j + 1}", justify="right")
        table.add_column("mean", justify="right", style="bold")
        for i, line in enumerate(summary["matrix"]):
            seen = [v for v in line[: i + 1] if v is not None]
            cells = ["" if v is None else f"{100 * v:.0f}" for v in line]
            table.add_row(str(i + 1), *cells, f"{100 * sum(seen) / len(seen):.1f}")
        self.out.print(table)
        self.out.print("  " + _headline(summary), markup=False)

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Methods side by side, mean ± spread."""
        self._close()
        if self.json:
            print(json.dumps(list(rows), ensure_ascii=False))
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        table.add_column("method", overflow="fold")
        columns = {
            "acc": "accuracy",
            "aaa": "average",
            "forgetting": "forgetting",
            "acc_with_task_id": "with task id",
            "task_id_acc": "task id",
        }
        for name in (*columns.values(), "images/s", "stored", "seconds"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(
                row["method"],
                *[_share(row[key]) for key in columns],
                _number(row["images_per_second"]),
                human_bytes(row["stored_bytes"][0]),
                _number(row["seconds"]),
            )
        self.out.print(table)

    def listing(self, entries: Sequence[tuple[str, str]]) -> None:
        """Names and what they are."""
        if self.json:
            print(json.dumps(dict(entries), ensure_ascii=False))
            return
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2))
        for name, text in entries:
            table.add_row(name, text)
        self.out.print(table, markup=False)

    def error(self, text: str) -> None:
        """One line on standard error."""
        self._close()
        print(f"perdure: {' '.join(text.split())}", file=sys.stderr)

    def _event(self, kind: str, **content: Any) -> None:
        if self.json:
            print(json.dumps({"event": kind, **content}, ensure_ascii=False), flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _headline(summary: dict[str, Any]) -> str:
    parts = [
        ("accuracy", summary["acc"]),
        ("average", summary["aaa"]),
        ("forgetting", summary["forgetting"]),
        ("with task id", summary["acc_with_task_id"]),
        ("task id", summary["task_id_acc"]),
    ]
    shares = "   ".join(f"{name} {value:.1%}" for name, value in parts if value is not None)
    return f"{shares}   stored {human_bytes(summary['stored_bytes'])}"


def _share(value: list[float | None] | None) -> str:
    if value is None or value[0] is None:
        return "–"
    spread = f" ±{100 * value[1]:.1f}" if value[1] is not None else ""
    return f"{100 * value[0]:.1f}{spread}"


def _number(value: list[float | None] | None) -> str:
    return "–" if value is None or value[0] is None else f"{value[0]:,.0f}"
