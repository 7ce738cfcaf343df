"""The commands that use what was learnt: predict, search, eval, export, and move.

What they compute with is imported when they are called: their help waits for no torch.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from perdure.cli.console import Command, Screen
from perdure.formatting import meant, shortened
from perdure.options.ranges import Count

if TYPE_CHECKING:
    from torch import Tensor

    from perdure.api.learner import Learner
    from perdure.streams import ImageSet
    from perdure.types import Batch, Data, Row, Task


_SURE = {"calibration_error": "of scores as they are", "calibration_error_calibrated": "of calibrated ones"}


@dataclass(frozen=True, kw_only=True)
class LearnerCommand(Command):
    """What all commands have that ask a learner."""

    device: str | None = None
    """Where to compute, such as cpu; where the learner was made when left out."""


@dataclass(frozen=True, kw_only=True)
class Predict(LearnerCommand):
    """What a learner sees in images."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Image files, or folders of them."""
    top: Count = 3
    """How many names per image."""
    classes: tuple[str, ...] = ()
    """Any words to choose among, instead of what was learnt: --classes "a cat" "a dog"; needs a CLIP."""
    calibrated: bool = False
    """Scores as how often such an answer is right; for a learner made with --calibrate. Others only rank."""
    task: str | None = None
    """Name of the task that the images belong to, where it is known: its classes alone are answered."""
    skip_bad: bool = False
    """Leave unreadable images out, and list them."""

    def __call__(self, screen: Screen) -> None:
        """Print labels with scores."""
        from perdure.api.learner import Learner

        if not self.images:
            raise ValueError(f"no image given: write 'perdure predict {self.learner} cat.jpg'")
        from perdure.backbones.preprocess import skippable

        learner = Learner.load(self.learner, self.device)
        learner.check_sees("predict")
        files, shown = _shown(self.images, learner, self.skip_bad, screen)
        with skippable("--skip-bad"):
            found = learner.predict(
                shown, self.top, classes=self.classes or None, calibrated=self.calibrated, task=self.task
            )
        for file, answer in zip(files, found, strict=True):
            line = "  ".join(f"{shortened(name)} {share:.1%}" for name, share in answer)
            screen.result(
                {"image": str(file), "labels": [{"name": n, "score": s} for n, s in answer]}, f"{file}  {line}"
            )


@dataclass(frozen=True, kw_only=True)
class Search(LearnerCommand):
    """The images of a folder that fit a text best, in any language that the model knows."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """Folder of a learner or a run on a CLIP-like backbone."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What is looked for, in quotes: "a red car"."""
    top: Count = 5
    """How many images."""
    task: str | None = None
    """Name of the task that images and text belong to, where it is known and the method follows it."""
    skip_bad: bool = False
    """Leave unreadable images out, and list them."""

    def __call__(self, screen: Screen) -> None:
        """Print files with cosines, best first."""
        from perdure.api.learner import Learner
        from perdure.backbones.preprocess import skippable

        learner = Learner.load(self.learner, self.device)
        learner.check_sees("search")
        files, shown = _shown([self.folder], learner, self.skip_bad, screen)
        with skippable("--skip-bad"):
            found = learner.search(shown, self.text, self.top, task=self.task)
        for place, cosine in found:
            screen.result({"image": str(files[place]), "cosine": cosine}, f"{cosine:+.3f}  {files[place]}")


