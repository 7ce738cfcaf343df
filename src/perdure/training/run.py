"""A run in a folder: build what the configuration names, learn task after task, evaluate, write everything down."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from perdure.core import checkpoint
from perdure.core.checkpoint import read_record
from perdure.core.manifests import check_single
from perdure.core.processes import Processes
from perdure.evaluation.held_out import held_out_of, remarks
from perdure.formatting import command
from perdure.options.paths import refuse_same
from perdure.process import as_found, plain
from perdure.training.building import build_run, dry_run, unread_names
from perdure.training.config import RunConfig, measured_between, said_of
from perdure.training.loop import Progress, told_by
from perdure.training.record import (
    as_recorded,
    check_method,
    check_unchanged,
    elsewhere,
    facts_of_held_out,
    facts_of_stream,
    record_of,
    recorded_config,
    recorded_runtime,
    write_record,
)
from perdure.training.runtime import Runtime, joined, shard
from perdure.training.summary import scored_by, unlike_scores
from perdure.training.tasks import learn_stream


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
        learner, stream, runtime = build_run(config, runtime, processes)
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
        check_method(out, config)
        extra = elsewhere(out, runtime, progress)
        learner, stream, _ = build_run(config, runtime, processes)
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
