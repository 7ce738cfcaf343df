"""The commands: one frozen dataclass each, whose fields are the flags and whose docstrings are the help.

What a command computes with is imported when it is called: help, lists and mistakes wait for no torch.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import tyro

from perdure.cli.advise import Advise
from perdure.cli.app import App
from perdure.cli.ask import Ask, Chat
from perdure.cli.catalogue import Listed, entries
from perdure.cli.combine import Combine
from perdure.cli.console import Command, Screen
from perdure.cli.inputs import tell_learnt, tell_skipped
from perdure.cli.pretrain import Pretrain
from perdure.cli.report import Report
from perdure.cli.reward import Reward
from perdure.cli.show import Show
from perdure.cli.tune import Tune
from perdure.cli.use import Eval, Export, Forget, Move, Predict, Push, Resize, Search
from perdure.experiments.cluster import Cluster
from perdure.experiments.recipes import DEMO_METHODS, demo, recipe
from perdure.formatting import Aside, meant, shortened
from perdure.options.ranges import BatchSize, Epochs, Range, Rate, Seed
from perdure.training.config import RunConfig, flags
from perdure.training.defaults import for_lessons

Processes = Annotated[int, Range(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Sequential LoRA and InfLoRA on coloured shapes, offline, in minutes."""

    out: Path = Path("runs/demo")
    """Folder of the two runs and the report."""

    def __call__(self, screen: Screen) -> None:
        """Compare the two methods and write the report."""
        config = demo()
        screen.note(Aside(f"{config.stream} on {config.backbone}: {' beside '.join(DEMO_METHODS)}"))
        _grid(config, DEMO_METHODS, (0,), self.out, screen, demo=True)


@dataclass(frozen=True, kw_only=True)
class Run(RunConfig, Command):
    """Learn a stream with one method."""

    recipe: str | None = None
    """Name from `perdure list recipes`: its options, unless they are given here too."""
    out: Path
    """Folder of the run; it must not hold one yet."""
    track: str = ""
    """Experiment trackers to tell, such as tensorboard, wandb or mlflow, with commas between."""
    processes: Processes = 1
    """Processes on this machine that learn together, such as one for each GPU; the result does not depend on it."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with values for the flags; those that are typed win."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Run, report."""
        config = RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
        if self.recipe:
            screen.note(Aside(f"recipe {self.recipe}: {shlex.join(flags(config.describe()))}"))
        tracked_by = ["--track", self.track] if self.track else []
        if _launches(self.processes, ["run", *flags(config.describe()), *tracked_by], ["--out"], self.out, screen):
            return
        screen.wait("reading the data and the model")
        from perdure.backbones.preprocess import skippable
        from perdure.reporting.tracking import tracked
        from perdure.training.run import run
        from perdure.training.runtime import joined

        with (
            joined(config.device) as processes,
            skippable("skip_bad=True in the stream"),
            tracked(screen, self.track if processes.first else "", self.out) as progress,
        ):
            summary = run(config, self.out, progress)
        if processes.first:
            _finished(self.out, summary, screen, told=True)


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    """Go on with a run or a lesson that was stopped or killed, with the same result as if it never was."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The run's or the learner's folder."""
    device: str | None = None
    """Another one than the run began on, such as cpu; the result is then no longer the same to the bit."""
    processes: Processes = 1
    """Processes that learn together, see `perdure run`; of another number than before they give other last digits."""

    def __call__(self, screen: Screen) -> None:
        """Resume, report."""
        there = ["--device", self.device] if self.device else []
        if _launches(self.processes, ["resume", *there], [], self.folder, screen):
            return
        from perdure.api.folders import go_on
        from perdure.backbones.preprocess import skippable
        from perdure.reporting.tracking import tracked
        from perdure.training.runtime import joined

        screen.wait("reading the data and the model")
        with (
            joined(self.device or "auto") as processes,
            skippable("skip_bad=True in the stream of a new run"),
            tracked(screen, "", self.folder) if processes.first else nullcontext(screen) as progress,
        ):
            tell_learnt(self.folder, screen)
            summary = go_on(self.folder, progress, self.device)
        if processes.first:
            _finished(self.folder, summary, screen)


