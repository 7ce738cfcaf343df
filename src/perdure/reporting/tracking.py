"""Runs followed by an experiment tracker, through Accelerate's: TensorBoard, Weights & Biases, MLflow and others.

Tracked are the loss, all scores of all tasks after every task, facts of the method (free directions, ranks) and, in the
end, the matrix as a picture. A run that is resumed continues its curve: `tracking.json` in its folder says which
tracker's run it belongs to, and at which step each task began.
"""

import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import msgspec
from torch import Tensor

from perdure import metrics
from perdure.core import checkpoint
from perdure.formatting import meant
from perdure.reporting import figures
from perdure.reporting.runs import RunResults
from perdure.storage import schema
from perdure.training.loop import Progress
from perdure.types import Row, Task

TRACKING = "tracking.json"
_POINTS = 100  # of the loss's curve, for each task: reading the loss waits for the device
_PACKAGES = {"comet_ml": "comet-ml"}  # where the package is not called as the tracker


class Tracking(TypedDict):
    """The content of tracking.json."""

    run: str
    trackers: dict[str, str]
    offsets: dict[str, int]


@contextmanager
def tracked(progress: Progress, names: str, out: Path) -> Iterator[Progress]:
    """`progress`, which trackers are told too while the context lasts; without names it stays as it is.

    Args:
        progress: who is told besides.
        names: of Accelerate's trackers, with commas between; empty continues those that the folder's run has.
        out: the run's folder.

    Raises:
        ValueError: for an unknown tracker, or one whose package is not installed.
    """
    before = _read(out)
    wanted = _wanted(names) or list(before["trackers"])
    if not wanted:
        yield progress
        return
    follower = _Follower(progress, out, before, wanted)
    try:
        yield follower
        follower.picture()
    finally:
        follower.finish()


def _wanted(names: str) -> list[str]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    there = [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = meant(name, LOGGER_TYPE_TO_CLASS) or f"; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            raise ValueError(f"--track {name!r} is no tracker{near}")
        if name not in there:
            raise ValueError(f"--track {name}: its package is missing: pip install {_PACKAGES.get(name, name)}")
    return wanted


def _read(out: Path) -> Tracking:
    path = out / TRACKING
    if path.is_file():
        return schema.read_typed(path, Tracking, "remove it: curves then begin anew")
    return Tracking(run=uuid.uuid4().hex, trackers={}, offsets={})


class _Follower:
    """Passes all on that a run tells, and tells trackers."""

    def __init__(self, inner: Progress, out: Path, content: Tracking, names: Sequence[str]) -> None:
        self.inner, self.out, self.content, self.names = inner, out, content, names
        self.trackers: list[Any] = []
        self.offset, self.steps, self.resets = 0, 0, False

    def _start(self) -> None:
        """Open or continue the trackers' runs, once there is one to follow."""
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.resets = not PartialState._shared_state  # Accelerate's trackers write to a log that needs it
        PartialState()
        facts = checkpoint.read_record(self.out)["config"]
        values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in facts.items()}
        for name in self.names:
            options = self._options(name)
            tracker = LOGGER_TYPE_TO_CLASS[name](**options)
            tracker.start()
            self.trackers.append(tracker)
            if name == "mlflow":
                self.content["trackers"][name] = tracker.tracker.info.run_id
            else:
                self.content["trackers"].setdefault(name, self.content["run"])
            if not self.content["offsets"]:
                tracker.store_init_configuration(values)

    def _options(self, name: str) -> dict[str, Any]:
        known, run = self.content["trackers"].get(name), self.content["run"]
        match name:
            case "tensorboard":
                return {"run_name": name, "logging_dir": self.out}
            case "wandb":
                self.out.mkdir(parents=True, exist_ok=True)
                where = {"name": self.out.name, "dir": str(self.out)}
                return {"run_name": "perdure", "id": known or run, "resume": "allow", **where}
            case "mlflow":
                return {"experiment_name": "perdure", "run_name": self.out.name, "run_id": known}
        return {"run_name": "perdure"}

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """A task begins: its curve goes on where the last one ended, or where it began before it was stopped."""
        if not self.trackers:
            self._start()
        offsets = self.content["offsets"]
        self.offset = offsets.setdefault(str(task.index), self.offset + self.steps)
        self.steps = steps
        checkpoint.write_json(self.out / TRACKING, msgspec.to_builtins(self.content))
        self.inner.task(task, tasks, epochs, steps)

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """A step ended."""
        if step == self.steps or step % max(1, self.steps // _POINTS) == 0:
            self._log({"loss": loss.item()}, self.offset + step)
        self.inner.step(step, loss, images)

    def scores(self, task: Task, rows: list[Row]) -> None:
        """A task was learnt and evaluated."""
        values = {_title(row): row.value for row in rows if row.after == task.index}
        average = metrics.average_after(rows, task.index)
        self._log(values | {"average accuracy": math.nan if average is None else average}, self.offset + self.steps)
        self.inner.scores(task, rows)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.inner.note(text)

    def encoded(self, examples: int) -> None:
        """See `Progress.encoded`."""
        self.inner.encoded(examples)

    def picture(self) -> None:
        """The matrix of scores, as a picture."""
        if not self.trackers:  # nothing was left to learn
            return
        run = RunResults.read(self.out)
        drawing = figures.matrix("score matrix", run.matrix(), run.names())
        picture = drawing.pixels()
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"matrix": picture[None]}, self.offset + self.steps, dataformats="NHWC")
            elif tracker.name == "mlflow":
                tracker.log_figure(drawing.figure, "matrix.png")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"matrix": [picture]}, self.offset + self.steps)

    def finish(self) -> None:
        """Close the trackers' runs."""
        from accelerate.state import PartialState

        for tracker in self.trackers:
            tracker.finish()
        if self.resets:
            PartialState._reset_state()

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _title(row: Row) -> str:
    return row.metric if row.on is None else f"{row.metric}/task {row.on + 1}"