@dataclass(frozen=True, kw_only=True)
class Eval(LearnerCommand):
    """Measure a learner on all tasks of a stream: its own run's, or another one with the same class names."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    stream: str | None = None
    """What to measure on; the run's own stream when left out."""
    retain: tuple[str, ...] = ()
    """Held-out data to measure instead: evaluation sets and streams of questions, or a CLIP's zero-shot accuracy."""
    task: str | None = None
    """Name of the task that all of it belongs to, where it is known; without --stream, that task alone is measured."""

    def __call__(self, screen: Screen) -> None:
        """Print the score per task, or per held-out data set."""
        from perdure.api.learner import Learner
        from perdure.evaluation.answer_retention import answered, share_or_points
        from perdure.evaluation.held_out import held_out_of
        from perdure.evaluation.zero_shot_retention import ZERO_SHOT

        screen.wait("evaluating")
        say = screen.warn if self.json else screen.note
        if not self.retain:
            tasks, rows, remarks = evaluate(self.learner, self.stream, self.device, self.task)
            for line in remarks:
                say(line)
            screen.measured(tasks, rows)
            if said := [f"{row.value:.1%} {_SURE[row.metric]}" for row in rows if row.metric in _SURE]:
                say(f"expected calibration error (15 bins): {', '.join(said)}")
            return
        for name, value in (("stream", self.stream), ("task", self.task)):
            if value is not None:
                raise ValueError(f"--{name} has no effect beside --retain: measure one after the other")
        learner = Learner.load(self.learner, self.device)
        held_out = held_out_of(self.retain, learner, measured=True)
        for name, stream in held_out.sets.items():
            what = "images" if stream.gives == "classes" else "questions"
            say(f"{name}: {sum(len(task.test) for task in stream)} {what} are measured")
            for remark in told(stream.notes):
                say(f"{name}: {remark}")
        rows = held_out.measure(learner, learner.learnt - 1)
        for row in rows:
            kind, _, name = row.metric.partition("/")
            if kind == ZERO_SHOT:
                screen.result({"zero_shot": name, "accuracy": row.value}, f"zero-shot on {name}: {row.value:.1%}")
        for name, numbers in answered(rows).items():
            values = {number: facts["after"][-1] for number, facts in numbers.items()}
            shown = [f"{number} {share_or_points(number, value)}" for number, value in values.items()]
            screen.result({"answers": name, **values}, f"{name}: {', '.join(shown)}")


@dataclass(frozen=True, kw_only=True)
class Export(LearnerCommand):
    """Write a learner for other libraries."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    out: Path
    """Folder to write; it must not exist yet."""
    to: Literal["peft", "merged", "transformers"] = "merged"
    """peft: a LoRA that Hugging Face PEFT loads; merged: weights that transformers or timm load; or transformers."""

    def __call__(self, screen: Screen) -> None:
        """Export and print the path."""
        from perdure.api.learner import Learner
        from perdure.export.model import export

        screen.wait("writing")
        path = export(Learner.load(self.learner, self.device), self.out, self.to)
        screen.result({"export": str(path), "to": self.to}, f"written: {path}")


@dataclass(frozen=True, kw_only=True)
class Move(Command):
    """Say where something now lies that a learner or a run was made with: its backbone, its data."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A learner's or a run's folder."""
    change: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHANGE")]
    """OLD=NEW, where it was and where it is, such as /old/photos=/new/photos: a file, or a folder of several."""

    def __call__(self, screen: Screen) -> None:
        """Check that it is the same, write it down, print what leads where."""
        screen.wait("comparing")
        found = move(self.folder, self.change)
        for old, new in found:
            screen.result({"event": "moved", "from": old, "to": new}, f"{old} -> {new}")


