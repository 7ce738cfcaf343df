"""A learner's folder: one sub-folder per learnt task, whole or refused; and snapshots within a long task.

Tensors stand in safetensors files, the rest in manifests that are written last: what has a manifest is complete.
Every file is written beside its name, forced to disk and renamed; nothing is ever overwritten. Only what was learnt is
stored, never the frozen backbone, and nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perdure.learner import Core
from perdure.places import pathless
from perdure.types import Row, Task

FORMAT = 1
_LEARNER, _OPTIMIZER, _MANIFEST = "learner.safetensors", "optimizer.safetensors", "manifest.json"


class DamagedCheckpoint(ValueError):
    """A file of a learner's folder is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: after a task, or within one when `step` is set."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def learnt(self) -> int:
        """Number of tasks that are complete."""
        return int(self.manifest["learnt"])

    @property
    def step(self) -> int | None:
        """Steps done of task number `learnt`, None at a task's end."""
        return self.manifest.get("step")

    @property
    def rows(self) -> list[Row]:
        """Measurements made after this task."""
        return [Row(**row) for row in self.manifest.get("rows", [])]

    @property
    def tasks(self) -> list[Task]:
        """Descriptions of the tasks that the learner has grown for."""
        return [Task.described(facts) for facts in self.manifest["tasks"]]


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
    manifest = _describe(learner) | {"rows": [asdict(row) for row in rows]} | facts
    _write(target, manifest, {_LEARNER: learner.memory()} | dict(beside or {}))
    drop_steps(target)
    return target


def save_step(folder: Path, learner: Core, step: int, optimizer: torch.optim.Optimizer | None, rows: list[Row]) -> Path:
    """Write the state within the current task, with the optimizer's, and remove the snapshot before it.

    `rows` are measurements made before the task's first step.
    """
    task = folder / f"task-{learner.learnt:03d}"
    target = task / f"step-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)  # a torn one of a killed process
    tensors = {_LEARNER: learner.memory()}
    if optimizer is not None:
        names = {id(p): name for name, p in learner.trainable().items()}
        tensors[_OPTIMIZER] = {
            f"{names[id(p)]}/{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    _write(target, _describe(learner) | {"step": step, "rows": [asdict(row) for row in rows]}, tensors)
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
    """Checkpoints after a task, in order.

    Raises:
        DamagedCheckpoint: when a manifest cannot be read or a task is missing in between.
    """
    found = [_manifest(path) for path in _manifests(folder, "task")]
    index = 0
    for checkpoint in found:
        if checkpoint.manifest.get("alone"):
            index = checkpoint.learnt - 1
        if checkpoint.learnt != index + 1:
            raise DamagedCheckpoint(
                f"{folder} has {checkpoint.folder.name} but not task-{index:03d}: restore that folder, or remove the "
                "later ones to go back"
            )
        index += 1
    return found


def latest_step(folder: Path, learnt: int) -> Checkpoint | None:
    """The last whole snapshot within task number `learnt`."""
    found = _manifests(folder / f"task-{learnt:03d}", "step")
    return _manifest(found[-1]) if found else None


def holds(checkpoint: Checkpoint, learner: Core) -> bool:
    """Whether a checkpoint is what `learner` knows now."""
    digest = hashlib.sha256(_packed(learner.memory())).hexdigest()
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
        learner.settle()  # as before each task of an unbroken run
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
    learner.settle()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    Raises:
        ValueError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another process is working in {folder}: wait for it, or give another folder") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that it is either whole or not there."""
    _place(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    _place(path, text.encode())


def _describe(learner: Core) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "learnt": learner.learnt,
        "backbone": learner.fingerprint,
        "method": learner.method.spec,
        "tasks": [task.describe() for task in learner.tasks],
    }


def _write(target: Path, manifest: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> None:
    if (target / _MANIFEST).exists():
        raise ValueError(f"{target} is already there: checkpoints are never overwritten")
    target.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, tensors in files.items():
        content = _packed(tensors)
        digests[name] = hashlib.sha256(content).hexdigest()
        _place(target / name, content)
    manifest = manifest | {"sha256": digests}
    manifest["seal"] = _seal(manifest)
    write_json(target / _MANIFEST, manifest)
    _sync_folder(target.parent)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    packed: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return packed


def _seal(manifest: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _place(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(path: Path) -> Checkpoint:
    remedy = f"restore it, or remove {path.parent} to go back to the one before"
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        sealed = text.endswith("}\n") and manifest["seal"] == _seal(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: it cannot be read as a manifest; {remedy}") from error
    if not sealed:
        raise DamagedCheckpoint(f"{path} is damaged: its content does not match its seal; {remedy}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this version of perdure reads {FORMAT}")
    return Checkpoint(path.parent, manifest)


def _manifests(folder: Path, kind: str) -> list[Path]:
    """Of the folders `kind`-N, in the order of N: beyond the padded digits, names do not sort."""
    numbered = [(p.parent.name.removeprefix(f"{kind}-"), p) for p in folder.glob(f"{kind}-*/{_MANIFEST}")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    path = checkpoint.folder / name
    remedy = f"restore it, or remove {checkpoint.folder} to go back to the one before"
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


def drop_lines_after(path: Path, kept: list[str]) -> None:
    """Make an append-only file hold just `kept`, which is what whole checkpoints vouch for."""
    text = "".join(f"{line}\n" for line in kept)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