@dataclass(frozen=True, kw_only=True)
class Learn(Command):
    """Teach a learner one more task, from a folder of class folders, from images with captions, or conversations."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of class folders, or with train/ and test/ in it; with --objective retrieve a parquet or JSONL file of
    images and captions, or a folder of them; for a language model a JSON, JSONL, parquet or CSV file of questions."""
    into: Path
    """The learner's folder; a new one is made with the options below."""
    backbone: str | None = None
    """For a new learner; pocket() unless said otherwise."""
    method: str | None = None
    """For a new learner; probe + align unless said otherwise, LoRA of rank 16 for a language model."""
    objective: str | None = None
    """For a new learner; classify() unless said otherwise, generate() for a language model."""
    epochs: Epochs | None = None
    """Passes over the images; 5 unless said otherwise, and more over few images, for at least 60 steps."""
    lr: Rate | None = None
    """Learning rate; the method's own unless said otherwise, see `perdure list methods`, 2e-4 for a language model."""
    batch_size: BatchSize | None = None
    """Examples per step; 64 unless said otherwise, 16 for a language model."""
    seed: Seed | None = None
    """For a new learner; 0 unless said otherwise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """For a new learner; auto unless said otherwise."""
    calibrate: Annotated[float, Range(0, 0.5)] | None = None
    """For a new learner: share of each class's images set apart, for predict --calibrated; 0 unless said otherwise."""
    device: str | None = None
    """The learner's own unless said otherwise; auto for a new one."""
    skip_bad: bool = False
    """Leave unreadable images out, and list them."""
    captions: str | None = None
    """Column of the captions, for a learner of captions; captions unless said otherwise."""
    images: str | None = None
    """Folder that images in a file of questions are relative to; the file's own unless said otherwise."""
    score: str | None = None
    """How answers are scored: exact, vqa, choice, contains, anls, cider, ...; exact unless said otherwise."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with values for the flags; those that are typed win."""

    def __call__(self, screen: Screen) -> None:
        """Learn, say what is known now."""
        from perdure.api.folders import teach_folder
        from perdure.api.lesson_source import skipped_of
        from perdure.core.checkpoint import read_record
        from perdure.core.manifests import check_single
        from perdure.options.spec import parse_one
        from perdure.reporting.report import write_report

        check_single(self.into)
        screen.wait("reading the data and the model")
        given = {f.name: getattr(self, f.name) for f in fields(RunConfig) if getattr(self, f.name, None) is not None}
        config = RunConfig(stream="", **for_lessons(self.backbone or RunConfig.backbone, self.objective) | given)
        reading = {n: getattr(self, n) for n in ("captions", "images", "score")}
        tell_learnt(self.into, screen)
        task, summary = teach_folder(self.folder, self.into, config, given, screen, self.skip_bad, **reading)
        tell_skipped(skipped := skipped_of(task), screen.note)
        if why := summary.get("unlike_scores"):
            screen.note(f"no means over tasks are given: {why}")
        write_report([self.into], self.into / "report.html")
        into = shlex.quote(str(self.into))
        asks = {"retrieve": f"search {into} FOLDER 'words'", "generate": f"ask {into} IMAGE 'question'"}
        ask = asks.get(parse_one(str(read_record(self.into)["config"]["objective"])).name, f"predict {into} IMAGE")
        screen.result(
            {"event": "learnt", "task": task.describe(), "summary": summary, "skipped": skipped},
            f"learnt {', '.join(map(shortened, task.names))}; ask it with: perdure {ask}",
        )


