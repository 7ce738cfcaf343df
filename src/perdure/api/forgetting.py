"""A class is forgotten by the learner of a folder: every state in it is written anew without what was kept of it."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perdure.api.learner import OPEN, Learner
from perdure.api.lesson_source import unfinished
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint, read_record
from perdure.core.forgetting import forget_classes
from perdure.core.manifests import LEARNER, MANIFEST
from perdure.evaluation.feature_drift import FEATURES
from perdure.evaluation.per_class import ANSWERS
from perdure.formatting import command
from perdure.process import plain
from perdure.storage.replacement import drafted
from perdure.storage.schema import FORMAT
from perdure.training.loop import Quiet
from perdure.training.summary import SUMMARY, write_summary

_MADE_ANEW = (".lock", "results.jsonl", SUMMARY, "report.html")


@plain()
def forget_in(folder: Path, name: str, device: str | None = None) -> Learner:
    """Let the learner of `folder` forget the class `name`, see `Learner.forget`; returns it as it is now.

    The states after earlier tasks are written anew too. Whoever is killed leaves the folder as it was, or as it will
    be. Scores stay those that were measured; what was answered to test images is removed.

    Raises:
        ValueError: when it has no such class or no other one, was stopped within a lesson, or is a run on a stream.
    """
    with checkpoint.locked(folder):
        record, done = read_record(folder), checkpoint.whole(folder)
        if record["config"].get("stream", OPEN) != OPEN:
            raise ValueError(
                f"{folder} is a run on a stream, whose results are about all of its classes: take a copy for use, with "
                f"Learner.load({str(folder)!r}).forget({name!r}).save(...)"
            )
        if unfinished(folder, done) is not None:
            raise ValueError(f"{folder} was stopped within a lesson: finish it first with {command('resume', folder)}")
        learner = Learner.load(folder, device)
        c = learner.class_called(name)
        with drafted(folder) as draft:
            for path in folder.iterdir():
                if path.is_file() and path.name not in _MADE_ANEW:
                    shutil.copy2(path, draft)
            last: Checkpoint | None = None
            for each in done:
                last = _anew(each, draft, folder, c, last, device, each is done[-1])
            written = checkpoint.whole(draft)
            learner.forget(name)
            if not checkpoint.matches(written[-1], learner):
                raise AssertionError(f"{folder}: what was written is not what is known without {name!r}")
            checkpoint.write_results(draft, written)
            write_summary(draft, Quiet().note)
            (folder / "report.html").unlink(missing_ok=True)
    return learner


def _anew(
    done: Checkpoint, draft: Path, folder: Path, c: int, last: Checkpoint | None, device: str | None, newest: bool
) -> Checkpoint:
    """Write a checkpoint to `draft` without class `c`, as the successor of `last`."""
    target = draft / done.folder.name
    target.mkdir()
    known = any(c in task.classes for task in done.tasks)
    manifest: dict[str, Any] = {k: v for k, v in done.manifest.items() if k != "seal"}
    digests, sizes = dict(manifest["sha256"]), dict(manifest.get("bytes", {}))
    for name in list(digests):
        if known and name in (LEARNER, ANSWERS, FEATURES):
            del digests[name]
            sizes.pop(name, None)
        else:
            _linked(done.folder / name, target / name)
    if known:
        learner = Learner.untaught(folder, device)
        checkpoint.restore(learner, done)
        forget_classes(learner, {c})
        digests[LEARNER], sizes[LEARNER] = checkpoint.place_tensors(target / LEARNER, learner.learnt_state())
        manifest |= {"format": FORMAT, "tasks": [_facts(facts, c) for facts in manifest["tasks"]]}
        if last is not None:
            manifest["previous"] = last.seal
    if newest:
        today = datetime.now(UTC).isoformat(timespec="seconds")
        manifest["forgotten"] = [*manifest.get("forgotten", ()), today]
    if known or newest:
        checkpoint.write_sealed(target / MANIFEST, manifest | {"sha256": digests, "bytes": sizes})
    else:
        _linked(done.path, target / MANIFEST)
    return checkpoint.read_manifest(target / MANIFEST, last)


def _facts(facts: dict[str, Any], c: int) -> dict[str, Any]:
    """A task's description without class `c`."""
    kept = [(one, name) for one, name in zip(facts["classes"], facts["names"], strict=True) if one != c]
    return facts | {"classes": [one for one, _ in kept], "names": [name for _, name in kept]}


def _linked(path: Path, target: Path) -> None:
    """The same file under another name, where the file system can; else a copy."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
