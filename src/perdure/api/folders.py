"""Lessons: the learner of a folder is taught one folder of images after another, and none is lost."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from perdure.api.given import check_first
from perdure.api.learner import OPEN, Learner
from perdure.api.lesson_source import (
    digest_of,
    found_now,
    place_source,
    reading_of,
    refuse_other_task,
    settled,
    source_of,
    taught_last,
    unfinished,
)
from perdure.backbones.preprocess import skippable
from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint, read_record
from perdure.core.forgetting import only_classes
from perdure.formatting import command, shortened
from perdure.options.paths import anchored, refuse_same_folder
from perdure.options.spec import parse
from perdure.process import as_found, plain
from perdure.storage.schema import LessonSource
from perdure.streams import Captioned, captioned_task, conversation_task, folder_task
from perdure.streams.conversation_stream import holds_conversations
from perdure.streams.single_task import free_name
from perdure.streams.unlabelled import unlabelled_task
from perdure.training.building import unread_names
from perdure.training.config import RunConfig, make_stream, said_of
from perdure.training.defaults import usual
from perdure.training.loop import Diverged, Progress, TrainConfig, told_by
from perdure.training.record import elsewhere, write_record
from perdure.training.run import nothing_learnt_nothing_left, resume
from perdure.training.snapshots import Interrupted
from perdure.training.tasks import learn_stream
from perdure.types import Stream, Task, class_ids

_SPECS = ("backbone", "method", "objective")
_FIXED = (*_SPECS, "seed", "precision", "attention", "calibrate")


@plain()
def teach_folder(
    photos: str | Path,
    into: str | Path,
    config: RunConfig,
    given: Mapping[str, Any],
    progress: Progress | None = None,
    skip_bad: bool = False,
    **reading: str | None,
) -> tuple[Task, dict[str, Any]]:
    """Teach the learner in folder `into` one more task; it is made when it is not there.

    Like a run, it is saved within the task and goes on where it was stopped when it is called again. Tasks learnt from
    folders that are still there are evaluated again, and their examples can be replayed.

    Args:
        photos: folder of class folders; for a learner of captions a parquet or JSONL file, or a folder of them; for one
            that answers in words a file of conversations.
        into: the learner's folder.
        config: for a new learner.
        given: what of `config` the user asked for; it must agree with a learner that is already there.
        progress: who is told.
        skip_bad: leave unreadable images out and report them.
        reading: for a learner of captions, their column as `captions`; for one that answers in words, the folder of
            images as `images`, and how answers are scored as `score`. With `pretext` it is a step of pre-training on
            images without labels, with old ones of the folder `replay` mixed in.

    What was taught last is not taught once more: of a command that was killed after the task was saved, what is left
    to do is done.

    Raises:
        ValueError: for a folder that cannot be learnt from, options that would have no effect, or a damaged learner.
        Interrupted: after SIGINT or SIGTERM.
    """
    photos, into = Path(photos), Path(into)
    progress = told_by(progress)
    refuse_same_folder(into, photos, *(Path(each) for each in [reading.get("replay")] if each))
    with checkpoint.locked(into):
        done = checkpoint.whole(into)  # which also ends what a killed process has begun to write there
        there = (into / "run.json").exists()
        learner = _known_or_new(into, photos, config, given)
        asks, reading = min(learner.objective.asks), settled(reading, learner)
        pretext = reading.get("pretext")
        trained = {k: v for k, v in given.items() if k in {f.name for f in dataclasses.fields(TrainConfig)}}
        rate = {"schedule": "warmup-cosine"} if pretext else {}
        train = learner.usual_training().but(**rate | trained)
        before = tasks_with_data(learner, into, done, progress.note)
        known = class_ids(before)
        with skippable("--skip-bad"):
            task = _read(photos, learner, known, len(before), skip_bad, reading, progress.note)
        # what was begun keeps the name it had, which versions without numbers gave
        begun_as = checkpoint.latest_step(into, done)
        name = begun_as.tasks[-1].name if begun_as else free_name(task.name, [each.name for each in before])
        task = dataclasses.replace(task, name=name)
        if not pretext:
            check_first(learner, task, known, str(photos))
            task = learner.objective.planned(task)
        train = learner.long_enough(train, task, "epochs" in given)
        source: LessonSource = {**source_of(photos, task, skip_bad), "options": trained, **reading}  # type: ignore[typeddict-item]
        if asks != "classes" and not pretext:
            _tell_overlap(before, task, progress)
        for line in unread_names(learner, [task]):
            progress.note(line)
        refuse_other_task(into, done, source)
        if taught_last(done, source, task):
            progress.note(
                f"{photos} is what {into} was taught last, as task {done[-1].learnt}: nothing is learnt twice, results "
                f"and summary are brought up to date; to teach it anew, remove {done[-1].folder} first"
            )
            return before[-1], _finish(learner, before, into, progress)
        if (begun := unfinished(into, done)) and begun.get("content") != source["content"]:
            progress.note(f"{begun['folder']}, begun before, is given up: nothing was learnt of it yet")
        if not there:
            for line in said_of(config if given.get("lr") else dataclasses.replace(config, lr=None)):
                progress.note(line)
            write_record(into, learner.record())
        place_source(into, len(before), source)
        stream = Stream(OPEN, learner.scenario, (*before, task))
        facts = {"source": source} | (elsewhere(into, learner.runtime, progress) if there else {})
        again = command("pretrain" if pretext else "learn", photos, "--into", into)
        with _ending(into, done, again, train), skippable("--skip-bad"), as_found(learner.runtime.threads):
            return task, learn_stream(train, learner, stream, into, progress, learner.config.save_every, facts)


@contextmanager
def _ending(into: Path, done: Sequence[Checkpoint], again: str, train: TrainConfig) -> Iterator[None]:
    """A lesson that stops says which command goes on, and one of which nothing can come leaves nothing behind."""
    begun = into / f"task-{done[-1].learnt if done else 0:03d}"
    try:
        with nothing_learnt_nothing_left(into):
            yield
    except Interrupted as stop:
        raise Interrupted(f"{str(stop).partition(';')[0]}; go on with {again} and the same options") from stop
    except Diverged as error:
        shutil.rmtree(begun, ignore_errors=True)  # of no use to go on from
        raise ValueError(f"{error}: teach it again with a lower --lr than {train.peak:g}") from error
    except ValueError:
        if len(checkpoint.whole(into)) == len(done) and checkpoint.latest_step(into, done) is None:
            shutil.rmtree(begun, ignore_errors=True)  # refused: nothing was begun
        raise


def _known_or_new(into: Path, photos: Path, config: RunConfig, given: Mapping[str, Any]) -> Learner:
    """The learner of the folder `into` as it was before its first task; one of `config` where there is none yet."""
    if (into / "run.json").exists():
        learner = Learner.untaught(into, given.get("device"))
        refuse_without_effect(into, learner.config, given)
        return learner
    if not usual(config.backbone) and holds_conversations(photos):
        raise ValueError(
            f"{photos} holds conversations, and {config.backbone} cannot answer in words: give --backbone "
            "'mllm(path=...)'"
        )
    return Learner.of(dataclasses.replace(config, stream=OPEN))


def go_on(folder: str | Path, progress: Progress | None = None, device: str | None = None) -> dict[str, Any]:
    """Finish what was stopped or killed in a folder: a run's tasks, or a learner's last lesson; returns the summary.

    Raises:
        ValueError: when `folder` is neither's, something in it is damaged, or a learner has nothing to go on with.
        Interrupted: after SIGINT or SIGTERM.
    """
    folder = Path(folder)
    written, done = read_record(folder), checkpoint.whole(folder)
    begun = unfinished(folder, done)
    if begun is not None:
        given = {**begun.get("options", {}), **({"device": device} if device else {})}
        config = RunConfig(stream=OPEN)  # what counts is the folder's own
        return teach_folder(
            Path(begun["folder"]), folder, config, given, progress, begun["skip_bad"], **reading_of(begun)
        )[1]
    if written["config"].get("stream"):
        return resume(folder, progress, device)
    if not done:
        raise ValueError(f"{folder} was taught nothing yet: go on with {command('learn', 'FOLDER', '--into', folder)}")
    progress = told_by(progress)
    with checkpoint.locked(folder):
        learner = Learner.untaught(folder, device)
        return _finish(learner, tasks_with_data(learner, folder, done, progress.note), folder, progress)


def taught_tasks(learner: Learner, folder: Path, tell: Callable[[str], None]) -> list[Task]:
    """The tasks that a learner was taught from folders, with the test images that are still at hand.

    Args:
        learner: as loaded from `folder`.
        folder: its own.
        tell: is told of tasks that have no test images any more, or never had.

    Raises:
        ValueError: when there is no test image at all.
    """
    told: list[str] = []
    tasks = tasks_with_data(learner, folder, checkpoint.whole(folder), told.append)
    kept = [task for task in tasks if len(task.test)]
    if not kept:
        raise ValueError(f"no test image of {folder} is at hand any more: say what to measure on with --stream")
    for line in told:
        tell(line)
    if without := [task.name for task in tasks if not (len(task.test) or task.pretext)]:
        tell(f"without test images, and not measured: {', '.join(map(shortened, without))}")
    return kept


def _finish(learner: Learner, tasks: Sequence[Task], into: Path, progress: Progress) -> dict[str, Any]:
    """What `learn_stream` does once all is learnt."""
    return learn_stream(learner.usual_training(), learner, Stream(OPEN, learner.scenario, tuple(tasks)), into, progress)


def tasks_with_data(
    learner: Learner, folder: Path, done: Sequence[Checkpoint], note: Callable[[str], None]
) -> list[Task]:
    """The tasks already learnt, with their data where it is still at hand."""
    if not done:
        return []
    declared: tuple[Task, ...] = ()
    if learner.config.stream != OPEN:
        declared = make_stream(learner.config, learner.backbone.preprocess).tasks
        if done[-1].learnt < len(declared):
            raise ValueError(
                f"{folder} has learnt {done[-1].learnt} of its stream's {len(declared)} tasks: finish it with "
                f"{command('resume', folder)} before it learns more"
            )
    sources = checkpoint.sources(done)
    tasks: list[Task] = []
    for described in done[-1].tasks:
        task = declared[described.index] if described.index < len(declared) else described
        task = dataclasses.replace(task, score=described.score)  # what it was measured by
        if (source := sources.get(described.index)) and not described.pretext:
            known = class_ids(tasks)
            source = found_now(source, folder)
            task = _again(source, described, learner, known)
            if not len(task.train):
                note(
                    f"{source['folder']} is gone or has changed since it was learnt (task {described.number}): it "
                    "is not evaluated again, and its images cannot be replayed"
                )
        tasks.append(task if task == described else described)
    return tasks


def _again(source: LessonSource, described: Task, learner: Learner, known: Mapping[str, int]) -> Task:
    """A task with its data, read again; without when that is not what was learnt."""
    folder = Path(source["folder"])
    if not folder.exists():
        return described
    own = class_ids([described]) if "classes" in learner.objective.asks else {}
    try:
        place = folder, learner, {**known, **own}, described.index, source["skip_bad"]
        task = dataclasses.replace(_read(*place, reading_of(source), again=True), score=described.score)
    except ValueError:  # no folder of classes any more
        return described
    if own == class_ids([task]):
        # The folder may be called otherwise now, and versions differ in how they sort classes
        task = dataclasses.replace(described, train=task.train, test=task.test)
    elif own and own.items() <= class_ids([task]).items():
        # Some were forgotten; in the training set they stay: a memory refers to images by their position.
        task = dataclasses.replace(described, train=task.train, test=only_classes(task.test, described.classes))
    return task if task == described and digest_of(task.train) == source["train_sha256"] else described


def _read(
    photos: Path,
    learner: Learner,
    known: Mapping[str, int],
    index: int,
    skip_bad: bool,
    reading: Mapping[str, str | None],
    tell: Callable[[str], None] = lambda _: None,
    again: bool = False,
) -> Task:
    if pretext := reading.get("pretext"):
        of = photos, learner.backbone.preprocess, index, pretext, reading.get("captions"), reading.get("replay")
        return unlabelled_task(*of, skip_bad, learner.seed, tell)
    if "classes" in learner.objective.asks:
        place = photos, learner.backbone.preprocess, known, index, skip_bad, learner.seed
        return folder_task(*place, tell, None if again else "learn")
    if "conversations" in learner.objective.asks:
        images, score = reading.get("images"), reading.get("score") or ""
        return conversation_task(photos, known, index, images, score, skip_bad, tell)
    return captioned_task(photos, learner.backbone.preprocess, known, index, reading["captions"], skip_bad, tell)


def refuse_without_effect(into: Path, config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raise a ValueError where `given` asks for another learner than the one of `config` in the folder `into`."""
    for name, value in given.items():
        made = getattr(config, name)
        if name in _FIXED and value != made and (name not in _SPECS or parse(anchored(value)) != parse(made)):
            raise ValueError(
                f"{into} was made with {name}={made!r}; {value!r} would have no effect: leave it out, or teach a new "
                "learner"
            )


def _tell_overlap(before: Sequence[Task], task: Task, progress: Progress) -> None:
    """Say when what is to be learnt was a test so far."""
    tests = torch.cat([t.test.pairs for t in before if hasattr(t.test, "pairs")] or [torch.empty(0)])
    if count := int(torch.isin(getattr(task.train, "pairs", torch.empty(0)), tests).sum()):
        shows = any(each.images for each in getattr(task.train, "records", ()))
        asked = f"conversations to learn {'show test images' if shows else 'are tests'}"
        what = "images to learn are test images" if isinstance(task.train, Captioned) else asked
        progress.note(f"{count} {what} of earlier tasks, whose scores are no fair test any more")
