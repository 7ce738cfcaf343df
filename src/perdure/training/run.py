"""A run in a folder: build what the configuration names, learn task after task, evaluate, write everything down."""

import json
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from perdure.core import checkpoint
from perdure.core.checkpoint import read_record as read_record
from perdure.core.learner import Core
from perdure.core.objective import asking
from perdure.evaluation import calibration
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.schedule import Evaluation
from perdure.evaluation.zero_shot_retention import Retention
from perdure.options.paths import Move, moved
from perdure.process import as_found, plain
from perdure.storage import schema
from perdure.storage.schema import Damaged, Moves, Record, Summary
from perdure.streams import build_stream
from perdure.streams.augment import AUGMENTS
from perdure.training import taught_images as taught
from perdure.training.config import RunConfig, former_parts, make_backbone, make_method, make_objective
from perdure.training.dry_run import foresee
from perdure.training.loop import Diverged, Progress, Quiet, TrainConfig, check_finite, fit_task
from perdure.training.runtime import Runtime, check_device, resolve
from perdure.training.summary import FILE, drop_summary_beyond, facts_of, write_summary
from perdure.types import Row, Stream
from perdure.version import __version__

_MOVED = "moved.json"
C = TypeVar("C", bound=Core)


class Interrupted(Exception):
    """The user asked to stop; everything done so far is saved."""


@plain()
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
    progress = progress or Quiet()
    with checkpoint.locked(out):
        if (out / "run.json").exists():
            raise ValueError(f"{out} already holds a run: go on with 'perdure resume {out}', or give another --out")
        if old := former_parts(config):
            progress.note(old)
        learner, stream, runtime = _build(config, runtime)
        foresee(config, learner.backbone, stream)
        held_out = Retention(config.retain, learner)
        write_record(out, record(config, learner, stream, runtime, held_out))
        with nothing_learnt_nothing_left(out), as_found(runtime.threads):
            return learn_stream(config, learner, stream, out, progress, config.save_every, held_out=held_out)


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


@plain()
def resume(out: Path, progress: Progress | None = None, device: str | None = None) -> dict[str, Any]:
    """Go on where a run's folder stands; a finished run only gets its results and its summary again.

    Args:
        out: the run's folder.
        progress: who is told.
        device: to compute on; None is the one that the run began on. Another one rounds differently.

    Raises:
        ValueError: when `out` is no run's folder, or something in it is damaged.
        Interrupted: after SIGINT or SIGTERM.
    """
    progress = progress or Quiet()
    written = read_record(out)
    with checkpoint.locked(out):
        checkpoint.whole(out)  # before the model is read, which may take longer
        config, runtime = recorded_config(out, written), recorded_runtime(out, written, device)
        if not config.stream:
            raise ValueError(f"{out} is taught from folders: go on with 'perdure learn FOLDER --into {out}'")
        extra = elsewhere(out, runtime, progress)
        learner, stream, _ = _build(config, runtime)
        _check_unchanged(out, "data", written["stream"], _facts_of_stream(stream))
        held_out = Retention(config.retain, learner)
        if "held_out" in written:
            _check_unchanged(out, "held-out data", written["held_out"], _facts_of_held_out(held_out))
        with as_found(runtime.threads):
            return learn_stream(config, learner, stream, out, progress, config.save_every, extra, held_out)


def read_summary(out: Path) -> Summary:
    """summary.json of a finished run.

    Raises:
        ValueError: when the run is not finished, or the file is not what was written.
    """
    dated = "format" in read_record(out)
    path = out / FILE
    if not path.is_file():
        raise ValueError(f"{out} is not finished: it has no summary.json. Go on with 'perdure resume {out}'")
    return schema.read(path, Summary, f"remove it, 'perdure resume {out}' writes it anew", dated)


# Where the data lies and what it is called there, what else lies there, and what was said of it. Which images there are
# is told by their number and the digests of the split.
_BESIDE_THE_DATA = ("name", "data", "skipped", "left_out", "other_files", "remarks")


def _check_unchanged(out: Path, what: str, written: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(facts))
    if changed := [key for key in now if key not in _BESIDE_THE_DATA and now[key] != written.get(key)]:
        raise ValueError(
            f"the {what} of {out} has changed since the run began ({', '.join(changed)}): restore it, or start anew in "
            "another folder"
        )


def recorded_config(out: Path, written: Record) -> RunConfig:
    """The configuration in the record of the run in `out`; fields of other versions are left out.

    Raises:
        Damaged: when a value is not what a run writes.
    """
    moves = recorded_moves(out)

    def there(value: Any) -> Any:
        if isinstance(value, list):
            return [there(each) for each in value]
        return moved(value, moves) if moves and isinstance(value, str) else value

    try:
        return msgspec.convert({k: there(v) for k, v in written["config"].items()}, RunConfig)
    except ValueError as error:
        raise Damaged(f"{out / 'run.json'} is damaged: {schema.said(error, 'config')}; restore it") from error


def recorded_moves(out: Path) -> list[Move]:
    """What `perdure move` wrote: `run.json`, which every manifest vouches for, stays as it is."""
    path = out / _MOVED
    if not path.is_file():
        return []
    found = schema.read(path, Moves, "restore it, or remove it and move again", must_be_sealed=True)["moved"]
    return [(str(old), str(new)) for old, new in found]


