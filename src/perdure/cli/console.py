"""What a person sees: live progress and tables on a terminal, plain lines elsewhere, JSON events on request."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perdure.cli.eta import Pace
from perdure.cli.json_lines import json_line
from perdure.cli.live import Live
from perdure.cli.tables import column_names, comparison, ends, flowed
from perdure.formatting import (
    Aside,
    human_bytes,
    human_seconds,
    printable,
    settings,
    shortened,
)

if TYPE_CHECKING:  # so that what computes nothing does not wait for torch
    from torch import Tensor

    from perdure.types import Row, Task

_REFRESH = 0.5  # seconds between readings of the loss, which waits for the device
_LONGEST_LINE, _LONGEST_ERROR = 4_000, 1_000  # characters; what is longer is cut in its middle
_BESIDE = {"recall": "own gallery"}  # what the score is called where the task is told
_MATRICES = {
    "matrix": "% right on each task (columns), after each task (rows)",
    "lenient_matrix": "the same where the truth is in what is said, in whatever form",
}
_OF_CAPTIONS = ("cider", "bleu", "rouge")  # scores that are no share of right answers
_RESULTS = ("compared",)  # events that are what was asked for
_UNBROKEN = 10_000  # columns of what is no terminal: a file or a pipe breaks no line


class Screen:
    """Implements `perdure.experiments.grid.GridProgress`, and so `perdure.training.loop.Progress`.

    Args:
        as_json: one JSON object per event on standard output, and nothing else there.
        quiet: results and mistakes only.
        verbose: a line an epoch, wherever the output goes.
        hushed: shows nothing, as one of several processes that show the same.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False, hushed: bool = False) -> None:
        self.json, self.quiet, self.verbose, self.hushed = as_json, quiet, verbose, hushed
        terminal = sys.stdout.isatty() or Console().is_jupyter
        width = None if terminal else _UNBROKEN
        self.out = Console(highlight=False, markup=False, emoji=False, soft_wrap=not terminal, width=width)
        live = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = Live(live, idle=as_json or quiet or hushed)
        self._images, self._start, self._read, self._epochs, self._steps = 0, 0.0, 0.0, 1, 0
        self._encoded, self._headed = 0, False
        self.tasks: Sequence[Task] = ()  # learnt so far, also by former commands, and the one in work
        self.usual = "exact"  # how answers are scored of tasks that do not say it

    def wait(self, text: str) -> None:
        """On a terminal, say what is being done until something else is shown."""
        self.live.wait(text)

    @property
    def asks(self) -> bool:
        """Whether a person sits at a terminal and can type again what was wrong."""
        return sys.stdin.isatty() and self.out.is_terminal and not self.json

    def lines(self, help: str) -> Iterator[str]:
        """What is typed line after line, or comes from standard input, without empty ones; `help` is told at first."""
        self.close()
        if not self.asks:
            yield from filter(None, map(str.strip, sys.stdin))
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # from now on lines can be edited
        self._say(help)
        with contextlib.suppress(EOFError):
            while True:
                if line := input("> ").strip():
                    yield line

    def cell(self, number: int, total: int, method: str, seed: int, left: float | None) -> None:
        """Run number `number` (from 0) of a grid of `total` begins; about `left` seconds are left."""
        self.close()
        self._event("cell", cell=number, cells=total, method=method, seed=seed, seconds_left=left)
        about = "" if left is None else f", about {human_seconds(left)} left"
        self._tell(f"[{number + 1}/{total}] {method}, seed {seed}{about}")
        self.live.grid = Pace(number, total, printable(f"{shortened(method)}, seed {seed}"), left)
        self._headed = False
        self.wait("preparing")

    def beside(self, number: int, total: int, method: str, seed: int, event: str, facts: dict[str, Any]) -> None:
        """A run of a grid, among others that go on at the same time, was scored or has something to say."""
        self.close()
        self._event(event, cell=number, cells=total, method=method, seed=seed, **facts)
        where = f"[{number + 1}/{total}] {method}, seed {seed}"
        if event == "note":
            self._tell(f"{where}: {facts['text']}")
            return
        of = f" of {facts['tasks']}" if facts["tasks"] else ""
        self._tell(f"{where}: task {facts['task'] + 1}{of}, average accuracy {100 * facts['average']:.1f} %")
        self.wait("cells run beside each other")

    def trial(self, number: int, total: int, options: Mapping[str, Any], best: float | None) -> None:
        """Trial number `number` (from 0) of a search of `total` begins; `best` is the best score so far."""
        self.close()
        self._event("trial", trial=number, trials=total, options=dict(options), best=best)
        so_far = "" if best is None else f"; best so far {100 * best:.1f} %"
        self._tell(f"[{number + 1}/{total}] {settings(options)}{so_far}")
        self._headed = False
        self.wait("preparing")

    def step_cost(self, number: int, total: int, method: str) -> None:
        """Method number `number` (from 0) of `total` is timed against plain LoRA."""
        self.close()
        self.live.grid = None
        self._event("step_cost", method=method, number=number, total=total)
        self._tell(f"step cost {number + 1}/{total}: {method}")
        self.wait("timing its steps against plain LoRA's")

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """A task begins."""
        self.close()
        self._images, self._encoded, self._start, self._read = 0, 0, time.perf_counter(), 0.0
        self._epochs, self._steps = epochs, steps
        self.tasks = *self.tasks[: task.index], task
        self._event("task", task=task.index, tasks=tasks, name=task.name, epochs=epochs, steps=steps)
        where = f"task {task.number}{f'/{tasks}' if tasks else ''}"
        if self.live.grid:
            self.live.grid.begin(task.index, tasks)
        if not steps:
            self.wait(f"{where}  evaluating")
        elif self.live.may:
            self.live.rows(where, steps)

    def encoded(self, examples: int) -> None:
        """So many more were encoded, outside the steps."""
        self._encoded += examples
        self.live.move(f"{self._encoded:,} encoded")

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """A step ended."""
        self._images += images
        now = time.perf_counter()
        ends = step * self._epochs % max(self._steps, 1) == 0  # an epoch
        if now - self._read < _REFRESH and step != self._steps and not (self.verbose and ends):
            return
        self._read = now
        rate = self._images / (now - self._start)
        epoch = min(self._epochs, 1 + (step - 1) * self._epochs // max(self._steps, 1))
        if self.verbose and ends:
            self._tell(f"  epoch {epoch}/{self._epochs}  loss {float(loss):.4f}  {rate:,.0f} images/s")
        if self.live.shown:
            line = f"epoch {epoch}/{self._epochs}  loss {float(loss):.3f}  {rate:,.0f} images/s"
            last = step == self._steps
            self.live.move("evaluating" if last else line, step, step / max(self._steps, 1))
            self._encoded = 0
        elif self.json:
            self._event("step", step=step, steps=self._steps, epoch=epoch, loss=float(loss), images_per_second=rate)

    def scores(self, task: Task, rows: list[Row]) -> None:
        """A task was learnt and evaluated."""
        self.close()
        self._encoded = 0
        self._event("scores", task=task.index, rows=[asdict(row) for row in rows])
        seconds = time.perf_counter() - self._start

        from perdure.metrics import only_new, scored  # here: advice, which uses this file too, waits for no torch
        from perdure.training.summary import unlike_scores

        score, told, _ = scored(rows)
        told, head = ("lenient", "lenient") if score == "strict" else (told, _BESIDE.get(score, "with task id"))

        unlabelled = {each.index for each in self.tasks if each.pretext}
        unlike = unlike_scores([each.score or self.usual for each in self.tasks if not each.pretext])

        def mean(metric: str) -> str:
            known = [row for row in rows if row.metric == metric and row.after == task.index]
            values = {row.on: row.value for row in known if row.on is not None and row.on <= task.index}
            none = unlike or only_new(values, task.index, unlabelled)
            return "–" if none else f"{sum(values.values()) / len(values):.1%}"

        new = [r.value for r in rows if r.metric == score and r.on == task.index == r.after]
        room = max(8, min(self.out.width, 100) - 53)
        if not self._headed:
            self._tell(f"  task  {'':<{room}}     new  average  {head:>12}       time")
        self._headed = True
        name = printable(task.name)
        name = name if len(name) <= room else f"{name[: room - 1]}…"
        shares = f"{f'{new[0]:.1%}' if new else 'no test':>8} {mean(score):>8} {mean(told):>13}"
        # Padded by what a character takes on the screen: a Chinese one takes two columns.
        padding = " " * max(0, room - Text(name).cell_len)
        self._tell(f"  {task.number:>4}  {name}{padding}{shares} {human_seconds(seconds):>10}")
        if task.total is not None and task.index + 1 < task.total:
            self.wait(f"task {task.index + 2}/{task.total}  preparing")

    def note(self, text: str) -> None:
        """Something the user should know; with `quiet` on standard error, for something may have no effect."""
        if self.quiet and not self.hushed and not isinstance(text, Aside):
            self.warn(text)
            return
        with self.live.aside():
            self._event("note", text=text)
            self._tell(text)

    def warn(self, text: str) -> None:
        """Something the user should know, beside the answers: on standard error, where no program takes it for one."""
        self.close()
        print(f"perdure: {' '.join(text.split())}", file=sys.stderr)

    def result(self, content: Any, *lines: str) -> None:
        """The outcome of a command: `content` as JSON, or `lines` for a person."""
        self.close()
        if self.json:
            print(json_line(content), flush=True)
        else:
            self._say(*lines)

    def matrix(self, summary: dict[str, Any], names: Sequence[str], title: str) -> None:
        """A run's score matrix and summary."""
        self.close()
        if self.json:
            return
        kinds = dict.fromkeys(summary.get("scores", ()))
        unlike = [kind for kind in kinds if kind.startswith(_OF_CAPTIONS)]
        for key, what in _MATRICES.items():
            if key in summary:
                what = what.replace("% right", f"{' and '.join(unlike)} × 100") if unlike else what
                self._square(summary[key], f"{shortened(title)}: {what}" if key == "matrix" else what, summary)
        if why := summary.get("unlike_scores"):
            self._say(f"no means: {why}")
        elif len(kinds) > 1:
            self._say(f"means are of different scores: {', '.join(kinds)}")
        columns = column_names("lenient_matrix" in summary).items()
        parts = [f"{name} {summary[key]:.1%}" for key, name in columns if summary.get(key) is not None]
        self._say(*flowed([*parts, f"stored {human_bytes(summary['stored_bytes'])}"], self.out.width))
        never_taught = {name: numbers["strict"] for name, numbers in summary.get("answers", {}).items()}
        for name, score in (summary.get("zero_shot", {}) | never_taught).items():
            if score["drop"] is not None:
                self._say(f"held out, {shortened(name)}: {score['before']:.1%} before, {score['after'][-1]:.1%} now")

    def _square(self, matrix: Sequence[Sequence[float | None]], title: str, summary: Mapping[str, Any]) -> None:
        """A matrix of scores with a heading; means unless the scores of its tasks, or no old one, have any."""
        from perdure.metrics import never_measured, only_new

        tasks, never = len(matrix), never_measured(matrix)
        fitting = (self.out.width - len("after") - len("mean") - 4) // 4
        shown = ends(tasks, max(2, fitting))
        self._say("", title)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("after", justify="right")
        for j in shown:
            table.add_column("…" if j is None else str(j + 1), justify="right", min_width=3)
        table.add_column("mean", justify="right", min_width=5)
        for i in shown:
            if i is None:
                table.add_row("…")
                continue
            seen = {j: v for j, v in enumerate(matrix[i][: i + 1]) if v is not None}
            known = not summary.get("unlike_scores") and not only_new(seen, i, never)
            cells = ["" if j is None or (v := matrix[i][j]) is None else f"{100 * v:.0f}" for j in shown]
            table.add_row(str(i + 1), *cells, f"{100 * sum(seen.values()) / len(seen):.1f}" if known else "–")
        self.out.print(table)
        if None in shown:
            self._say(f"all {tasks} tasks are in summary.json and report.html")

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Methods side by side, mean ± spread."""
        self.close()
        if self.json:
            self._event("compared", table=list(rows))
            return
        self._say("", *comparison(rows, self.out.width))

    def measured(self, tasks: Sequence[Task], rows: Sequence[Row]) -> None:
        """Accuracy on each task."""
        self.close()
        if self.json:
            for row in rows:
                self.result(asdict(row))
            return
        from perdure.metrics import scored  # see `scores`
        from perdure.training.summary import unlike_scores

        score, told, task_id = scored(rows)
        kinds = {score: score, told: _BESIDE.get(score, "with task id"), task_id: "task id"}
        kinds |= {kind: kind for kind in ("lenient", "official", "likeliest", "empty", "unparsable")}
        kinds = {metric: title for metric, title in kinds.items() if any(row.metric == metric for row in rows)}
        found = {(row.on, row.metric): row.value for row in rows}
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("task", "", *kinds.values()):
            table.add_column(title, justify="left" if not title else "right")
        for task in tasks:
            shares = [found.get((task.index, metric)) for metric in kinds]
            table.add_row(
                str(task.number),
                printable(shortened(task.name)),
                *["–" if s is None else f"{s:.1%}" for s in shares],
            )
        self.out.print(table)
        every = [found[task.index, score] for task in tasks]
        unlike = unlike_scores([task.score for task in tasks if task.score])
        self._say(f"no mean: {unlike}" if unlike else f"mean over tasks {sum(every) / len(every):.1%}")

    def listing(self, entries: Sequence[tuple[str, str, str, str]]) -> None:
        """Names, options and what they are; of methods their learning rates."""
        if self.json:
            for name, options, text, lr in entries:
                self.result({"name": name, "options": options, "about": text} | ({"lr": lr} if lr else {}))
            return
        wide = max(len(name) for name, *_ in entries) + 2
        for name, options, text, lr in entries:
            options = "; ".join(filter(None, [options, f"learning rate {lr}" if lr else ""]))
            if not self.out.is_terminal:
                self._say(f"{name:<{wide}}{text}", *([f"{'':<{wide}}({options})"] if options else []))
                continue
            # A table of one row: a long text goes on below itself, not below the name.
            table = Table(box=None, pad_edge=False, show_header=False, padding=0)
            table.add_column(width=wide, style="bold", no_wrap=True)
            table.add_column()
            table.add_row(name, text)
            if options:
                table.add_row("", Text(f"({options})", style="dim"))
            self.out.print(table)

    def error(self, text: str) -> None:
        """One line on standard error."""
        self.close()
        if self.hushed:
            return
        with contextlib.suppress(OSError):  # whoever read it is gone; the exit code says it too
            line = printable(shortened(" ".join(text.split()), _LONGEST_ERROR))
            print(f"perdure: {line}", file=sys.stderr, flush=True)

    def _say(self, *lines: str) -> None:
        """All that a person is told passes here (or through a table's cells): one line each, with nothing that acts."""
        for line in lines if not (self.json or self.hushed) else ():
            self.out.print(printable(shortened(line, _LONGEST_LINE)), soft_wrap=True)

    def _tell(self, *lines: str) -> None:
        """What happens on the way to a result."""
        if not self.quiet:
            self._say(*lines)

    def _event(self, kind: str, **content: Any) -> None:
        if self.json and not self.hushed and (kind in _RESULTS or not self.quiet):
            print(json_line({"event": kind, **content}), flush=True)

    def close(self) -> None:
        """Take away what is live."""
        self.live.close()


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command is: its fields are the flags, whose docstrings are the help."""

    json: bool = False
    """One JSON object per event or result, for programs."""
    quiet: bool = False
    """Results, warnings and mistakes only."""
    verbose: bool = False
    """A line an epoch; of a mistake also where in the code it was found."""
    # Not `Path | None`: to look at such a default, tyro imports a package that takes a seventh of the time of a list.
    import_: Annotated[Optional[Path], tyro.conf.arg(name="import", metavar="FILE")] = None  # noqa: UP045
    """A Python file with methods of your own; the variable PERDURE_IMPORT does the same."""

    def __call__(self, screen: Screen) -> None:
        """Do it."""
        raise NotImplementedError