@dataclass(frozen=True, kw_only=True)
class Compare(RunConfig, Command):
    """Methods side by side over several seeds (class orders): scores, bytes and step cost in a table, plots."""

    methods: tuple[str, ...]
    """Methods, each in quotes."""
    method: Annotated[str, tyro.conf.Suppress] = field(default="")
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """One run a method for each; unless the stream fixes it, a seed is also a class order."""
    seed: Annotated[Seed, tyro.conf.Suppress] = field(default=0)
    shard: Annotated[Literal["none", "blocks"], tyro.conf.Suppress] = field(default="none")
    out: Path
    """Folder of the grid; finished runs in it are not repeated."""
    track: str = ""
    """Experiment trackers to tell of each run, such as tensorboard, wandb or mlflow, with commas between."""
    jobs: Annotated[int, Range(1, 1024)] = 1
    """Runs at a time on this machine."""
    on: str = ""
    """A Ray cluster to run on: ray for the one that this machine belongs to, or an address as ray://head:10001."""
    cpus_per_cell: Annotated[int, Range(1, 4096)] = 1
    """With --jobs or --on: threads of each run."""
    gpus_per_cell: Annotated[float, Range(0, 1024)] = 0.0
    """With --jobs or --on: GPUs of each run; a half lets two share one."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with values for the flags; those that are typed win."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Run the grid, print the table, write the report."""
        names = [f.name for f in fields(RunConfig) if f.name not in ("method", "seed")]
        config = RunConfig(**{n: getattr(self, n) for n in names})
        cluster = Cluster(self.on, self.jobs, self.cpus_per_cell, self.gpus_per_cell)
        _grid(config, self.methods, self.seeds, self.out, screen, track=self.track, cluster=cluster)


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """What there is: methods, streams, backbones, pretexts, recipes."""

    what: tyro.conf.Positional[Listed]
    """Which."""
    # Not `str | None`: to look at such a default, tyro imports a package that takes a seventh of the time of a list.
    name: Annotated[Optional[str], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None  # noqa: UP045
    """One of them, with all that is written about it."""

    def __call__(self, screen: Screen) -> None:
        """Print names, options and what they are."""
        found = entries(self.what)
        if self.name is None:
            screen.listing([(name, each.options, each.sentence, each.lr) for name, each in sorted(found.items())])
            return
        if self.what == "recipes":
            recipe(self.name)  # tells of those that are gone
        if self.name not in found:
            near = meant(self.name.partition("(")[0], found) or f"; 'perdure list {self.what}' names them"
            raise ValueError(f"{self.name!r} is not among the {self.what}{near}")
        entry = found[self.name]
        head = f"{self.name}({entry.options})" if entry.options else self.name
        lines = [head, *(f"  {name}: {values}" for name, values in entry.facts.items()), ""]
        screen.result({"name": self.name, **asdict(entry)}, *lines, *entry.about.splitlines())


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "run": Run,
    "resume": Resume,
    "learn": Learn,
    "pretrain": Pretrain,
    "predict": Predict,
    "search": Search,
    "ask": Ask,
    "chat": Chat,
    "app": App,
    "compare": Compare,
    "tune": Tune,
    "advise": Advise,
    "eval": Eval,
    "show": Show,
    "forget": Forget,
    "combine": Combine,
    "reward": Reward,
    "report": Report,
    "export": Export,
    "push": Push,
    "move": Move,
    "resize": Resize,
    "list": List,
}


def _grid(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    screen: Screen,
    demo: bool = False,
    track: str = "",
    cluster: Cluster | None = None,
) -> None:
    from perdure.backbones.preprocess import skippable
    from perdure.experiments.grid import cells, compare
    from perdure.experiments.study import tuned_on
    from perdure.reporting.report import write_report
    from perdure.reporting.runs import RunResults

    grid = cells(methods, seeds, out)
    if warning := tuned_on(out, seeds):
        screen.note(warning)
    with skippable("skip_bad=True in the stream"):
        table = compare(config, grid, out, screen, steps=not demo, track=track, cluster=cluster)
    runs = [RunResults.read(cell.folder) for cell in grid]
    for made in runs if demo else ():
        screen.matrix(dict(made.summary), made.names(), made.method)
    screen.table(table)
    _tell_notes([made.facts for made in runs], screen)
    path = write_report([cell.folder for cell in grid], out / "report.html")
    screen.result({"event": "report", "path": str(path)}, f"report: {path}")


def _launches(processes: int, words: Sequence[str], before: Sequence[str], out: Path, screen: Screen) -> bool:
    """Whether so many processes are to be started for a command, which then were, and have ended.

    Args:
        processes: how many were asked for; where a launcher has started this one, they are there.
        words: of the command line, to which those `before` the folder and the folder itself are added.
        before: see `words`.
        out: the folder.
        screen: of the command.

    Raises:
        ValueError: where a launcher has started another number of them.
    """
    there = int(os.environ.get("WORLD_SIZE", 1))
    if there > 1 and processes not in (1, there):
        raise ValueError(f"--processes {processes} within a launcher that has started {there}: leave it out")
    if processes == 1 or there > 1:
        return False
    from perdure.training.launch import launch

    said = [f"--{each}" for each in ("json", "quiet", "verbose") if getattr(screen, each)]
    launch(processes, [*words, *said, *before, str(out)], out)
    return True


def _finished(out: Path, summary: dict[str, Any], screen: Screen, told: bool = False) -> None:
    from perdure.reporting.report import write_report
    from perdure.reporting.runs import RunResults

    found = RunResults.read(out)
    _tell_notes([found.facts], screen, told)
    screen.matrix(summary, found.names(), found.method)
    path = write_report([out], out / "report.html")
    screen.result({"event": "done", "summary": summary, "report": str(path)}, f"report: {path}")


def _tell_notes(records: Sequence[Mapping[str, Any]], screen: Screen, told: bool = False) -> None:
    """Say, once, what runs left out of their data, and remarks on it unless they were `told` when they began."""
    from perdure.api.measuring import remarks_on

    notes = [{**record["stream"], **({"remarks": []} if told else {})} for record in records]
    for line in dict.fromkeys(line for each in notes for line in remarks_on(each)):
        screen.note(line)
    tell_skipped(records[0]["stream"].get("skipped", []), screen.note)
