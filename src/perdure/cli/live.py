"""What moves on a terminal: a spinner, or bars; on standard error, so that standard output may go elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from perdure.cli.eta import Pace
from perdure.formatting import human_seconds


class Live:
    """One thing at a time that is shown until another is, or until something is said.

    Args:
        console: where; a terminal or a notebook, else nothing is shown.
        idle: whether nothing is to be shown anyhow.
    """

    def __init__(self, console: Console, idle: bool) -> None:
        self.console, self.idle = console, idle
        self.grid: Pace | None = None  # the grid that a run is one of
        self.shown: Progress | None = None
        self._text = ""  # of what is waited for; empty beside a bar of steps
        self._fresh = False  # nothing has moved yet

    def wait(self, text: str) -> None:
        """Say what is being done, for as long as it takes."""
        self.close()
        if not self.may:
            return
        if self.grid:
            self.rows(text, None)
        else:
            spinner = SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            self._show(*spinner).add_task(text, total=None)
        self._text = text

    @property
    def may(self) -> bool:
        """Whether something can move."""
        return not self.idle and (self.console.is_terminal or self.console.is_jupyter)

    def rows(self, where: str, steps: int | None) -> None:
        """A bar for what is being done, of unknown length when `steps` is None; above it one for the whole grid."""
        self.close()
        bar = BarColumn(bar_width=10 if self.console.width < 100 else 24)
        line = TextColumn("{task.fields[line]}", markup=False)
        shown = self._show(TextColumn("{task.description}", markup=False), bar, line, _TimeLeft())
        if grid := self.grid:
            run = f"run {grid.number + 1}/{grid.total}"
            shown.update(shown.add_task(run, total=1.0, line=grid.name, left=grid.left), completed=grid.share)
        shown.add_task(where, total=steps, line="")
        self._text = ""

    def move(self, line: str, done: int | None = None, share: float = 0.0) -> None:
        """Say how far it is: `done` steps, which are this `share` of the task; None where there are no steps.

        The first time it is drawn at once: what takes less than a frame is seen too.
        """
        if self.shown is None:
            return
        below = self.shown.task_ids[-1]
        if self._text and not self.grid:
            self.shown.update(below, description=f"{self._text}, {line}", refresh=self._fresh)
        else:
            self.shown.update(below, completed=done, line=line, refresh=self._fresh)
        self._fresh = False
        if self.grid and done is not None:
            self.grid.within = share
            self.shown.update(self.shown.task_ids[0], completed=self.grid.share)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, something is printed; then what was shown goes on."""
        shown, text = self.shown, self._text
        self.close()
        yield
        if shown is not None:
            shown.start()
            self.shown, self._text = shown, text

    def close(self) -> None:
        """Take away what is shown."""
        if self.shown is not None:
            self.shown.stop()
            self.shown, self._text = None, ""

    def _show(self, *columns: ProgressColumn) -> Progress:
        shown = Progress(*columns, console=self.console, transient=True, refresh_per_second=4, redirect_stdout=False)
        shown.start()
        self.shown, self._fresh = shown, True
        return shown


class _TimeLeft(ProgressColumn):
    """As `human_seconds`, once there is a speed to judge by."""

    def render(self, task: Any) -> Text:
        """The column's text."""
        given = task.fields.get("left")
        left = given() if given else None if task.finished else task.time_remaining
        return Text("" if left is None else f"{human_seconds(left)} left")
