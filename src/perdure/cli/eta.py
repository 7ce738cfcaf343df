"""Where a grid of runs stands, and how long it will still take."""

import time
from dataclasses import dataclass, field


@dataclass
class Pace:
    """A run of a grid under way; the time left is as foretold when it began, else judged by its own speed.

    Args:
        number: of the run, from 0.
        total: number of runs.
        name: of the run.
        foretold: seconds that were left for all runs when this one began; None when that was not known.
    """

    number: int
    total: int
    name: str
    foretold: float | None = None
    within: float = 0.0
    """Share of the current task that is done."""
    _done: float = 0.0  # tasks behind it, as a share of the run
    _task: float = 0.0  # the current task, as a share of the run; 0 where their number is open
    _first: float | None = None  # share at which we began: a resumed run does not begin at 0
    _began: float = field(default_factory=lambda: time.perf_counter())

    def begin(self, task: int, tasks: int | None) -> None:
        """Task number `task` (from 0) of `tasks` begins."""
        self._task = 1 / tasks if tasks else 0.0
        self._done, self.within = task * self._task, 0.0
        if self._first is None:
            self._first = self._done

    @property
    def share(self) -> float:
        """Share of the grid that is done, all runs counted alike."""
        return (self.number + self._run) / self.total

    def left(self) -> float | None:
        """Seconds for all that is left; None as long as there is nothing to judge by."""
        took = time.perf_counter() - self._began
        if self.foretold is not None:
            return max(self.foretold - took, 0.0)
        if self._first is None or self._run - self._first < 0.02:
            return None
        return took / (self._run - self._first) * (1 - self._run + self.total - self.number - 1)

    @property
    def _run(self) -> float:
        return self._done + self._task * self.within
