"""Manifests: what a folder's checkpoints say of themselves, each the successor of the one before, or refused.

`results.jsonl` only repeats what they vouch for.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perdure.formatting import command
from perdure.options.paths import Relocation
from perdure.storage import schema
from perdure.storage.files import write_text
from perdure.storage.replacement import DRAFT, settle
from perdure.storage.schema import (
    FORMAT,
    SPECIALISTS,
    Damaged,
    LessonSource,
    Manifest,
    Moves,
    Resized,
    RunRecord,
    SpecialistsRecord,
)
from perdure.types import Row, Task

LEARNER, MANIFEST, RECORD = "learner.safetensors", "manifest.json", "run.json"
TAUGHT = "taught.safetensors"
MOVED, RESIZED = "moved.json", "resized.json"
_SUMMARY, _RESULTS = "summary.json", "results.jsonl"
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
        return self.folder / MANIFEST

    @property
    def step(self) -> int | None:
        """Steps done of task number `learnt`, None at a task's end."""
        return self.manifest.get("step")

    @property
    def rows(self) -> list[Row]:
        """Measurements made after this task."""
        listed = self.manifest.get("rows", [])
        return [Row(row["after"], row["on"], row["metric"], row["value"]) for row in listed]

    def task_of(self, name: str) -> int:
        """The position of the task whose images' hashes stand as `name` in the file `TAUGHT`."""
        return int(name.partition("/")[2] or self.learnt - 1)

    @property
    def tasks(self) -> list[Task]:
        """Descriptions of the tasks that the learner has grown for."""
        own = [Task.described(dict(facts)) for facts in self.manifest["tasks"]]
        return [*self.before[: own[0].index if own else None], *own]


def sources(done: Sequence[Checkpoint]) -> dict[int, LessonSource]:
    """Where the lessons of a folder came from, by the position of the task, as far as it was written down."""
    found: dict[int, LessonSource] = {}
    for each in done:
        given: dict[str, LessonSource] = dict(each.manifest.get("earlier", {}))
        found |= {task.index: given[task.name] for task in each.tasks[: each.learnt] if task.name in given}
        if "source" in each.manifest:
            found[each.learnt - 1] = each.manifest["source"]
    return found


