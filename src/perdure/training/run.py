"""A run in a folder: build what the configuration names, learn task after task, evaluate, write everything down."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from perdure.adapters.injection import detach
from perdure.backbones.base import Backbone
from perdure.backbones.language import Language
from perdure.core import checkpoint
from perdure.core.checkpoint import read_record
from perdure.core.feature_store import FeatureStore
from perdure.core.learner import Core
from perdure.core.manifests import check_single
from perdure.core.objective import asking
from perdure.core.processes import Processes
from perdure.evaluation import calibration, per_class
from perdure.evaluation.examples import EXAMPLES
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.held_out import HeldOut, held_out_of, remarks
from perdure.evaluation.schedule import Evaluation, check_effect
from perdure.formatting import command
from perdure.options.paths import refuse_same
from perdure.process import as_found, plain
from perdure.streams.augment import AUGMENTS, check_views
from perdure.training.config import (
    RunConfig,
    make_backbone,
    make_method,
    make_objective,
    make_stream,
    measured_between,
    said_of,
)
from perdure.training.early_stop import check_trains, shares_of, watching
from perdure.training.loop import Diverged, Progress, TrainConfig, check_shared_out, fit_task, told_by
from perdure.training.online import Along, check_borders
from perdure.training.record import (
    as_recorded,
    check_unchanged,
    elsewhere,
    facts_of_held_out,
    facts_of_stream,
    record_of,
    recorded_config,
    recorded_runtime,
    write_record,
)
from perdure.training.runtime import Runtime, joined, resolve, shard
from perdure.training.snapshots import Interrupted as Interrupted
from perdure.training.snapshots import Saver, check_there, interruptible
from perdure.training.summary import (
    drop_summary_beyond,
    facts_of,
    hashes_at_hand,
    scored_by,
    taught_files,
    unlike_scores,
    write_summary,
)
from perdure.types import Stream, Task

C = TypeVar("C", bound=Core)


@plain()
def run(
    config: RunConfig, out: str | Path, progress: Progress | None = None, runtime: Runtime | None = None
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
    out = Path(out)
    check_single(out)
    refuse_same(out, config.stream, *config.retain)
    with joined(config.device) as processes, _held(out, processes):
        if processes.first and (out / "run.json").exists():
            raise ValueError(f"{out} already holds a run: go on with {command('resume', out)}, or give another --out")
        progress = told_by(progress if processes.first else None)
        learner, stream, runtime = _build(config, runtime, processes)
        asked, config = config, config.settled()
        for line in said_of(asked):
            progress.note(line)
        dry_run(config, learner.backbone, stream)
        held_out = held_out_of(config.retain, learner)
        learner.objective.check_used([*stream, *chain.from_iterable(held_out.sets.values())])
        if unlike := unlike_scores(scored_by(config.describe(), [task.score for task in stream])):
            progress.note(f"no means over tasks are given: {unlike}")
        for remark in (*stream.notes.get("remarks", ()), *remarks(held_out, stream)):
            progress.note(remark)
        for line in unread_names(learner, stream):
            progress.note(line)
        if processes.first:
            write_record(out, record_of(asked, learner, stream, runtime, held_out))
        processes.wait()
        if config.shard != "none":
            shard(learner)
        most = measured_between(config.evaluate)
        nothing_left = nothing_learnt_nothing_left(out) if processes.first else nullcontext()
        with nothing_left, as_found(runtime.threads):
            return learn_stream(config, learner, stream, out, progress, config.save_every, held_out=held_out, most=most)


def unread_names(learner: Core, tasks: Iterable[Task]) -> list[str]:
    """A line for each script that names of classes are written in and the text encoder that is to read them cannot."""
    if {"classes"} != set(learner.objective.asks) or "text" not in learner.objective.towers:
        return []
    return learner.backbone.unread([name for task in tasks for name in task.names])


def dry_run(config: RunConfig, backbone: Backbone, stream: Stream) -> None:
    """Grow for all tasks of `stream` as training would, by their descriptions alone.

    Args:
        config: of the run.
        backbone: as it was pre-trained, and so it is left.
        stream: its images are not read.

    Raises:
        ValueError: for what a task of `stream` would be refused with when its turn comes.
    """
    objective, method = make_objective(config.objective, config.method), make_method(config.method)
    check_effect(measured_between(config.evaluate), stream, objective)
    check_views(config.augment, objective.asks)
    learner = Core(backbone, objective, method, stream.scenario, config.seed_of("start"))
    learner.sharded = config.shard != "none"
    learner.online, learner.compiles = config.online, config.compile
    try:
        for task in stream:
            described = Task.described(task.describe())
            learner.grow(described)
            learner.method.check(learner, described)
        check_shared_out(learner, config)
        check_trains(learner, config)
        idle = {f"accumulate={config.accumulate}": config.accumulate > 1, "--compile": config.compile}
        for option, given in idle.items():
            if given and learner.constant_encoder:
                raise ValueError(f"{option} has no effect where no part trains the encoder: leave it out")
    finally:
        detach(backbone)
        backbone.requires_grad_(False)


@contextmanager
def _held(out: Path, processes: Processes) -> Iterator[None]:
    """Within, `out` belongs to this process, or to the one that writes for this one."""
    with checkpoint.locked(out) if processes.first else nullcontext():
        processes.wait()
        yield


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
def resume(out: str | Path, progress: Progress | None = None, device: str | None = None) -> dict[str, Any]:
    """Go on where a run's folder stands; a finished run only gets its results and its summary again.

    Args:
        out: the run's folder.
        progress: who is told.
        device: to compute on; None is the one that the run began on. Another one rounds differently.

    Raises:
        ValueError: when `out` is no run's folder, or something in it is damaged.
        Interrupted: after SIGINT or SIGTERM.
    """
    out = Path(out)
    written = read_record(out)
    with joined(device or written["resolved"]["device"]) as processes, _held(out, processes):
        progress = told_by(progress if processes.first else None)
        checkpoint.whole(out)  # before the model is read, which may take longer
        config, runtime = recorded_config(out, written), recorded_runtime(out, written, device, processes.world)
        if not config.stream:
            raise ValueError(f"{out} is taught from folders: go on with {command('learn', 'FOLDER', '--into', out)}")
        extra = elsewhere(out, runtime, progress)
        learner, stream, _ = _build(config, runtime, processes)
        stream = as_recorded(stream, written["stream"])
        check_unchanged(out, "data", written["stream"], facts_of_stream(stream))
        held_out = held_out_of(config.retain, learner)
        if "held_out" in written:
            for name, facts in written["held_out"].items():
                if name in held_out.sets:
                    held_out.sets[name] = as_recorded(held_out.sets[name], facts)
            check_unchanged(out, "held-out data", written["held_out"], facts_of_held_out(held_out))
        if config.shard != "none":
            shard(learner)
        with as_found(runtime.threads):
            most = measured_between(config.evaluate)
            return learn_stream(config, learner, stream, out, progress, config.save_every, extra, held_out, most)


def build_learner(
    kind: type[C], config: RunConfig, runtime: Runtime | None = None, processes: Processes | None = None
) -> tuple[C, Runtime]:
    """What `config` names, put together and made ready to compute; its stream is not built.

    Args:
        kind: class of the learner.
        config: of the run.
        runtime: how to compute; None resolves what `config` leaves open.
        processes: those that learn together; None is this one alone.
    """
    processes = processes or Processes()
    method, objective = make_method(config.method), make_objective(config.objective, config.method)
    if config.online:
        check_borders(method)
    backbone = make_backbone(config.backbone, config.method)
    if runtime is None:
        runtime = resolve(backbone, config.precision, config.attention, config.device, processes.world)
    runtime.apply(backbone)
    learner = kind(backbone, objective, method, seed=config.seed_of("start"))
    learner.precision, learner.augment, learner.calibrate = runtime.dtype, AUGMENTS[config.augment], config.calibrate
    learner.processes = processes
    if config.shard != "none" and processes.world == 1:
        raise ValueError(f"shard={config.shard!r} has no effect in one process: give --processes, or leave it out")
    if config.cache and processes.world > 1:
        raise ValueError(f"--cache {config.cache} is for runs in one process: leave it out, or --processes")
    if config.cache:
        facts = json.dumps(runtime.describe(), sort_keys=True) + torch.__version__
        learner.store = FeatureStore(Path(config.cache), int(config.cache_bytes), facts)
    learner.online = config.online
    if config.compile:
        check_compile(config, learner)
        learner.compiles = True
    check_shared_out(learner, config)
    return learner, runtime


def check_compile(config: RunConfig, learner: Core) -> None:
    """Refuse `--compile` where it cannot be.

    Raises:
        ValueError: with the reason and the remedy.
    """
    if isinstance(learner.backbone, Language):
        raise ValueError("--compile is for vision encoders: texts are of another length in every step. Leave it out")
    if config.shard != "none":
        raise ValueError(f"--compile and shard={config.shard!r}: blocks held in parts are not compiled; leave one out")
    learner.backbone.blocks()  # or it says what it has


def _build(config: RunConfig, runtime: Runtime | None, processes: Processes) -> tuple[Core, Stream, Runtime]:
    learner, runtime = build_learner(Core, config, runtime, processes)
    objective = learner.objective
    stream = make_stream(config, learner.backbone.preprocess)
    check_gives(stream, learner, config.stream, f", or use --objective {asking(stream.gives)}")
    learner.scenario = stream.scenario
    return learner, replace(stream, tasks=tuple(map(objective.planned, stream))), runtime


def check_gives(stream: Stream, learner: Core, described: str, remedy: str = "") -> None:
    """Refuse a stream, `described` so, that has not what the objective asks for; `remedy` is what else to do."""
    if stream.gives not in (asks := learner.objective.asks):
        asked, name = " or ".join(asks), learner.objective.name
        raise ValueError(f"{name} learns {asked}, which {described} has not: give a stream of {asked}{remedy}")


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
    processes = learner.processes
    learnt = done[-1].learnt if done else 0
    if processes.first:
        checkpoint.drop_left(out, done)
        # The manifests vouch for what was measured; a line without its task is of a killed process.
        if checkpoint.write_results(out, done) and done:
            progress.note(f"{out / 'results.jsonl'} was not what the manifests say: it was written anew from them")
        drop_summary_beyond(out, learnt)
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
                raise Interrupted(f"stopped before task {task.number}; go on with {command('resume', out)}")
            resumed, start = None, time.perf_counter()
            if snapshot is not None:
                before = snapshot.rows
                resumed = snapshot.step or 0, partial(checkpoint.restore_optimizer, snapshot, learner)
                snapshot = None
            else:
                before = evaluation.before(learner, task)
            measured = time.perf_counter() - start
            saver.begin(before, Along(learner, task, config.batch_size) if learner.online else None)
            early = watching(learner, watched.get(task.index), config, before)
            try:
                fitted = fit_task(learner, task, config, progress, saver, resumed, early, saver.pause)
            except Diverged as error:
                if not stream.name:
                    raise
                raise Diverged(
                    f"{error}: start anew in another folder with a lower --lr than {config.peak:g}; the tasks before "
                    f"can be used as they are in {out}"
                ) from error
            for remark in learner.objective.remarks():
                progress.note(remark)
            start = time.perf_counter()
            calibration.fit(learner, held.get(task.index))
            new = before + evaluation.after(learner, task, fitted.moved)
            facts = facts_of(fitted, measured + time.perf_counter() - start)
            check_there(out)
            if processes.first:
                beside = features.files(task) | taught_files(hashes_at_hand([task]), task.index)
                beside |= per_class.files(evaluation.answered)
                facts |= {"held_out_share": config.held_out} if config.held_out else {}
                checkpoint.save_task(out, learner, new, facts | (extra or {}), beside)
                with (out / "results.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(checkpoint.lines_of(new))
            progress.scores(task, new)
        evaluation.end(learner)
        if learner.store is not None and not learner.store.used:
            progress.note(
                f"--cache {learner.store.folder} had no effect: the method changes what looks at images, or --augment "
                "the images in every step"
            )
    found = [write_summary(out, progress.note)] if processes.first else []
    return found[0] if processes.world == 1 else dict(processes.gather_objects(found)[0])


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
    with TemporaryDirectory(prefix="perdure-", dir=kept if kept.is_absolute() and kept.is_dir() else None) as aside:
        for name in ("run.json", EXAMPLES):
            if (out / name).exists():
                shutil.copy(out / name, aside)
        processes.wait()
        yield Path(aside)
