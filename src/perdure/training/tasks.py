"""A stream learnt task after task, in a folder: each is evaluated and written down before the next begins."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint
from perdure.core.learner import Core
from perdure.core.processes import Processes
from perdure.evaluation import calibration, per_class
from perdure.evaluation.examples import EXAMPLES
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.held_out import HeldOut, held_out_of
from perdure.evaluation.schedule import Evaluation
from perdure.storage.files import temporary_folder
from perdure.training.early_stop import shares_of, watching
from perdure.training.loop import Diverged, Progress, TrainConfig, fit_task
from perdure.training.online import Along
from perdure.training.snapshots import Saver, check_there, interrupted, interruptible
from perdure.training.summary import drop_summary_beyond, facts_of, hashes_at_hand, taught_files, write_summary
from perdure.types import Row, Stream


def learn_stream(
    config: TrainConfig,
    learner: Core,
    stream: Stream,
    out: Path,
    progress: Progress,
    save_every: int = 0,
    extra: dict[str, Any] | None = None,
    held_out: HeldOut | None = None,
    most: int | None = None,
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
        held_out: what is measured too, and never taught.
        most: see `Evaluation`.
    """
    done = checkpoint.whole(out)
    shares = shares_of(done, config.held_out, len(stream))
    stream, watched = calibration.apart(learner, stream, shares, "early_stop_share")
    stream, held = calibration.apart(learner, stream)
    processes, learnt = learner.processes, done[-1].learnt if done else 0
    if processes.first:
        _put_right(out, done, progress)
    processes.wait()
    snapshot = checkpoint.latest_step(out, done) if learnt < len(stream) else None
    if latest := snapshot or (done[-1] if done else None):
        checkpoint.restore(learner, latest, stream.tasks)
    features = Drift(done)
    with interruptible(processes) as stopped, _examples_of(out, processes) as shown:
        evaluation = Evaluation(stream, held_out or held_out_of((), learner), features, shown, progress.note, most)
        saver = Saver(save_every, out, learner, stopped)
        for task in stream.tasks[learnt:]:
            if stopped():
                raise interrupted(f"before task {task.number}", out, processes)
            start = time.perf_counter()
            before = snapshot.rows if snapshot else evaluation.before(learner, task)
            measured = time.perf_counter() - start
            saver.begin(before, Along(learner, task, config.batch_size) if learner.online else None)
            early = watching(learner, watched.get(task.index), config, before)
            resumed = (
                (snapshot.step or 0, partial(checkpoint.restore_optimizer, snapshot, learner)) if snapshot else None
            )
            snapshot = None
            with _remedy_of_divergence(config, stream, out):
                fitted = fit_task(learner, task, config, progress, saver, resumed, early, saver.pause)
            for remark in learner.objective.remarks():
                progress.note(remark)
            start = time.perf_counter()
            calibration.fit(learner, held.get(task.index))
            rows = before + evaluation.after(learner, task, fitted.moved)
            facts = facts_of(fitted, measured + time.perf_counter() - start)
            check_there(out)
            if processes.first:
                facts |= ({"held_out_share": config.held_out} if config.held_out else {}) | (extra or {})
                beside = features.files(task) | taught_files(hashes_at_hand([task]), task.index)
                _write_down(out, learner, rows, facts, beside | per_class.files(evaluation.answered))
            progress.scores(task, rows)
        evaluation.end(learner)
        if learner.store is not None and not learner.store.used:
            progress.note(
                f"--cache {learner.store.folder} had no effect: the method changes what looks at images, or --augment "
                "the images in every step"
            )
    found = [write_summary(out, progress.note)] if processes.first else []
    return found[0] if processes.world == 1 else dict(processes.gather_objects(found)[0])


def _put_right(out: Path, done: Sequence[Checkpoint], progress: Progress) -> None:
    """Bring what a killed process has left in `out` back to what the manifests of the tasks that are `done` vouch for.

    They vouch for what was measured, too: a line without its task is of a killed process.
    """
    checkpoint.drop_left(out, done)
    if checkpoint.write_results(out, done) and done:
        progress.note(f"{out / 'results.jsonl'} was not what the manifests say: it was written anew from them")
    drop_summary_beyond(out, done[-1].learnt if done else 0)


def _write_down(out: Path, learner: Core, rows: list[Row], facts: dict[str, Any], beside: dict[str, Any]) -> None:
    """A task is learnt once this has returned."""
    checkpoint.save_task(out, learner, rows, facts, beside)
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(checkpoint.lines_of(rows))


@contextmanager
def _remedy_of_divergence(config: TrainConfig, stream: Stream, out: Path) -> Iterator[None]:
    """A run whose loss is no number ends with what to do; who teaches from folders says it otherwise."""
    try:
        yield
    except Diverged as error:
        if not stream.name:
            raise
        raise Diverged(
            f"{error}: start anew in another folder with a lower --lr than {config.peak:g}; the tasks before can be "
            f"used as they are in {out}"
        ) from error


@contextmanager
def _examples_of(out: Path, processes: Processes) -> Iterator[Path]:
    """Where examples are noted: in `out` by the process that writes; the others, which compute them too, elsewhere.

    What one reads there the first may have written anew in the meantime.
    """
    if processes.first:
        processes.wait()
        yield out
        return
    kept = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent  # in a folder that goes with the launcher
    with temporary_folder(within=kept if kept.is_absolute() and kept.is_dir() else None) as aside:
        for name in ("run.json", EXAMPLES):
            if (out / name).exists():
                shutil.copy(out / name, aside)
        processes.wait()
        yield aside
