"""The commands that use what was learnt: predict, search, eval, export; and that change it: forget, move, resize.

What they compute with is imported when they are called: their help waits for no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perdure.cli.console import Command, Screen
from perdure.cli.inputs import opened_and_told, shown_images, tell_seen, tell_unread
from perdure.cli.tables import routing_lines
from perdure.formatting import command, shortened
from perdure.options.ranges import Count, Range
from perdure.storage.schema import SPECIALISTS

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
        if not self.images:
            raise ValueError(f"no image given: write {command('predict', self.learner, 'cat.jpg')}")
        learner = opened_and_told(self.learner, self.device, screen)
        how = {"classes": self.classes or None, "calibrated": self.calibrated, "task": self.task}
        tell_unread(learner, self.classes, screen)
        tell_seen(learner, self.images, self.top, self.skip_bad, screen, **how)


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
        from perdure.backbones.preprocess import skippable

        learner = opened_and_told(self.learner, self.device, screen)
        learner.check_sees("search")
        tell_unread(learner, [self.text], screen)
        files, shown = shown_images([self.folder], learner, self.skip_bad, screen)
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
    """What to measure on; when left out its own: the run's stream, or the test images of folders it was taught."""
    retain: tuple[str, ...] = ()
    """Held-out data to measure instead: evaluation sets and streams of questions, or a CLIP's zero-shot accuracy."""
    task: str | None = None
    """Name of the task that all of it belongs to, where it is known; without --stream, that task alone is measured."""

    def __call__(self, screen: Screen) -> None:
        """Print the score per task, or per held-out data set."""
        from perdure.api.learner import Learner
        from perdure.api.measuring import evaluate, remarks_on
        from perdure.evaluation.answer_retention import answered, share_or_points
        from perdure.evaluation.held_out import held_out_of
        from perdure.evaluation.zero_shot_retention import ZERO_SHOT

        screen.wait("evaluating")
        say = screen.warn if self.json else screen.note
        if (self.learner / SPECIALISTS).is_file():
            self._routing(screen)
            return
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
            for remark in remarks_on(stream.notes):
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

    def _routing(self, screen: Screen) -> None:
        from perdure.api.routing_scores import measure_routing

        for name, value in (("task", self.task), ("retain", self.retain or None)):
            if value is not None:
                raise ValueError(f"--{name} has no effect on specialists: measure one of them by itself")
        team = opened_and_told(self.learner, self.device, screen)
        table: Any = measure_routing(team, self.stream, screen)  # type: ignore[arg-type]
        screen.result({"event": "routing", **table}, *routing_lines(table))


@dataclass(frozen=True, kw_only=True)
class Export(LearnerCommand):
    """Write a learner for other libraries."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    out: Path
    """Folder to write; it must not exist yet."""
    to: Literal["peft", "merged", "transformers", "onnx", "torch"] = "merged"
    """peft: a LoRA that Hugging Face PEFT loads; merged: weights that transformers or timm load; or transformers; onnx,
    or torch for torch.export: images to scores as one graph."""

    def __call__(self, screen: Screen) -> None:
        """Export and print the path."""
        from perdure.api.learner import Learner
        from perdure.export.model import export
        from perdure.reporting.contents import licence_of

        screen.wait("writing")
        learner = Learner.load(self.learner, self.device)
        path = export(learner, self.out, self.to)
        licence = licence_of(learner.config.backbone)
        said = {"export": str(path), "to": self.to, "licence": licence}
        screen.result(said, f"written: {path}", *([f"licence: {licence}"] if licence else []))


@dataclass(frozen=True, kw_only=True)
class Push(LearnerCommand):
    """Export a learner with a model card, to a repository of the hub or to a folder."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPOSITORY")]
    """NAME/MODEL on the hub, or a new folder such as ./model."""
    to: Literal["peft", "merged", "transformers", "onnx", "torch"] = "merged"
    """What is written, as of export."""
    public: bool = False
    """Let all see a repository that is made now."""

    def __call__(self, screen: Screen) -> None:
        """Export, upload, print where it is."""
        from perdure.api.pushing import push

        screen.wait("writing")
        where = push(self.learner, self.repository, self.to, self.public, self.device)
        screen.result({"event": "pushed", "to": where}, f"pushed: {where}")


@dataclass(frozen=True, kw_only=True)
class Forget(LearnerCommand):
    """Never answer a class again, and remove what the folder holds of it: its head's row, statistics, references."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """The learner's folder; copy it first to keep it as it is."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLASS")]
    """Name of the class, as 'perdure show' has it."""

    def __call__(self, screen: Screen) -> None:
        """Forget it, write the report anew, say what is left."""
        from perdure.api.forgetting import forget_in
        from perdure.reporting.report import write_report

        screen.wait("reading the model")
        left = list(forget_in(self.learner, self.name, self.device).class_names)
        write_report([self.learner], self.learner / "report.html")
        screen.result(
            {"event": "forgotten", "class": self.name, "classes": left},
            f"forgot {shortened(self.name)}; {len(left)} class{'es are' if len(left) > 1 else ' is'} left. What its "
            "images did to weights that classes share remains",
        )


@dataclass(frozen=True, kw_only=True)
class Move(Command):
    """Say where something now lies that a learner or a run was made with: its backbone, its data."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A learner's or a run's folder."""
    change: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHANGE")]
    """OLD=NEW, where it was and where it is, such as /old/photos=/new/photos: a file, or a folder of several."""

    def __call__(self, screen: Screen) -> None:
        """Check that it is the same, write it down, print what leads where."""
        from perdure.api.moving import move

        screen.wait("comparing")
        found = move(self.folder, self.change, screen.warn)
        for old, new in found:
            screen.result({"event": "moved", "from": old, "to": new}, f"{old} -> {new}")


@dataclass(frozen=True, kw_only=True)
class Resize(Command):
    """Let a learner read larger images, longer texts or longer conversations from now on; what it knows stays."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A learner's or a run's folder; copy it first to keep it as it is."""
    size: Count | None = None
    """Side of images in pixels, a multiple of the patch; with that of the model, as it was published."""
    length: Count | None = None
    """Of texts, or of conversations with a language model, in tokens."""
    positions: Literal["interpolate", "stretch"] | None = None
    """With --length: how positions of texts become more."""
    rope: Literal["linear", "ntk", "yarn"] | None = None
    """Of a language model: how rotary positions make room, with --factor."""
    factor: Annotated[float, Range(1, 1024)] | None = None
    """With --rope: for how many times as many tokens."""

    def __call__(self, screen: Screen) -> None:
        """Check that it loads, write it down, print the backbone."""
        from perdure.api.resizing import resize

        screen.wait("reading the model")
        options = {name: getattr(self, name) for name in ("size", "length", "positions", "rope", "factor")}
        backbone = resize(self.folder, **options)
        screen.result({"event": "resized", "backbone": backbone}, f"{self.folder} now stands on {backbone}")