def move(folder: Path, change: str) -> list[tuple[str, str]]:
    """Put paths right that a learner's record holds; returns those that changed, as they were and as they are.

    Raises:
        ValueError: when nothing recorded was there, nothing is there now, or the backbone there is another one.
    """
    from perdure.core import checkpoint
    from perdure.core.checkpoint import read_record
    from perdure.options.paths import moved, paths_in, relocated
    from perdure.training.config import make_backbone
    from perdure.training.record import recorded_config, recorded_moves, write_moves

    written = read_record(folder)
    old, equals, new = change.partition("=")
    if not (old and equals and new):
        raise ValueError(f"{change!r}: expected OLD=NEW, such as /old/photos=/new/photos")
    if not Path(new).expanduser().exists():
        raise ValueError(f"{new!r} does not exist: give the place where it is now")
    step = (str(Path(old).expanduser().absolute()), str(Path(new).expanduser().absolute()))
    config = recorded_config(folder, written)
    texts = (config.stream, config.backbone, config.method, *config.retain)
    lessons = [each.manifest["source"] for each in checkpoint.whole(folder) if "source" in each.manifest]
    sources = [path for each in lessons for path in (each["folder"], each.get("images")) if path]
    moves = recorded_moves(folder)
    known = [path for text in texts for path in paths_in(text)]
    for path in sources:
        for earlier in moves:
            path = relocated(path, earlier)
        known.append(path)
    changed = {path: relocated(path, step) for path in known if relocated(path, step) != path}
    if not changed:
        there = ", ".join(dict.fromkeys(path for path in known if Path(path).is_absolute())) or "no path"
        raise ValueError(f"{folder} was made with nothing in {step[0]}; what it was made with: {there}")
    backbone = moved(config.backbone, [step])
    if backbone != config.backbone and make_backbone(backbone).fingerprint() != written["backbone"]["fingerprint"]:
        raise ValueError(
            f"{backbone} is another model than {folder} was made with: give the one whose weights it needs"
        )
    write_moves(folder, [*moves, step])
    return list(changed.items())


def evaluate(
    folder: Path, stream: str | None, device: str | None = None, task: str | None = None
) -> "tuple[list[Task], list[Row], list[str]]":
    """The tasks of a stream, a learner's accuracy on them, and what to know about it; classes are matched by name.

    All images of a stream that is given are measured: its test part where it has one, else all of it, without those
    that the learner was taught. With `task` answers are given within the learnt task of that name.

    Raises:
        ValueError: when a class of the stream is not among those that were learnt, or all images were taught.
    """
    from perdure.process import plain

    with plain():
        return _measured(folder, stream, device, task)


def _measured(
    folder: Path, stream: str | None, device: str | None, told_task: str | None
) -> "tuple[list[Task], list[Row], list[str]]":
    from perdure.api.given import known_task, within
    from perdure.api.learner import Learner
    from perdure.backbones.preprocess import skippable
    from perdure.evaluation.calibration import errors
    from perdure.evaluation.with_task import measured
    from perdure.streams import build_stream
    from perdure.training.run import check_gives
    from perdure.training.summary import scored_by, taught_hashes
    from perdure.types import Row

    learner = Learner.load(folder, device)
    described = stream if stream is not None else learner.config.stream
    if not described:
        raise ValueError(f"{folder} was taught from folders: say what to measure on with --stream")
    preprocess, seed = learner.backbone.preprocess, learner.config.seed
    found = build_stream(described, preprocess, seed, measured=stream is not None)
    check_gives(found, learner, described)
    tasks = list(found.tasks if stream is not None else found.tasks[: learner.learnt])
    known_as = known_task(learner, told_task)
    if known_as is not None and stream is None:
        tasks = [tasks[known_as.index]]
    remarks = told(found.notes)
    if stream is not None:
        known, unknown = taught_hashes(folder)
        tasks, count = _unseen(tasks, known, f"{described}: all", folder)
        images = sum(len(task.test) for task in tasks)
        things = "questions" if "conversations" in learner.objective.asks else "images"
        if unknown:
            remarks.append(
                f"which images {len(unknown)} of {learner.learnt} tasks were taught is not known: they count"
            )
        apart = f"; {count} more were taught to this learner and are left out" if count else ""
        remarks.append(f"{images} {things} are measured{apart}")
    if "classes" in learner.objective.asks:
        tasks = [_named_alike(task, learner, f"{described}: class", folder) for task in tasks]
    if "conversations" in learner.objective.asks:  # by which score, for who wants means
        scores = scored_by(learner.config.describe(), [task.score for task in tasks])
        tasks = [dataclasses.replace(task, score=score) for task, score in zip(tasks, scores, strict=True)]
    if known_as is not None:
        tasks = within(known_as, learner, tasks)
    with skippable("skip_bad=True in the stream"):
        # of its own tasks the number says which they are
        found_on = (measured if stream is None and known_as is None else learner.objective.evaluate)(learner, tasks)
    rows = [
        Row(learner.learnt - 1, t.index, k, v) for t, each in zip(tasks, found_on, strict=True) for k, v in each.items()
    ]
    return tasks, rows + (errors(learner, tasks) if "classes" in learner.objective.asks else []), remarks


