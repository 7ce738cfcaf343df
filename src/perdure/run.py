"""A run in a folder: build what the configuration names, learn task after task, evaluate, write everything down."""

import json
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from perdure import checkpoint, drift, taught
from perdure.augment import AUGMENTS
from perdure.config import RunConfig, make_backbone, make_method, make_objective
from perdure.evaluation import Evaluation
from perdure.foresight import foresee
from perdure.learner import Core
from perdure.places import Move, moved
from perdure.retention import Retention
from perdure.runtime import Runtime, resolve
from perdure.streams import build_stream
from perdure.summary import facts_of, summarise
from perdure.train import Diverged, Progress, Quiet, TrainConfig, check_finite, fit_task
from perdure.types import Row, Stream
from perdure.version import __version__

C = TypeVar("C", bound=Core)


class Interrupted(Exception):
    """The user asked to stop; everything done so far is saved."""


def run(
    config: RunConfig, out: Path, progress: Progress | None = None, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Learn a stream in a new folder; returns the summary.

    Args:
        config: what to do.
        out: the run's folder; it must not hold a run yet.
        progress: who is told.
        runtime: how to compute, when that has been resolved already (in a grid, once for all).

    Raises:
        ValueError: for anything in `config` that cannot be done, before anything is learnt.
        Interrupted: after SIGINT or SIGTERM.
    """
    with checkpoint.locked(out):
        if (out / "run.json").exists():
            raise ValueError(f"{out} already holds a run: go on with 'perdure resume {out}', or give another --out")
        learner, stream, runtime = _build(config, runtime)
        foresee(config, learner.backbone, stream)
        held_out = Retention(config.retain, learner)
        write_record(out, record(config, learner, stream, runtime, held_out))
        with nothing_learnt_nothing_left(out):
            return learn_stream(config, learner, stream, out, progress or Quiet(), config.save_every, held_out=held_out)


@contextmanager
def nothing_learnt_nothing_left(out: Path) -> Iterator[None]:
    """A request that turns out to be impossible before anything was learnt leaves the folder to a better one."""
    try:
        yield
    except ValueError:
        if not any(out.glob("task-*/*/")) and not checkpoint.whole(out):
            for task in out.glob("task-*"):
                shutil.rmtree(task)
            for name in ("run.json", "results.jsonl", "examples.json"):
                (out / name).unlink(missing_ok=True)
        raise


def resume(out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Go on where a run's folder stands; a finished run only gets its summary again.

    Raises:
        ValueError: when `out` is no run's folder, or something in it is damaged.
        Interrupted: after SIGINT or SIGTERM.
    """
    written = read_record(out)
    with checkpoint.locked(out):
        config = recorded_config(written)
        if not config.stream:
            raise ValueError(f"{out} is taught from folders: go on with 'perdure learn FOLDER --into {out}'")
        learner, stream, _ = _build(config, Runtime(**written["resolved"]))
        _check_unchanged(out, "data", written["stream"], _facts_of_stream(stream))
        held_out = Retention(config.retain, learner)
        if "held_out" in written:
            _check_unchanged(out, "held-out data", written["held_out"], _facts_of_held_out(held_out))
        return learn_stream(config, learner, stream, out, progress or Quiet(), config.save_every, held_out=held_out)


def read_record(out: Path) -> dict[str, Any]:
    """run.json of a folder.

    Raises:
        ValueError: when there is none, or it cannot be read.
    """
    path = out / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{out} is not a run's or a learner's folder: it has no run.json; give one that 'perdure run' or 'perdure "
            "learn' wrote"
        )
    try:
        written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        written["config"], written["resolved"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it cannot be read as a run's record; restore it") from error
    return written


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of a finished run.

    Raises:
        ValueError: when the run is not finished, or the file cannot be read.
    """
    read_record(out)
    path = out / "summary.json"
    if not path.is_file():
        raise ValueError(f"{out} is not finished: it has no summary.json. Go on with 'perdure resume {out}'")
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        dict(summary)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, 'perdure resume {out}' writes it anew") from error
    return summary


# Where the data lies and what it is called there, what else lies there, and what was said of it. Which images there are
# is told by their number and the digests of the split.
_BESIDE_THE_DATA = ("name", "data", "skipped", "left_out", "other_files", "remarks")


def _check_unchanged(out: Path, what: str, written: dict[str, Any], facts: dict[str, Any]) -> None:
    now = json.loads(json.dumps(facts))
    if changed := [key for key in now if key not in _BESIDE_THE_DATA and now[key] != written.get(key)]:
        raise ValueError(
            f"the {what} of {out} has changed since the run began ({', '.join(changed)}): restore it, or start anew in "
            "another folder"
        )


def recorded_config(written: dict[str, Any]) -> RunConfig:
    """The configuration in a run's record; fields of other versions are left out."""
    known = {f.name for f in fields(RunConfig)}
    moves = recorded_moves(written)

    def there(value: Any) -> Any:
        if isinstance(value, list):
            return [there(each) for each in value]
        return moved(value, moves) if moves and isinstance(value, str) else value

    return RunConfig(**{k: there(v) for k, v in written["config"].items() if k in known})


def recorded_moves(written: dict[str, Any]) -> list[Move]:
    """What `perdure move` wrote into a run's record."""
    return [(str(old), str(new)) for old, new in written.get("moved", ())]


def write_record(out: Path, content: dict[str, Any]) -> None:
    """Write run.json, the only place where it is: a new one, or one that paths were put right in."""
    checkpoint.write_json(out / "run.json", content)


def build_learner(kind: type[C], config: RunConfig, runtime: Runtime | None = None) -> tuple[C, Runtime]:
    """What `config` names, put together and made ready to compute; its stream is not built.

    Args:
        kind: class of the learner.
        config: of the run.
        runtime: how to compute; None resolves what `config` leaves open.
    """
    method, objective = make_method(config.method), make_objective(config.objective)
    backbone = make_backbone(config.backbone)
    if runtime is None:
        runtime = resolve(backbone, config.precision, config.attention, config.batch_size, config.device)
    runtime.apply(backbone)
    learner = kind(backbone, objective, method, seed=config.seed)
    learner.precision, learner.augment = runtime.dtype, AUGMENTS[config.augment]
    return learner, runtime


def _build(config: RunConfig, runtime: Runtime | None) -> tuple[Core, Stream, Runtime]:
    learner, runtime = build_learner(Core, config, runtime)
    stream = build_stream(config.stream, learner.backbone.preprocess, config.seed)
    captioned = "captions" in stream.notes
    if captioned and learner.objective.classifies:
        raise ValueError(
            f"{config.stream} has captions, which {config.objective} does not read: use --objective retrieve"
        )
    if not captioned and not learner.objective.classifies:
        raise ValueError(
            f"{config.objective} learns captions, which {config.stream} has not: use captions(path=...), or another "
            "--objective"
        )
    learner.scenario = stream.scenario
    return learner, stream, runtime


def learn_stream(
    config: TrainConfig,
    learner: Core,
    stream: Stream,
    out: Path,
    progress: Progress,
    save_every: int = 0,
    extra: dict[str, Any] | None = None,
    held_out: Retention | None = None,
) -> dict[str, Any]:
    """Learn what `out` has not learnt yet of `stream`; returns the summary, which is also written.

    Args:
        config: how each task is trained.
        learner: fresh; it is brought to the folder's last state first.
        stream: all tasks, those already learnt too.
        out: the learner's folder, locked.
        progress: who is told.
        save_every: see `RunConfig`.
        extra: facts for the manifests of the tasks learnt now.
        held_out: data sets whose zero-shot accuracy is measured too.
    """
    done = checkpoint.whole(out)
    for each in done:
        checkpoint.drop_steps(each.folder)
    rows = [row for each in done for row in each.rows]
    # The manifests vouch for what was measured; a line without its task is of a killed process.
    checkpoint.drop_lines_after(out / "results.jsonl", [json.dumps(asdict(row)) for row in rows])
    learnt = done[-1].learnt if done else 0
    snapshot = checkpoint.latest_step(out, learnt) if learnt < len(stream) else None
    if latest := snapshot or (done[-1] if done else None):
        checkpoint.restore(learner, latest, stream.tasks)
    features = drift.Drift(done)
    evaluation = Evaluation(stream, held_out or Retention((), learner), out, progress.note)
    with _interruptible() as stopped:
        for task in stream.tasks[learnt:]:
            if stopped():
                raise Interrupted(f"stopped before task {task.index}; go on with 'perdure resume {out}'")
            resumed = None
            if snapshot is not None:
                before = snapshot.rows
                resumed = snapshot.step or 0, partial(checkpoint.restore_optimizer, snapshot, learner)
                snapshot = None
            else:
                before = evaluation.before(learner, task)
            saver = _Saver(save_every, out, learner, before, stopped)
            try:
                fitted = fit_task(learner, task, config, progress, saver, resumed)
            except Diverged as error:
                if not stream.name:
                    raise
                raise Diverged(
                    f"{error}: start anew in another folder with a lower --lr than {config.lr:g}; the tasks before "
                    f"can be used as they are in {out}"
                ) from error
            start = time.perf_counter()
            new = before + evaluation.after(learner, task) + features.measure(learner, task, stream)
            facts = facts_of(fitted, time.perf_counter() - start)
            beside = {**features.files(task), **taught.files(task)}
            checkpoint.save_task(out, learner, new, facts | (extra or {}), beside)
            with (out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in new)
            progress.scores(task, new)
    evaluation.end(learner)
    summary = summarise(out, stream)
    checkpoint.write_json(out / "summary.json", summary)
    return summary


class _Saver:
    """Snapshots within a task: every so many steps, or as often as costs at most a fiftieth of the time."""

    def __init__(self, every: int, out: Path, learner: Core, rows: list[Row], stopped: Callable[[], bool]) -> None:
        self.every, self.out, self.learner, self.rows, self.stopped = every, out, learner, rows, stopped
        self.saved, self.took = time.perf_counter(), 0.0

    def __call__(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        stopped, now = self.stopped(), time.perf_counter()
        due = step % self.every == 0 if self.every else now - self.saved > 50 * self.took
        if not (due or stopped):
            return
        check_finite(self.learner, self.learner.task)
        checkpoint.save_step(self.out, self.learner, step, optimizer, self.rows)
        self.saved = time.perf_counter()
        self.took = self.saved - now
        if stopped:
            raise Interrupted(
                f"stopped after step {step} of task {self.learner.task.index}, all is saved; "
                f"go on with 'perdure resume {self.out}'"
            )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM finish the step instead of breaking it; a second SIGINT breaks."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record(
    config: RunConfig, learner: Core, stream: Stream, runtime: Runtime, held_out: Retention | None = None
) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "perdure": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_commit(),
        "seed": config.seed,
        "config": config.describe(),
        "resolved": runtime.describe(),
        "backbone": {
            "spec": learner.backbone.spec,
            "fingerprint": learner.fingerprint,
            "preprocess": asdict(learner.backbone.preprocess),
        },
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "timm", "transformers")},
        "stream": _facts_of_stream(stream),
        "held_out": _facts_of_held_out(held_out) if held_out else {},
    }


def _facts_of_stream(stream: Stream) -> dict[str, Any]:
    tasks = [t.describe() | {"train": len(t.train), "test": len(t.test)} for t in stream]
    return {"name": stream.name, "scenario": stream.scenario, "tasks": tasks} | stream.notes


def _facts_of_held_out(held_out: Retention) -> dict[str, Any]:
    return {name: _facts_of_stream(stream) for name, stream in held_out.sets.items()}


def _git_commit() -> str | None:
    """The commit of the folder perdure is run in, when it is a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
