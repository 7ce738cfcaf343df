"""The queue of lessons: one at a time is taught, in the order in which they came, while the learner answers."""

import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from perdure.formatting import printable, shortened
from perdure.types import Row, Task

State = Literal["waiting", "learning", "learnt", "failed", "stopped"]
_WAITING = 16
"""Lessons that may wait; one more is refused."""
_REMEMBERED = 100
_POINTS = 120
"""Of a lesson's curve, so that its length does not depend on the number of steps."""


class Stopped(Exception):
    """Whoever gave the lesson wants no more of it."""


def _nothing() -> None: ...


def new_id() -> str:
    """What a lesson is asked for by."""
    return secrets.token_hex(8)


@dataclass(eq=False)
class Lesson:
    """One thing to learn, and how far it is; implements `perdure.training.loop.Progress`."""

    title: str
    teach: Callable[["Lesson"], "Outcome"]
    tidy: Callable[[], None] = _nothing
    """Called once nothing more is done with it, however it ended."""
    shown: Callable[[str], str] = str
    """What is said, as others may read it."""
    source: str = ""
    """Of which an unfinished lesson in the learner's folder is its own, and given up where it fails."""
    id: str = field(default_factory=new_id)
    state: State = "waiting"
    said: str = ""
    """Why it failed."""
    notes: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss."""
    steps: int = 0
    seen: int = 0
    """How many examples were encoded outside the steps."""
    outcome: "Outcome | None" = None
    started: float = 0.0
    seconds: float = 0.0
    wanted: threading.Event = field(default_factory=threading.Event)
    """Set when it is to stop."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("learnt", "failed", "stopped")

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """It begins, with so many steps."""
        self.steps = steps

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """A step ended; raises `Stopped` where it is to be the last."""
        if self.wanted.is_set():
            raise Stopped
        if step % math.ceil(max(self.steps, 1) / _POINTS) == 0 or step == self.steps:
            self.losses.append((step, float(loss)))

    def encoded(self, examples: int) -> None:
        """So many more were encoded; raises `Stopped` where they are to be the last."""
        self.seen += examples
        if self.wanted.is_set():
            raise Stopped

    def scores(self, task: Task, rows: list[Row]) -> None:
        """Learnt and evaluated."""

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.notes.append(printable(shortened(self.shown(text), 1000)))

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        facts = {"lesson": self.id, "title": self.title, "state": self.state, "steps": self.steps, "notes": self.notes}
        facts |= {
            "encoded": self.seen,
            "step": self.losses[-1][0] if self.losses else 0,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        if self.said:
            facts["error"] = self.said
        return facts | (self.outcome.describe() if self.outcome else {})


@dataclass(frozen=True)
class Outcome:
    """What is known after a lesson.

    Args:
        names: of all tasks.
        matrix: score on each task (columns) after each task (rows).
    """

    names: tuple[str, ...]
    matrix: list[list[float | None]]

    def changes(self) -> list[tuple[str, float, float]]:
        """Of each earlier task that was measured before and after: its name, both scores."""
        if len(self.matrix) < 2:
            return []
        before, after = self.matrix[-2], self.matrix[-1]
        pairs = zip(self.names, before, after, strict=False)
        return [(name, old, new) for name, old, new in pairs if old is not None and new is not None]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        forgotten = [{"task": name, "before": before, "after": after} for name, before, after in self.changes()]
        return {"tasks": list(self.names), "matrix": self.matrix, "old_tasks": forgotten}


class Lessons:
    """Teaches in a thread of its own.

    Args:
        give_up: called after a lesson that was stopped (True) or that failed (False), to forget what it began.
        shown: what is said of lessons, as others may read it.
    """

    def __init__(self, give_up: Callable[[Lesson, bool], None], shown: Callable[[str], str] = str) -> None:
        self.give_up, self.shown = give_up, shown
        self._waiting: deque[Lesson] = deque()
        self._known: OrderedDict[str, Lesson] = OrderedDict()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="perdure-lessons", daemon=True).start()

    def put(
        self,
        title: str,
        teach: Callable[[Lesson], Outcome],
        tidy: Callable[[], None] = _nothing,
        id: str = "",
        again: bool = False,
    ) -> Lesson:
        """A lesson to be taught once those before it are; see `Lesson`.

        Args:
            title: see `Lesson`, as of the others.
            teach: see there.
            tidy: see there.
            id: see there; one of its own where it is left out.
            again: it waited before, in an app that is no more, and has its place.

        Raises:
            ValueError: when too many wait.
        """
        lesson = Lesson(title, teach, tidy, self.shown, id=id or new_id())
        with self._changed:
            if len(self._waiting) >= _WAITING and not again:
                raise ValueError(f"{_WAITING} lessons wait already: come back when some of them are learnt")
            self._waiting.append(lesson)
            self._changed.notify()
            self._known[lesson.id] = lesson
            while len(self._known) > _REMEMBERED:
                oldest = next((each for each in self._known.values() if each.over), None)
                if oldest is None:
                    break
                del self._known[oldest.id]
        return lesson

    def stop(self, id: str) -> Lesson:
        """Have a lesson stopped: one that waits leaves its place at once, one that is learnt ends with its step."""
        lesson = self[id]
        with self._changed:
            lesson.wanted.set()
            if waited := lesson.state == "waiting":
                self._waiting.remove(lesson)
                lesson.state = "stopped"
        if waited:
            lesson.tidy()
        return lesson

    def __getitem__(self, id: str) -> Lesson:
        with self._changed:
            if id not in self._known:
                raise ValueError(f"there is no lesson {shortened(id, 40)!r}: it may be long past")
            return self._known[id]

    def before(self, lesson: Lesson) -> int:
        """How many lessons come first."""
        with self._changed:
            pending = [each for each in self._known.values() if not each.over]
        return pending.index(lesson) if lesson in pending else 0

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                lesson = self._waiting.popleft()
                lesson.state, lesson.started = "learning", time.monotonic()
            # in a thread of its own: a fault of ours ends that one, with its traceback on the console, and not this
            teacher = threading.Thread(target=self._teach, args=(lesson,), name="perdure-teacher", daemon=True)
            teacher.start()
            teacher.join()

    def _teach(self, lesson: Lesson) -> None:
        state: State = "failed"
        try:
            lesson.outcome, state = lesson.teach(lesson), "learnt"
        except Stopped:
            state = "stopped"
        except (ValueError, OSError) as error:
            lesson.said = self._line(error)
        finally:
            if state != "learnt":
                try:
                    self.give_up(lesson, state == "stopped")
                except (ValueError, OSError) as error:
                    lesson.said = lesson.said or self._line(error)
            if state == "failed" and not lesson.said:
                lesson.said = "it failed, and the console of the app says why"
            lesson.tidy()
            lesson.seconds = time.monotonic() - lesson.started
            lesson.state = state

    def _line(self, error: Exception) -> str:
        """An error as one line for people."""
        return printable(shortened(self.shown(" ".join(str(error).split())), 1000))
