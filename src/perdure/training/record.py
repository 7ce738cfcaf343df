"""What is recorded of a run when it begins, and how it is read back: run.json, with moved.json and resized.json."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from perdure.core import checkpoint
from perdure.core.checkpoint import read_record
from perdure.core.learner import Core
from perdure.core.manifests import MOVED, RESIZED, recorded_moves, recorded_size, refuse_team
from perdure.core.method import METHODS
from perdure.evaluation.held_out import HeldOut
from perdure.options.paths import Relocation, moved
from perdure.options.spec import changed, parse
from perdure.storage import schema
from perdure.storage.schema import Damaged, RunRecord
from perdure.training.config import FORMER, RunConfig, register
from perdure.training.loop import Progress
from perdure.training.runtime import Runtime, check_device
from perdure.types import Stream
from perdure.version import __version__


def record_of(
    config: RunConfig, learner: Core, stream: Stream, runtime: Runtime, held_out: HeldOut | None = None
) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "format": schema.FORMAT,
        "perdure": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_commit(),
        "seed": config.seed,
        "config": config.describe(),
        **({"lr": config.recommended()} if config.lr is None else {}),
        "resolved": runtime.describe(),
        "backbone": {
            "spec": learner.backbone.spec,
            "fingerprint": learner.fingerprint,
            "preprocess": asdict(learner.backbone.preprocess),
        },
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "timm", "transformers")},
        "stream": facts_of_stream(stream),
        "held_out": facts_of_held_out(held_out) if held_out else {},
    }


def facts_of_stream(stream: Stream) -> dict[str, Any]:
    """What is recorded of a stream: its tasks, and its notes."""
    tasks = [t.describe() | {"train": len(t.train), "test": len(t.test)} for t in stream]
    return {"name": stream.name, "scenario": stream.scenario, "tasks": tasks} | stream.notes


def as_recorded(stream: Stream, written: Mapping[str, Any]) -> Stream:
    """`stream` with the scores that its tasks had when the run began; another version may choose others."""
    scores = [task.get("score", "") for task in written.get("tasks", ())]
    if len(scores) != len(stream):  # it has changed, and is refused for that
        return stream
    tasks = tuple(replace(task, score=score) for task, score in zip(stream, scores, strict=True))
    return replace(stream, tasks=tasks)


def facts_of_held_out(held_out: HeldOut) -> dict[str, Any]:
    """The same of each held-out stream, by name."""
    return {name: facts_of_stream(stream) for name, stream in held_out.sets.items()}


def write_record(out: Path, content: dict[str, Any]) -> None:
    """Write run.json, with its seal.

    Raises:
        ValueError: when specialists lie in `out`.
    """
    refuse_team(out)
    checkpoint.write_sealed(out / "run.json", content)


def recorded_config(out: Path, written: RunRecord) -> RunConfig:
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
        config = msgspec.convert({k: there(v) for k, v in written["config"].items()}, RunConfig)
    except ValueError as error:
        raise Damaged(f"{out / 'run.json'} is damaged: {schema.said(error, 'config')}; restore it") from error
    if config.lr is None:
        config = replace(config, lr=written.get("lr"))
    resized = recorded_size(out)
    return replace(config, backbone=changed(config.backbone, **resized)) if resized else config


def check_method(out: Path, config: RunConfig) -> None:
    """Refuse what was learnt with a method that is not known here, which a nearest name would only hide.

    Raises:
        ValueError: when a part of the method is in no file that was imported.
    """
    register()
    if unknown := [part.name for part in parse(config.method) if part.name not in METHODS and part.name not in FORMER]:
        raise ValueError(
            f"{out} was learnt with {unknown[0]!r}, which is no method of perdure {__version__}: bring the file of a "
            "method of your own with --import FILE.py, or import it in Python"
        )


def recorded_runtime(out: Path, written: RunRecord, device: str | None = None, processes: int = 1) -> Runtime:
    """How the run in `out` computes, now in so many `processes`.

    Raises:
        ValueError: when its device, or the `device` that is wanted instead, is not there.
    """
    runtime = replace(Runtime(**written["resolved"]), processes=processes)
    if device not in (None, "auto"):
        check_device(device, f"--device {device}", "give another one, such as cpu")
        return replace(runtime, device=device)
    check_device(runtime.device, f"{out / 'run.json'}: device {runtime.device!r}", "give --device cpu, or another one")
    return runtime


def elsewhere(out: Path, runtime: Runtime, progress: Progress) -> dict[str, Any]:
    """What manifests say of a device, or a number of processes, with which the run in `out` did not begin.

    The user is told what it means.
    """
    began, found = read_record(out)["resolved"], {}
    for name, here, then in (
        ("device", runtime.device, began["device"]),
        ("processes", runtime.processes, began.get("processes", 1)),
    ):
        if here != then:
            found[name] = here
            said = f"on {here} instead of {then}" if name == "device" else f"with {name}={here} instead of {then}"
            progress.note(
                f"{said} numbers are rounded differently: the result is not to the bit what it would have been"
            )
    return found


def write_size(out: Path, options: Mapping[str, Any]) -> None:
    """Write what the backbone reads from now on."""
    checkpoint.write_sealed(out / RESIZED, {"backbone": dict(options)})


def write_moves(out: Path, moves: Sequence[Relocation]) -> None:
    """Write what moved, the first move first."""
    checkpoint.write_sealed(out / MOVED, {"moved": list(map(list, moves))})


# Where the data lies and what it is called there, what else lies there, and what was said of it. Which images there are
# is told by their number and the digests of the split.
_BESIDE_THE_DATA = ("name", "data", "skipped", "left_out", "other_files", "remarks")


def check_unchanged(out: Path, what: str, written: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to go on where `facts` of the data are not those that were written when the run in `out` began."""
    now = _without_remarks(json.loads(json.dumps(facts)))
    then = _without_remarks(written)
    if changed := [key for key in now if key not in _BESIDE_THE_DATA and now[key] != then.get(key)]:
        raise ValueError(
            f"the {what} of {out} has changed since the run began ({', '.join(changed)}): restore it, or start anew in "
            "another folder"
        )


def _without_remarks(facts: Any) -> Any:
    """Facts without what was said of data in them, as of each held-out set; versions differ in it."""
    if isinstance(facts, Mapping):
        return {name: _without_remarks(each) for name, each in facts.items() if name != "remarks"}
    return list(map(_without_remarks, facts)) if isinstance(facts, list) else facts


def _git_commit() -> str | None:
    """The commit of the folder perdure is run in, when it is a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
