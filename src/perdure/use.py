"""The commands that use what was learnt: predict, search, eval, export.

What they compute with is imported when they are called: their help waits for no torch.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from perdure.command import Command
from perdure.console import Screen
from perdure.ranges import Count
from perdure.wording import shortened

if TYPE_CHECKING:
    from perdure.teach import Learner
    from perdure.types import Batch, Data, Row, Task


@dataclass(frozen=True, kw_only=True)
class Asking(Command):
    """What all commands have that ask a learner."""

    device: str | None = None
    """Where to compute, such as cpu; where the learner was made when left out."""


@dataclass(frozen=True, kw_only=True)
class Predict(Asking):
    """What a learner sees in images."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Image files, or folders of them."""
    top: Count = 3
    """How many names per image."""
    classes: tuple[str, ...] = ()
    """Any words to choose among, instead of what was learnt: --classes "a cat" "a dog"; needs a CLIP."""

    def __call__(self, screen: Screen) -> None:
        """Print labels with scores."""
        from perdure.teach import Learner

        if not self.images:
            raise ValueError(f"no image given: write 'perdure predict {self.learner} cat.jpg'")
        learner = Learner.load(self.learner, self.device)
        files = [file for path in self.images for file in images_in(path)]
        screen.wait("looking")
        found = learner.predict(files, top=self.top, classes=self.classes or None)
        for file, answer in zip(files, found, strict=True):
            line = "  ".join(f"{shortened(name)} {share:.1%}" for name, share in answer)
            screen.result(
                {"image": str(file), "labels": [{"name": n, "score": s} for n, s in answer]}, f"{file}  {line}"
            )


@dataclass(frozen=True, kw_only=True)
class Search(Asking):
    """The images of a folder that fit a text best, in any language that the model knows."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """Folder of a learner or a run on a CLIP-like backbone."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What is looked for, in quotes: "a red car"."""
    top: Count = 5
    """How many images."""

    def __call__(self, screen: Screen) -> None:
        """Print files with cosines, best first."""
        from perdure.teach import Learner

        learner = Learner.load(self.learner, self.device)
        files = images_in(self.folder)
        screen.wait("looking")
        for place, cosine in learner.search(files, self.text, self.top):
            screen.result({"image": str(files[place]), "cosine": cosine}, f"{cosine:+.3f}  {files[place]}")


@dataclass(frozen=True, kw_only=True)
class Eval(Asking):
    """Measure a learner on all tasks of a stream: its own run's, or another one with the same class names."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    stream: str | None = None
    """What to measure on; the run's own stream when left out."""
    retain: tuple[str, ...] = ()
    """Held-out streams, on which its zero-shot accuracy is measured instead; needs a CLIP."""

    def __call__(self, screen: Screen) -> None:
        """Print the score per task, or per held-out data set."""
        from perdure.retention import METRIC, Retention
        from perdure.teach import Learner

        screen.wait("evaluating")
        if not self.retain:
            screen.measured(*measure(self.learner, self.stream, self.device))
            return
        if self.stream is not None:
            raise ValueError("--stream has no effect beside --retain: measure one after the other")
        learner = Learner.load(self.learner, self.device)
        for row in Retention(self.retain, learner).measure(learner, learner.learnt - 1):
            name = row.metric.removeprefix(f"{METRIC}/")
            screen.result({"zero_shot": name, "accuracy": row.value}, f"zero-shot on {name}: {row.value:.1%}")


@dataclass(frozen=True, kw_only=True)
class Export(Asking):
    """Write a learner for other libraries."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    out: Path
    """Folder to write; it must not exist yet."""
    to: Literal["peft", "merged"] = "merged"
    """peft: a LoRA that Hugging Face PEFT loads; merged: weights that transformers or timm load."""

    def __call__(self, screen: Screen) -> None:
        """Export and print the path."""
        from perdure.export import export
        from perdure.teach import Learner

        screen.wait("writing")
        path = export(Learner.load(self.learner, self.device), self.out, self.to)
        screen.result({"export": str(path), "to": self.to}, f"written: {path}")


def measure(folder: Path, stream: str | None, device: str | None = None) -> "tuple[list[Task], list[Row]]":
    """The tasks of a stream, and a learner's accuracy on them; classes are matched by name.

    Raises:
        ValueError: when a class of the stream is not among those that were learnt.
    """
    from perdure.process import plain

    with plain():
        return _measured(folder, stream, device)


def _measured(folder: Path, stream: str | None, device: str | None) -> "tuple[list[Task], list[Row]]":
    from perdure.streams import build_stream
    from perdure.teach import Learner
    from perdure.types import Row

    learner = Learner.load(folder, device)
    described = stream if stream is not None else learner.config.stream
    if not described:
        raise ValueError(f"{folder} was taught from folders: say what to measure on with --stream")
    declared = build_stream(described, learner.backbone.preprocess, learner.config.seed).tasks
    tasks = list(declared if stream is not None else declared[: learner.learnt])
    if learner.objective.classifies:
        tasks = [_named_alike(task, learner, f"{described}: class", folder) for task in tasks]
    found = learner.objective.evaluate(learner, tasks)
    rows = [
        Row(learner.learnt - 1, t.index, k, v) for t, each in zip(tasks, found, strict=True) for k, v in each.items()
    ]
    return tasks, rows


def _named_alike(task: "Task", learner: "Learner", what: str, folder: Path) -> "Task":
    """The task with the learner's ids of its classes."""
    if unknown := [name for name in task.names if name not in learner.known]:
        near = difflib.get_close_matches(unknown[0], learner.known, n=1)
        raise ValueError(
            f"{what} {unknown[0]!r} of task {task.index} is not among what {folder} has learnt"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    ids = {c: learner.known[name] for c, name in zip(task.classes, task.names, strict=True)}
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


def images_in(path: Path) -> list[Path]:
    """The image files in a folder and below, or the file itself."""
    if path.is_dir():
        endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
        found = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in endings)
        if not found:
            raise ValueError(f"{path} has no image; give files, or a folder with {', '.join(sorted(endings))}")
        return found
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give an image file or a folder of images")
    return [path]
