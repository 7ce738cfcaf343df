"""A learner's folder: one sub-folder per learnt task, whole or refused; and snapshots within a long task.

Tensors stand in safetensors files, the rest in manifests that are written last: what has a manifest is complete.
Every file is written beside its name, forced to disk and renamed; nothing is ever overwritten. Only what was learnt is
stored, never the frozen backbone, and nothing is ever unpickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perdure.core.learner import Core
from perdure.options.paths import pathless
from perdure.storage import schema
from perdure.storage.files import locked as locked
from perdure.storage.files import place, sync_folder
from perdure.storage.files import write_json as write_json
from perdure.storage.files import write_sealed as write_sealed
from perdure.storage.files import write_text as write_text
from perdure.storage.schema import FORMAT, Damaged, Manifest, Record
from perdure.types import Row, Task

_LEARNER, _OPTIMIZER, _MANIFEST = "learner.safetensors", "optimizer.safetensors", "manifest.json"
_RECORD, _SUMMARY, _RESULTS = "run.json", "summary.json", "results.jsonl"
DamagedCheckpoint = Damaged


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: after a task, or within one when `step` is set."""

    folder: Path
    manifest: Manifest
    before: tuple[Task, ...] = ()
    """Tasks of the checkpoints before it, which its own manifest need not repeat."""

    @property
    def learnt(self) -> int:
        """Number of tasks that are complete."""
        return self.manifest["learnt"]

    @property
    def seal(self) -> str:
        """What says which checkpoint it is, and of which run."""
        return self.manifest["seal"]

    @property
    def path(self) -> Path:
        """Of its manifest."""
        return self.folder / _MANIFEST

    @property
    def step(self) -> int | None:
        """Steps done of task number `learnt`, None at a task's end."""
        return self.manifest.get("step")

    @property
    def rows(self) -> list[Row]:
        """Measurements made after this task."""
        listed = self.manifest.get("rows", [])
        return [Row(row["after"], row["on"], row["metric"], row["value"]) for row in listed]

    @property
    def tasks(self) -> list[Task]:
        """Descriptions of the tasks that the learner has grown for."""
        own = [Task.described(dict(facts)) for facts in self.manifest["tasks"]]
        return [*self.before[: own[0].index if own else None], *own]


