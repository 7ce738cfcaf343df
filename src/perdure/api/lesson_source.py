"""Where a lesson comes from: what is written down of it, and whether what is given now is the same."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from perdure.api.abilities import Abilities
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint, read_record
from perdure.core.manifests import recorded_moves
from perdure.core.pretext import make_pretext
from perdure.formatting import command
from perdure.options.paths import anchored, relocated
from perdure.options.spec import parse
from perdure.storage import schema
from perdure.storage.schema import LessonSource
from perdure.streams import Captioned, ConversationSet, ImageSet
from perdure.streams.single_task import COLUMN
from perdure.streams.splits import digest
from perdure.types import Data, Task

_SOURCE = "source.json"
_WORDS = {"folder": "folders", "train_sha256": "images", "content": "images", "captions": "captions' columns"}
_WORDS |= {"images": "folders of images", "score": "scores", "pretext": "pretexts", "replay": "folders of old images"}
_READING = {"captions": "captions", "images": "conversations", "score": "conversations"}
"""How a file is read, beside where it lies: name -> what a learner learns of whom it is asked."""
_PATHS = ("folder", "images", "replay")
_PRETRAINING = ("pretext", "replay", "captions")
"""How it is read in a step of pre-training."""


def reading_of(source: LessonSource) -> dict[str, str | None]:
    """How the file of a lesson was read."""
    return {name: value for name, value in source.items() if name in {*_READING, *_PRETRAINING}}  # type: ignore[misc]


def settled(given: Mapping[str, str | None], learner: Abilities) -> dict[str, str | None]:
    """How a lesson of `learner` is read, where `given` says it and by default.

    Raises:
        ValueError: for what would have no effect.
    """
    asks, objective = min(learner.objective.asks), learner.config.objective
    reading: dict[str, str | None] = {name: value for name, value in given.items() if value is not None}
    if "pretext" in reading:
        if asks == "conversations":
            raise ValueError(f"pretrain is for images, and {objective} learns answers: use 'perdure learn'")
        reading["pretext"] = anchored(str(reading["pretext"]))
        captions = make_pretext(str(reading["pretext"])).captions
        keeps = any(part.name == "feature_distill" for part in parse(learner.config.method))
        if idle := [name for name in reading if name == ("replay" if captions else "captions")]:
            raise ValueError(
                f"--{idle[0]} {reading[idle[0]]} has no effect with {reading['pretext']}: leave it out"
                + (", or add feature_distill to the method" if captions and not keeps else "")
            )
        if captions:
            reading.setdefault("captions", COLUMN)
        if "replay" in reading:
            reading["replay"] = str(Path(str(reading["replay"])).expanduser().resolve())
        return reading
    if idle := [name for name in reading if _READING.get(name) != asks]:
        raise ValueError(
            f"--{idle[0]} {reading[idle[0]]} has no effect with {objective}, which learns {asks}: leave it out"
        )
    if asks == "captions":
        reading.setdefault("captions", COLUMN)
    if "images" in reading:
        reading["images"] = str(Path(str(reading["images"])).expanduser().resolve())
    return reading


def source_of(photos: Path, task: Task, skip_bad: bool) -> LessonSource:
    """What is written down of a lesson on the data at `photos`."""
    return {
        "folder": str(photos.resolve()),
        "skip_bad": skip_bad,
        "train_sha256": digest_of(task.train),
        "content": _content(task),
        "skipped": skipped_of(task),
    }


def given_source(
    learner: Abilities, given: Any, task: Task, options: Mapping[str, Any], reading: Mapping[str, Any]
) -> LessonSource | None:
    """The same of a lesson that is given in Python; None where it is no path, but the images themselves."""
    if not isinstance(given, str | Path):
        return None
    read = settled({name: value for name, value in reading.items() if isinstance(value, str)}, learner)
    trained = {name: value for name, value in options.items() if value is not None}
    source: LessonSource = {**source_of(Path(given), task, False), "options": trained, **read}  # type: ignore[typeddict-item]
    return source


def sources_facts(sources: Mapping[int, LessonSource], tasks: Sequence[Task]) -> dict[str, Any]:
    """What the manifest of `tasks`, learnt since the one before, says of where they came from."""
    known = {task.name: sources[task.index] for task in tasks if task.index in sources}
    last = known.pop(tasks[-1].name, None)
    return ({"earlier": known} if known else {}) | ({"source": last} if last else {})


def _content(task: Task) -> str:
    """Of the bytes of the images to learn, with their classes or captions, in whatever order and under any name."""
    data = task.train
    if isinstance(data, ConversationSet):
        return digest(sorted(data.described(content=True)))
    if not isinstance(data, ImageSet):
        return ""
    names = dict(zip(task.classes, task.names, strict=True))
    if isinstance(data, Captioned):
        said = ["\n".join(each) for each in _even(data.texts)]
    else:
        said = [names.get(label, "") for label in data.labels.tolist()]
    return digest(sorted(f"{image} {text}" for image, text in zip(data.hashes().tolist(), said, strict=True)))


def digest_of(data: Data) -> str:
    """Of which images there are, in their order, and of what is said of them."""
    if isinstance(data, ConversationSet):
        return digest(data.described())
    if not isinstance(data, ImageSet):
        return ""
    keys = [data.source.key(row) for row in data.rows.tolist()]
    return digest([*keys, *chain.from_iterable(_even(data.texts))] if isinstance(data, Captioned) else keys)


def _even(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """As many texts for each image, empty ones where there are no more: as hashes were taken ever since."""
    most = max(map(len, texts), default=0)
    return [[*each, *[""] * (most - len(each))] for each in texts]


def skipped_of(task: Task) -> list[str]:
    """Which images of a task could not be read, and were left out."""
    return [where for data in (task.train, task.test) for where in getattr(data, "skipped", ())]


def _next(into: Path, done: Sequence[Checkpoint]) -> Path:
    """Folder of the task that comes next."""
    return into / f"task-{done[-1].learnt if done else 0:03d}"


def unfinished(into: Path, done: Sequence[Checkpoint]) -> LessonSource | None:
    """The source of a lesson that has been begun and is not whole."""
    path = _next(into, done) / _SOURCE
    if not path.is_file():
        return None
    remedy = f"restore it, or remove {path.parent} to give this task up"
    return found_now(schema.read_typed(path, LessonSource, remedy, "format" in read_record(into)), into)


def nothing_learnt(folder: Path) -> ValueError:
    """What to raise where a folder has no whole task, with the command that goes on there."""
    begun = read_record(folder)["config"].get("stream") or unfinished(folder, ()) is not None
    call = command("resume", folder) if begun else command("learn", "FOLDER", "--into", folder)
    return ValueError(f"{folder} has no learnt task yet: go on with {call}")


def found_now(source: LessonSource, into: Path) -> LessonSource:
    """`source` with its paths as they are after what `perdure move` has written down of the folder `into`."""
    now: dict[str, Any] = dict(source)
    for move in recorded_moves(into):
        now |= {name: relocated(now[name], move) for name in _PATHS if now.get(name)}
    return now  # type: ignore[return-value]


def paths_of(source: LessonSource) -> list[str]:
    """The files and folders that a lesson came from."""
    return [str(path) for name in _PATHS if (path := source.get(name))]


def lesson_paths(into: Path) -> list[str]:
    """The files and folders that the learner in a folder was taught from, and those of a lesson that is unfinished."""
    done = checkpoint.whole(into)
    sources = [found_now(source, into) for source in checkpoint.sources(done).values()]
    begun = unfinished(into, done)
    return [path for source in [*sources, *([begun] if begun else [])] for path in paths_of(source)]


def give_up(into: Path) -> None:
    """Forget a lesson that was begun in a folder and is not finished; what was learnt before stays."""
    with checkpoint.locked(into):
        if (into / "run.json").exists():
            shutil.rmtree(_next(into, checkpoint.whole(into)), ignore_errors=True)


def refuse_other_task(into: Path, done: Sequence[Checkpoint], source: LessonSource) -> None:
    """What was stopped within a task goes on with the same images and options only."""
    begun = unfinished(into, done)
    if begun is None or checkpoint.latest_step(into, done) is None:
        return
    before, now = dict(begun), dict(source)
    if changed := [key for key in before if key != "seal" and before[key] != now.get(key)]:
        raise ValueError(
            f"{into} was stopped while it learnt {begun['folder']}, and now the {_WORDS.get(changed[0], changed[0])} "
            f"differ: give the same to finish that, or remove {_next(into, done)} to give it up"
        )


def taught_last(done: Sequence[Checkpoint], source: LessonSource, task: Task) -> bool:
    """Whether the last task was learnt from what `task` has, and nothing of it was forgotten.

    Raises:
        ValueError: when it was, with other options, which would have no effect now.
    """
    last = done[-1].manifest.get("source") if done else None
    if not last or not source["content"] or last.get("content") != source["content"]:
        return False
    kept = {*done[-1].tasks[-1].names}
    if not kept if isinstance(task.train, Captioned | ConversationSet) else kept != {*task.names}:
        return False  # the name of a topic is made anew for each task
    if any(last.get(name) != source.get(name) for name in ("pretext", "replay")):
        return False
    before, now = last.get("options", {}), source.get("options", {})
    if changed := [key for key in now if now[key] != before.get(key)]:
        raise ValueError(
            f"{source['folder']} is what was taught last, and --{changed[0].replace('_', '-')} {now[changed[0]]} would "
            f"have no effect now: remove {done[-1].folder} to teach it anew"
        )
    return True


def place_source(into: Path, index: int, source: LessonSource) -> None:
    """Write down what is learnt next, before it is."""
    begun = into / f"task-{index:03d}"
    begun.mkdir(exist_ok=True)
    checkpoint.write_sealed(begun / _SOURCE, source)
