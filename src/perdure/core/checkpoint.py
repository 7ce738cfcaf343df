"""A learner's folder: one sub-folder per learnt task, whole or refused; and snapshots within a long task.

Tensors stand in safetensors files, the rest in manifests that are written last: what has a manifest is complete.
Every file is written beside its name, forced to disk and renamed; nothing is ever overwritten. Only what was learnt is
stored, never the frozen backbone, and nothing is ever unpickled.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perdure.core.learner import Core
from perdure.core.manifests import LEARNER, MANIFEST, RECORD, manifest_paths, remedy_of
from perdure.core.manifests import Checkpoint as Checkpoint
from perdure.core.manifests import DamagedCheckpoint as DamagedCheckpoint
from perdure.core.manifests import latest_step as latest_step
from perdure.core.manifests import lines_of as lines_of
from perdure.core.manifests import read_manifest as read_manifest
from perdure.core.manifests import read_record as read_record
from perdure.core.manifests import sources as sources
from perdure.core.manifests import whole as whole
from perdure.core.manifests import write_results as write_results
from perdure.core.renamed_keys import SINCE, renamed
from perdure.options.paths import pathless
from perdure.storage import schema
from perdure.storage.files import locked as locked
from perdure.storage.files import place, sync_folder
from perdure.storage.files import write_json as write_json
from perdure.storage.files import write_sealed as write_sealed
from perdure.storage.files import write_text as write_text
from perdure.storage.replacement import drop_draft
from perdure.storage.schema import FORMAT
from perdure.types import Row, Task

_OPTIMIZER = "optimizer.safetensors"


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
    _write(target, manifest, {LEARNER: learner.learnt_state()} | dict(beside or {}))
    drop_steps(target)
    return target


def save_step(folder: Path, learner: Core, step: int, optimizer: torch.optim.Optimizer | None, rows: list[Row]) -> Path:
    """Write the state within the current task, with the optimizer's, and remove the snapshot before it.

    `rows` are measurements made before the task's first step.
    """
    task = folder / f"task-{learner.learnt:03d}"
    target = task / f"step-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)  # a torn one of a killed process
    tensors = {LEARNER: learner.learnt_state()}
    if optimizer is not None:
        names = {id(p): name for name, p in learner.trainable().items()}
        tensors[_OPTIMIZER] = {
            f"{names[id(p)]}/{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    facts: dict[str, Any] = {"step": step, "rows": [asdict(row) for row in rows]}
    if learner.scaler.is_enabled():
        facts["scaler"] = learner.scaler.state_dict()
    _write(target, _describe(folder, learner) | facts, tensors)
    for old in task.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def drop_left(folder: Path, done: Sequence[Checkpoint]) -> None:
    """Remove what a killed process has left in `folder`, which is locked: a draft, and snapshots within whole tasks."""
    drop_draft(folder)
    for each in done:
        drop_steps(each.folder)


def drop_steps(task: Path) -> None:
    """Remove the snapshots within a task that is whole; a killed process may have left them."""
    for step in task.glob("step-*"):
        shutil.rmtree(step, ignore_errors=True)


def restore_optimizer(checkpoint: Checkpoint, learner: Core, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of a snapshot's optimizer back, and the scale of the loss."""
    if scaler := checkpoint.manifest.get("scaler"):
        learner.scaler.load_state_dict(dict(scaler))
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


def matches(checkpoint: Checkpoint, learner: Core) -> bool:
    """Whether a checkpoint is what `learner` knows now."""
    if checkpoint.tasks != learner.tasks:
        return False
    digest, stored = _digest(learner.learnt_state()), checkpoint.manifest["sha256"].get(LEARNER)
    if checkpoint.manifest["format"] < SINCE:
        stored = _digest(renamed(_read(checkpoint, LEARNER), learner.method))
    return stored == digest


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
    path = checkpoint.folder / LEARNER
    # the same weights: what their positions are was changed by `perdure resize`, and no adapter knows of it
    if checkpoint.manifest["backbone"].partition(" ")[0] != learner.fingerprint.partition(" ")[0]:
        raise ValueError(
            f"{checkpoint.folder} was learnt on another backbone (fingerprint {checkpoint.manifest['backbone'][:12]}, "
            f"{learner.backbone.spec} has {learner.fingerprint[:12]}): give the weights it was learnt on"
        )
    made, given = checkpoint.manifest.get("method"), learner.method.spec
    if made and given and pathless(made) != pathless(given):
        raise ValueError(f"{path} does not fit this learner: {made!r} learnt it, not {given!r}; give that method")
    tensors = _read(checkpoint, LEARNER)
    for index, described in enumerate(checkpoint.tasks):
        task = tasks[index] if index < len(tasks) else described
        if task != described:
            raise ValueError(
                f"{checkpoint.folder} learnt task {task.number} as {described.name!r}, the stream has {task.name!r}: "
                "the data has changed; restore it, or start anew in another folder"
            )
        learner.grow(task, over=index < checkpoint.learnt)
        learner.prepare()  # as before each task of an unbroken run
    if checkpoint.manifest["format"] < SINCE:
        tensors = renamed(tensors, learner.method)
    try:
        missing, unexpected = learner.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this learner: {str(error).splitlines()[-1].strip()}") from error
    # by all their names: an output layer may be the embeddings once more
    weights = dict(learner.backbone.named_parameters(prefix="backbone", remove_duplicate=False))
    buffers = dict(learner.backbone.named_buffers(prefix="backbone", remove_duplicate=False))
    here = {id(weights[k]) for k in tensors if k in weights} | {id(p) for p in weights.values() if not p.requires_grad}
    missing = [k for k in missing if k not in buffers and id(weights.get(k)) not in here]
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
    paths = manifest_paths(folder, "task")
    last = read_manifest(paths[-1]) if paths else None
    known = last.learnt if last and not alone else 0
    return {
        "format": FORMAT,
        "run": schema.seal(read_record(folder)) if (folder / RECORD).exists() else "",
        "previous": last.seal if last else None,
        "learnt": learner.learnt,
        "backbone": learner.fingerprint,
        "method": learner.method.spec,
        "tasks": [task.describe() for task in learner.tasks[known:]],
    }


def _write(target: Path, manifest: dict[str, Any], files: dict[str, dict[str, Tensor]]) -> None:
    if (target / MANIFEST).exists():
        raise ValueError(f"{target} is already there: checkpoints are never overwritten")
    target.mkdir(parents=True, exist_ok=True)
    digests, sizes = {}, {}
    for name, tensors in files.items():
        digests[name], sizes[name] = place_tensors(target / name, tensors)
    write_sealed(target / MANIFEST, manifest | {"sha256": digests, "bytes": sizes})
    sync_folder(target.parent)


def place_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Write a file of tensors; returns its sha256 and its bytes, which its manifest has to say."""
    content = _packed(tensors)
    place(path, content)
    return hashlib.sha256(content).hexdigest(), len(content)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    packed: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return packed


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(_packed(tensors)).hexdigest()


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Of the file that holds what was learnt.

    Raises:
        DamagedCheckpoint: when an older manifest does not say it and the file is missing.
    """
    known = checkpoint.manifest.get("bytes", {}).get(LEARNER)
    path = checkpoint.folder / LEARNER
    if known is None and not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing: {remedy_of(path)}")
    return path.stat().st_size if known is None else known


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    path = checkpoint.folder / name
    remedy = remedy_of(path)
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