def write_moves(out: Path, moves: Sequence[Move]) -> None:
    """Write what moved, the first move first."""
    checkpoint.write_sealed(out / _MOVED, {"moved": list(map(list, moves))})


def write_record(out: Path, content: dict[str, Any]) -> None:
    """Write run.json, with its seal."""
    checkpoint.write_sealed(out / "run.json", content)


def recorded_runtime(out: Path, written: Record, device: str | None = None) -> Runtime:
    """How the run in `out` computes.

    Raises:
        ValueError: when its device, or the `device` that is wanted instead, is not there.
    """
    runtime = Runtime(**written["resolved"])
    if device not in (None, "auto"):
        check_device(device, f"--device {device}", "give another one, such as cpu")
        return replace(runtime, device=device)
    check_device(runtime.device, f"{out / 'run.json'}: device {runtime.device!r}", "give --device cpu, or another one")
    return runtime


def elsewhere(out: Path, runtime: Runtime, progress: Progress) -> dict[str, Any]:
    """What manifests say of a device on which the run in `out` did not begin; the user is told what it means."""
    if runtime.device == (began := read_record(out)["resolved"]["device"]):
        return {}
    progress.note(
        f"on {runtime.device} instead of {began} numbers are rounded differently: the result is not to the bit what it "
        "would have been"
    )
    return {"device": runtime.device}


def build_learner(kind: type[C], config: RunConfig, runtime: Runtime | None = None) -> tuple[C, Runtime]:
    """What `config` names, put together and made ready to compute; its stream is not built.

    Args:
        kind: class of the learner.
        config: of the run.
        runtime: how to compute; None resolves what `config` leaves open.
    """
    method, objective = make_method(config.method), make_objective(config.objective, config.method)
    backbone = make_backbone(config.backbone, config.method)
    if runtime is None:
        runtime = resolve(backbone, config.precision, config.attention, config.device)
    runtime.apply(backbone)
    learner = kind(backbone, objective, method, seed=config.seed)
    learner.precision, learner.augment, learner.calibrate = runtime.dtype, AUGMENTS[config.augment], config.calibrate
    return learner, runtime


def _build(config: RunConfig, runtime: Runtime | None) -> tuple[Core, Stream, Runtime]:
    learner, runtime = build_learner(Core, config, runtime)
    stream = build_stream(config.stream, learner.backbone.preprocess, config.seed)
    if stream.gives not in (asks := learner.objective.asks):
        asked = " or ".join(asks)
        raise ValueError(
            f"{config.objective} learns {asked}, which {config.stream} has not: give a stream of {asked}, or use "
            f"--objective {asking(stream.gives)}"
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
    stream, held = calibration.apart(learner, stream)
    done = checkpoint.whole(out)
    for each in done:
        checkpoint.drop_steps(each.folder)
    # The manifests vouch for what was measured; a line without its task is of a killed process.
    if checkpoint.write_results(out, done) and done:
        progress.note(f"{out / 'results.jsonl'} was not what the manifests say: it was written anew from them")
    learnt = done[-1].learnt if done else 0
    drop_summary_beyond(out, learnt)
    snapshot = checkpoint.latest_step(out, done) if learnt < len(stream) else None
    if latest := snapshot or (done[-1] if done else None):
        checkpoint.restore(learner, latest, stream.tasks)
    features = Drift(done)
    evaluation = Evaluation(stream, held_out or Retention((), learner), features, out, progress.note)
    with _interruptible() as stopped:
        saver = _Saver(save_every, out, learner, stopped)
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
            saver.begin(before)
            try:
                fitted = fit_task(learner, task, config, progress, saver, resumed)
            except Diverged as error:
                if not stream.name:
                    raise
                raise Diverged(
                    f"{error}: start anew in another folder with a lower --lr than {config.lr:g}; the tasks before "
                    f"can be used as they are in {out}"
                ) from error
            for remark in learner.objective.remarks():
                progress.note(remark)
            start = time.perf_counter()
            calibration.fit(learner, held.get(task.index))
            new = before + evaluation.after(learner, task, fitted.moved)
            facts = facts_of(fitted, time.perf_counter() - start)
            check_there(out)
            beside = {**features.files(task), **taught.files(task)}
            checkpoint.save_task(out, learner, new, facts | (extra or {}), beside)
            with (out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(checkpoint.lines_of(new))
            progress.scores(task, new)
    evaluation.end(learner)
    return write_summary(out, progress.note)


def check_there(out: Path) -> None:
    """Refuse to go on with a run whose folder is gone.

    Raises:
        ValueError: when it is.
    """
    if not (out / "run.json").exists():
        raise ValueError(
            f"{out} is gone or has lost its run.json, and with it what was learnt: start anew, in a folder that stays"
        )


class _Saver:
    """Snapshots within a task: every so many steps, or as often as costs at most a fiftieth of the time.

    What a snapshot costs is known from the last one, also of the task before; the first is taken for a tenth of a
    second. So tasks of a few steps, which are saved when they end, do without.
    """

    def __init__(self, every: int, out: Path, learner: Core, stopped: Callable[[], bool]) -> None:
        self.every, self.out, self.learner, self.stopped = every, out, learner, stopped
        self.took = 0.1

    def begin(self, rows: list[Row]) -> None:
        """A task begins, before which `rows` were measured."""
        self.rows, self.saved = rows, time.perf_counter()

    def __call__(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        check_there(self.out)  # rather than train to the end for nothing
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
        "format": schema.FORMAT,
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