def whole(folder: Path) -> list[Checkpoint]:
    """Checkpoints after a task, in order, each of the run of `folder` and the successor of the one before.

    Raises:
        DamagedCheckpoint: when a manifest cannot be read, is another run's, or a task is missing in between or at the
            end.
    """
    settle(folder)
    found: list[Checkpoint] = []
    for path in manifest_paths(folder, "task"):
        each = read_manifest(path, found[-1] if found else None)
        if int(each.folder.name.removeprefix("task-")) != each.learnt - 1:
            raise DamagedCheckpoint(f"{path} is damaged: it is that of task {each.learnt}; {remedy_of(path)}")
        index = each.learnt - 1 if each.manifest.get("alone") else found[-1].learnt if found else 0
        if each.learnt != index + 1:
            raise DamagedCheckpoint(
                f"{folder} has {each.folder.name} but not task-{index:03d}: restore that folder, or remove the "
                "later ones to go back"
            )
        found.append(each)
    learnt = found[-1].learnt if found else 0
    torn = folder / f"task-{learnt:03d}"
    if (torn / LEARNER).exists() and _vouched(folder) > learnt:
        raise DamagedCheckpoint(
            f"{torn / MANIFEST} is missing, though this task was learnt and evaluated: restore it, or remove {torn} "
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
    found = manifest_paths(folder / f"task-{last.learnt if last else 0:03d}", "step")
    if not found:
        return None
    snapshot = read_manifest(found[-1], last)
    if snapshot.learnt != (last.learnt if last else 0) or snapshot.step is None:
        raise _foreign(snapshot, "it is no snapshot of this task")
    _check_run(folder, [snapshot], last)
    return snapshot


def read_manifest(path: Path, last: Checkpoint | None = None) -> Checkpoint:
    """A manifest, as the successor of `last`."""
    found = schema.read_typed(path, Manifest, remedy_of(path), must_be_sealed=True)
    _check_format(path, found["format"])
    return Checkpoint(path.parent, found, tuple(last.tasks) if last else ())


def _check_run(folder: Path, found: Sequence[Checkpoint], last: Checkpoint | None = None) -> None:
    """Refuse checkpoints that are not of the run of `folder`, or do not follow each other after `last`."""
    record = read_record(folder) if (folder / RECORD).exists() else None
    run, declared = schema.seal(record) if record else "", len(record["stream"]["tasks"]) if record else 0
    for each in found:
        manifest, tasks = each.manifest, each.tasks
        if manifest["format"] == 1:  # whose chain is nothing but the tasks, which each repeated
            if (record and "format" in record) or (last and last.manifest["format"] > 1):
                raise _foreign(each, "an older version of perdure wrote it than wrote this run")
            if last and tasks[: len(last.tasks)] != last.tasks:
                raise _foreign(each, f"its tasks are not those of {last.path}")
        elif manifest.get("run") != run:
            raise _foreign(each, f"it is not of the run of {folder / RECORD}, or that file was changed")
        elif manifest.get("previous") != (last.seal if last else None):
            raise _foreign(each, f"it does not follow {last.path if last else 'an empty folder'}")
        most = max(declared, len(tasks))
        numbered = [task.index for task in tasks] == list(range(len(tasks))) and each.learnt <= len(tasks)
        named = all(len(task.classes) == len(task.names) for task in tasks)
        if not (numbered and named) or any(max(row.after, row.on or 0) >= most for row in each.rows):
            raise DamagedCheckpoint(f"{each.path} is damaged: it speaks of tasks that are not; {remedy_of(each.path)}")
        last = each


def _foreign(checkpoint: Checkpoint, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{checkpoint.path} comes from another run: {why}; {remedy_of(checkpoint.path)}")


def remedy_of(path: Path) -> str:
    """What to do about a manifest that cannot be used, for messages."""
    return f"restore it, or remove {path.parent} to go back to the one before"


def read_record(folder: Path) -> RunRecord:
    """run.json of a folder.

    Raises:
        ValueError: when there is none, or it is not what was written.
    """
    settle(folder)
    path = folder / RECORD
    if (folder / SPECIALISTS).is_file():
        raise ValueError(
            f"{folder} holds specialists, each of which lies in a folder of its own: give that of one of them, or use "
            "predict, search, ask, show, eval or report"
        )
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run's or a learner's folder: it has no run.json; give one that 'perdure run' or "
            "'perdure learn' wrote"
        )
    record = schema.read_typed(path, RunRecord, f"restore it, or remove {folder} to start anew")
    _check_format(path, record.get("format", 1))
    return record


def recorded_moves(out: Path) -> list[Relocation]:
    """What `perdure move` wrote: `run.json`, which every manifest vouches for, stays as it is."""
    path = out / MOVED
    if not path.is_file():
        return []
    found = schema.read_typed(path, Moves, "restore it, or remove it and move again", must_be_sealed=True)["moved"]
    return [(str(old), str(new)) for old, new in found]


def recorded_size(out: Path) -> dict[str, Any]:
    """Options of the backbone that `perdure resize` wrote, in place of those in `run.json`."""
    path = out / RESIZED
    if not path.is_file():
        return {}
    found = schema.read_typed(path, Resized, "restore it, or remove it and resize again", must_be_sealed=True)
    return found["backbone"]


def read_specialists(folder: Path) -> SpecialistsRecord:
    """specialists.json of a folder.

    Raises:
        DamagedCheckpoint: when it is not what was written.
    """
    path, remedy = folder / SPECIALISTS, "restore it, or combine again"
    record = schema.read_typed(path, SpecialistsRecord, remedy, must_be_sealed=True)
    _check_format(path, record["format"])
    if any(member >= len(record["members"]) for member, _ in record["classes"]):
        raise DamagedCheckpoint(f"{path} is damaged: a class is of a member that is not; {remedy}")
    return record


def _check_format(path: Path, number: int) -> None:
    """Refuse what a newer version wrote: it may mean something else."""
    if number not in range(1, FORMAT + 1):
        raise ValueError(
            f"{path} has format {number}; this version of perdure reads 1 to {FORMAT}: install a newer one"
        )


def _vouched(folder: Path) -> int:
    """Number of tasks that were evaluated, according to what was written down after their manifests."""
    counts = [0]
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        counts.append(len(json.loads((folder / _SUMMARY).read_bytes())["matrix"]))
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        counts += [int(json.loads(line)["after"]) + 1 for line in (folder / _RESULTS).read_bytes().splitlines()]
    return max(counts)


def check_outside(target: Path) -> None:
    """Refuse to write something of another kind into the folder of a learner, a run or specialists.

    Raises:
        ValueError: when `target` lies in one, where it may be taken for a task.
    """
    for folder in target.expanduser().absolute().parents:
        if (folder / RECORD).is_file() or (folder / SPECIALISTS).is_file():
            raise ValueError(f"{target} lies in {folder}, which is a learner's or a run's: give a folder beside it")


def check_new(into: Path) -> None:
    """Refuse a folder that holds a learner, a run or specialists, or lies in one that does.

    Raises:
        ValueError: with the remedy.
    """
    check_outside(into)
    settle(into)
    if ((into / RECORD).exists() and not holds_no_task(into)) or (into / SPECIALISTS).exists():
        raise ValueError(
            f"{into} already holds a learner or specialists, as {command('show', into)} says: give a new folder"
        )


def check_single(into: Path) -> None:
    """Refuse to begin a run or a learner where specialists lie, or several runs, whose report stands there.

    Raises:
        ValueError: with the remedy.
    """
    refuse_team(into)
    several = [*(run / RECORD for run in runs_in(into)), *into.glob("compare.json"), *into.glob("study.json")]
    if several and not (into / RECORD).exists():
        raise ValueError(
            f"{into} is the folder of several runs, as {min(several).relative_to(into)} says: give one of its own"
        )


def refuse_team(into: Path) -> None:
    """Raise a ValueError where specialists lie in `into`."""
    if (into / SPECIALISTS).exists():
        raise ValueError(f"{into} holds specialists, which learn each in a folder of their own: give another folder")


def check_several(out: Path) -> None:
    """Refuse to begin a grid or a search where a run, a learner or specialists lie, whose report stands there.

    Raises:
        ValueError: with the remedy.
    """
    for name, what in ((RECORD, "a run or a learner"), (SPECIALISTS, "specialists")):
        if (out / name).exists():
            raise ValueError(f"{out} holds {what}, and several runs need a folder of their own: give another --out")


def holds_no_task(folder: Path) -> bool:
    """Whether a learner's record lies there and nothing that it learnt: whoever saved it was killed before that."""
    try:
        record = read_record(folder)
    except ValueError:
        return False
    manifests = (*folder.glob(f"task-*/{MANIFEST}"), *folder.glob(f"task-*/step-*/{MANIFEST}"))
    return not record["config"].get("stream") and not manifests


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs and learners right below `folder`; a draft that a killed process has left is none."""
    settle(folder)
    return sorted(path.parent for path in folder.glob(f"*/{RECORD}") if path.parent.name != DRAFT)


def manifest_paths(folder: Path, kind: str) -> list[Path]:
    """Of the folders `kind`-N, in the order of N: beyond the padded digits, names do not sort."""
    numbered = [(p.parent.name.removeprefix(f"{kind}-"), p) for p in folder.glob(f"{kind}-*/{MANIFEST}")]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


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