def save_task(
    folder: Path,
    learner: Core,
    rows: list[Row],
    facts: dict[str, Any],
    beside: Mapping[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Write the state after a task to `folder`/task-NNN; returns that folder.

    Args:
        folder: of the run or learner.
        learner: whose `learnt` counts the task.
        rows: measurements made after it.
        facts: anything else worth keeping (seconds, sources), as JSON; with `alone` set, the tasks before this one were
            never saved to `folder`.
        beside: name of a file -> tensors that belong to the task and are no part of the learner.
    """
    target = folder / f"task-{learner.learnt - 1:03d}"
    manifest = _describe(folder, learner, bool(facts.get("alone"))) | {"rows": [asdict(row) for row in rows]} | facts
    _write(target, manifest, {_LEARNER: learner.learnt_state()} | dict(beside or {}))
    drop_steps(target)
    return target


def save_step(folder: Path, learner: Core, step: int, optimizer: torch.optim.Optimizer | None, rows: list[Row]) -> Path:
    """Write the state within the current task, with the optimizer's, and remove the snapshot before it.

    `rows` are measurements made before the task's first step.
    """
    task = folder / f"task-{learner.learnt:03d}"
    target = task / f"step-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)  # a torn one of a killed process
    tensors = {_LEARNER: learner.learnt_state()}
    if optimizer is not None:
        names = {id(p): name for name, p in learner.trainable().items()}
        tensors[_OPTIMIZER] = {
            f"{names[id(p)]}/{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    _write(target, _describe(folder, learner) | {"step": step, "rows": [asdict(row) for row in rows]}, tensors)
    for old in task.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def drop_steps(task: Path) -> None:
    """Remove the snapshots within a task that is whole; a killed process may have left them."""
    for step in task.glob("step-*"):
        shutil.rmtree(step, ignore_errors=True)


def restore_optimizer(checkpoint: Checkpoint, learner: Core, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of a snapshot's optimizer back."""
    tensors = _read(checkpoint, _OPTIMIZER)
    params = learner.trainable()
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        # the count of fused Adam stays where its parameter is
        optimizer.state[params[name]][entry] = value.to(params[name].device)


def beside(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Tensors that `save_task` put beside the learner; none when there is no such file.

    Raises:
        DamagedCheckpoint: when the file is cut, changed or missing.
    """
    return _read(checkpoint, name) if name in checkpoint.manifest["sha256"] else {}


def whole(folder: Path) -> list[Checkpoint]:
    """Checkpoints after a task, in order, each of the run of `folder` and the successor of the one before.

    Raises:
        DamagedCheckpoint: when a manifest cannot be read, is another run's, or a task is missing in between or at the
            end.
    """
    found: list[Checkpoint] = []
    for path in _manifests(folder, "task"):
        each = _manifest(path, found[-1] if found else None)
        if int(each.folder.name.removeprefix("task-")) != each.learnt - 1:
            raise DamagedCheckpoint(f"{path} is damaged: it is that of task {each.learnt - 1}; {_remedy(path)}")
        index = each.learnt - 1 if each.manifest.get("alone") else found[-1].learnt if found else 0
        if each.learnt != index + 1:
            raise DamagedCheckpoint(
                f"{folder} has {each.folder.name} but not task-{index:03d}: restore that folder, or remove the "
                "later ones to go back"
            )
        found.append(each)
    learnt = found[-1].learnt if found else 0
    torn = folder / f"task-{learnt:03d}"
    if (torn / _LEARNER).exists() and _vouched(folder) > learnt:
        raise DamagedCheckpoint(
            f"{torn / _MANIFEST} is missing, though this task was learnt and evaluated: restore it, or remove {torn} "
            "to go back to the one before"
        )
    _check_run(folder, found)
    return found


def latest_step(folder: Path, done: Sequence[Checkpoint]) -> Checkpoint | None:
    """The last whole snapshot within the task that follows those in `done`, which `whole` gave.

    Raises:
        DamagedCheckpoint: when its manifest cannot be read, or is another run's.
    """
    last = done[-1] if done else None
    found = _manifests(folder / f"task-{last.learnt if last else 0:03d}", "step")
    if not found:
        return None
    snapshot = _manifest(found[-1], last)
    if snapshot.learnt != (last.learnt if last else 0) or snapshot.step is None:
        raise _foreign(snapshot, "it is no snapshot of this task")
    _check_run(folder, [snapshot], last)
    return snapshot


def holds(checkpoint: Checkpoint, learner: Core) -> bool:
    """Whether a checkpoint is what `learner` knows now."""
    digest = hashlib.sha256(_packed(learner.learnt_state())).hexdigest()
    return checkpoint.tasks == learner.tasks and checkpoint.manifest["sha256"].get(_LEARNER) == digest


def restore(learner: Core, checkpoint: Checkpoint, tasks: Sequence[Task] = ()) -> None:
    """Bring a new learner to a checkpoint: grow for every task in it, then load.

    Args:
        learner: fresh, of the same backbone and method.
        checkpoint: what to load.
        tasks: the stream's, with their data; tasks beyond them are known by description only.

    Raises:
        DamagedCheckpoint: when a file is cut, changed or missing.
        ValueError: when the checkpoint belongs to another backbone, stream, method or version.
    """
    path = checkpoint.folder / _LEARNER
    if checkpoint.manifest["backbone"] != learner.fingerprint:
        raise ValueError(
            f"{checkpoint.folder} was learnt on another backbone (fingerprint {checkpoint.manifest['backbone'][:12]}, "
            f"{learner.backbone.spec} has {learner.fingerprint[:12]}): give the weights it was learnt on"
        )
    made, given = checkpoint.manifest.get("method"), learner.method.spec
    if made and given and pathless(made) != pathless(given):
        raise ValueError(f"{path} does not fit this learner: {made!r} learnt it, not {given!r}; give that method")
    tensors = _read(checkpoint, _LEARNER)
    for index, described in enumerate(checkpoint.tasks):
        task = tasks[index] if index < len(tasks) else described
        if task != described:
            raise ValueError(
                f"{checkpoint.folder} learnt task {index} as {described.name!r}, the stream now has {task.name!r}: the "
                "data has changed; restore it, or start anew in another folder"
            )
        learner.grow(task)
        learner.prepare()  # as before each task of an unbroken run
    try:
        missing, unexpected = learner.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this learner: {str(error).splitlines()[-1].strip()}") from error
    frozen = {f"backbone.{n}" for n, p in learner.backbone.named_parameters() if not p.requires_grad}
    missing = [
        k for k in missing if k not in frozen and k not in dict(learner.backbone.named_buffers(prefix="backbone"))
    ]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit this learner: missing {missing[:3]}, unexpected {unexpected[:3]}; was it made by "
            "another method or version?"
        )
    learner.to(learner.device)
    learner.learnt = checkpoint.learnt
    learner.prepare()


def _describe(folder: Path, learner: Core, alone: bool = False) -> dict[str, Any]:
    """What every manifest says: whose it is, what it follows, and the tasks that this one does not know."""
    paths = _manifests(folder, "task")
    last = _manifest(paths[-1]) if paths else None
    known = last.learnt if last and not alone else 0
    return {
        "format": FORMAT,
        "run": schema.seal(read_record(folder)) if (folder / _RECORD).exists() else "",
        "previous": last.seal if last else None,
        "learnt": learner.learnt,
        "backbone": learner.fingerprint,
        "method": learner.method.spec,
        "tasks": [task.describe() for task in learner.tasks[known:]],
    }


def _write(target: Path, manifest: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> None:
    if (target / _MANIFEST).exists():
        raise ValueError(f"{target} is already there: checkpoints are never overwritten")
    target.mkdir(parents=True, exist_ok=True)
    digests, sizes = {}, {}
    for name, tensors in files.items():
        content = _packed(tensors)
        digests[name], sizes[name] = hashlib.sha256(content).hexdigest(), len(content)
        place(target / name, content)
    write_sealed(target / _MANIFEST, manifest | {"sha256": digests, "bytes": sizes})
    sync_folder(target.parent)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    packed: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return packed


def _manifest(path: Path, last: Checkpoint | None = None) -> Checkpoint:
    """A manifest, as the successor of `last`."""
    found = schema.read(path, Manifest, _remedy(path), must_be_sealed=True)
    if found["format"] not in range(1, FORMAT + 1):
        raise ValueError(f"{path} has format {found['format']}; this version of perdure reads 1 to {FORMAT}")
    return Checkpoint(path.parent, found, tuple(last.tasks) if last else ())


def _check_run(folder: Path, found: Sequence[Checkpoint], last: Checkpoint | None = None) -> None:
    """Refuse checkpoints that are not of the run of `folder`, or do not follow each other after `last`."""
    record = read_record(folder) if (folder / _RECORD).exists() else None
    run, declared = schema.seal(record) if record else "", len(record["stream"]["tasks"]) if record else 0
    for each in found:
        manifest, tasks = each.manifest, each.tasks
        if manifest["format"] == 1:  # whose chain is nothing but the tasks, which each repeated
            if (record and "format" in record) or (last and last.manifest["format"] > 1):
                raise _foreign(each, "an older version of perdure wrote it than wrote this run")
            if last and tasks[: len(last.tasks)] != last.tasks:
                raise _foreign(each, f"its tasks are not those of {last.path}")
        elif manifest.get("run") != run:
            raise _foreign(each, f"it is not of the run of {folder / _RECORD}, or that file was changed")
        elif manifest.get("previous") != (last.seal if last else None):
            raise _foreign(each, f"it does not follow {last.path if last else 'an empty folder'}")
        most = max(declared, len(tasks))
        numbered = [task.index for task in tasks] == list(range(len(tasks))) and each.learnt <= len(tasks)
        named = all(len(task.classes) == len(task.names) for task in tasks)
        if not (numbered and named) or any(max(row.after, row.on or 0) >= most for row in each.rows):
            raise DamagedCheckpoint(f"{each.path} is damaged: it speaks of tasks that are not; {_remedy(each.path)}")
        last = each


def _foreign(checkpoint: Checkpoint, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{checkpoint.path} comes from another run: {why}; {_remedy(checkpoint.path)}")


def _remedy(path: Path) -> str:
    return f"restore it, or remove {path.parent} to go back to the one before"


def read_record(folder: Path) -> Record:
    """run.json of a folder.

    Raises:
        ValueError: when there is none, or it is not what was written.
    """
    path = folder / _RECORD
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run's or a learner's folder: it has no run.json; give one that 'perdure run' or "
            "'perdure learn' wrote"
        )
    return schema.read(path, Record, f"restore it, or remove {folder} to start anew")


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Of the file that holds what was learnt.

    Raises:
        DamagedCheckpoint: when an older manifest does not say it and the file is missing.
    """
    known = checkpoint.manifest.get("bytes", {}).get(_LEARNER)
    path = checkpoint.folder / _LEARNER
    if known is None and not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing: {_remedy(path)}")
    return path.stat().st_size if known is None else known


def _vouched(folder: Path) -> int:
    """Number of tasks that were evaluated, according to what was written down after their manifests."""
    counts = [0]
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        counts.append(len(json.loads((folder / _SUMMARY).read_bytes())["matrix"]))
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        counts += [int(json.loads(line)["after"]) + 1 for line in (folder / _RESULTS).read_bytes().splitlines()]
    return max(counts)


def _manifests(folder: Path, kind: str) -> list[Path]:
    """Of the folders `kind`-N, in the order of N: beyond the padded digits, names do not sort."""
    numbered = [(p.parent.name.removeprefix(f"{kind}-"), p) for p in folder.glob(f"{kind}-*/{_MANIFEST}")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    path = checkpoint.folder / name
    remedy = _remedy(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing: {remedy}") from error
    if hashlib.sha256(content).hexdigest() != checkpoint.manifest["sha256"].get(name):
        raise DamagedCheckpoint(f"{path} is damaged: its sha256 is not the one in its manifest; {remedy}")
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}; {remedy}") from error
    return tensors


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Measurements as they stand in results.jsonl."""
    return [json.dumps(asdict(row)) + "\n" for row in rows]


def write_results(folder: Path, done: Sequence[Checkpoint]) -> bool:
    """Make results.jsonl hold just what whole checkpoints vouch for; whether it had to be written."""
    path, text = folder / _RESULTS, "".join(lines_of([row for each in done for row in each.rows]))
    if path.exists() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True