def told(notes: Mapping[str, Any]) -> list[str]:
    """What a stream's notes say to who uses it, line by line."""
    from perdure.streams.folders import told_left_out

    left_out = notes.get("left_out")
    return [*([told_left_out(left_out)] if left_out else []), *notes.get("remarks", ())]


def _unseen(tasks: "Sequence[Task]", known: "Tensor", what: str, folder: Path) -> "tuple[list[Task], int]":
    """The tasks without the images whose hashes are known, and how many these were."""
    from perdure.streams import ConversationSet, ImageSet

    kept, count = [], 0
    for task in tasks:
        if isinstance(task.test, ImageSet | ConversationSet) and len(known):
            seen = task.test.shows(known)
            count += int(seen.sum())
            task = dataclasses.replace(task, test=task.test.subset((~seen).nonzero().flatten()))
        if len(task.test):
            kept.append(task)
    if not kept:
        raise ValueError(f"{what} {count} images were taught to {folder}: measure on others")
    return kept, count


def _named_alike(task: "Task", learner: "Learner", what: str, folder: Path) -> "Task":
    """The task with the learner's ids of its classes."""
    from perdure.streams.naming import recorded

    names = recorded(task.names, learner.known)
    if unknown := [name for name in names if name not in learner.known]:
        near = meant(unknown[0], learner.known)
        raise ValueError(f"{what} {unknown[0]!r} of task {task.index} is not among what {folder} has learnt{near}")
    ids = {c: learner.known[name] for c, name in zip(task.classes, names, strict=True)}
    return dataclasses.replace(task, classes=tuple(ids.values()), test=_Renumbered(task.test, ids))


class _Renumbered:
    """Data whose class ids are those of a learner."""

    def __init__(self, data: "Data", ids: Mapping[int, int]) -> None:
        import torch

        self.data = data
        self.labels = torch.tensor([ids[c] for c in data.labels.tolist()], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, positions: Sequence[int]) -> "Batch":
        return self.data.__getitems__(positions) | {"label": self.labels[list(positions)]}


def _shown(paths: Sequence[Path], learner: "Learner", skip_bad: bool, screen: Screen) -> "tuple[list[Path], ImageSet]":
    """The image files in `paths`, and themselves; unreadable ones are told and left out when that is asked for."""
    from perdure.streams import ImageSet
    from perdure.streams.folders import told_left_out

    left_out: Counter[str] = Counter()
    files = [file for path in paths for file in images_in(path, left_out)]
    if left_out:
        screen.warn(told_left_out(left_out))
    screen.wait("looking")
    shown = ImageSet.of(files, [0] * len(files), learner.backbone.preprocess)
    if skip_bad:
        shown = shown.readable()
        tell_skipped(shown.skipped, screen.warn)
    return [files[row] for row in shown.rows.tolist()], shown


def tell_skipped(skipped: Sequence[str], tell: Callable[[str], None]) -> None:
    """Say which images could not be read."""
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        images = "image was" if len(skipped) == 1 else "images were"
        tell(f"{len(skipped)} unreadable {images} left out: {', '.join(skipped[:5])}{more}")


def images_in(path: Path, left_out: Counter[str]) -> list[Path]:
    """The image files in a folder and below, those that would be learnt, or the file itself; counts the others."""
    from perdure.streams.folders import pictures, told_left_out

    if path.is_dir():
        found = [path / file for file in pictures(path, left_out)]
        if not found:
            others = f"; {told_left_out(left_out)}" if left_out else ""
            raise ValueError(f"{path} has no image{others}; give image files, or a folder of some")
        return found
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give an image file or a folder of images")
    return [path]
