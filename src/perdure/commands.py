"""The commands: one frozen dataclass each, whose fields are the flags and whose docstrings are the help."""

import difflib
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perdure.ask import Advise
from perdure.backbones import BACKBONES
from perdure.command import Command
from perdure.compare import cells, compare
from perdure.config import RunConfig, register
from perdure.console import Screen
from perdure.images import skippable
from perdure.lessons import teach_folder
from perdure.method import METHODS
from perdure.recipes import DEMO_METHODS, RECIPES, demo, flags
from perdure.report import write_report
from perdure.run import read_record, read_summary, resume, run
from perdure.streams import STREAMS
from perdure.use import Eval, Export, Move, Predict, Search, tell_skipped, told


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Sequential LoRA and InfLoRA on coloured shapes, offline, in minutes."""

    out: Path = Path("runs/demo")
    """Folder of the two runs and the report."""

    def __call__(self, screen: Screen) -> None:
        """Compare the two methods and write the report."""
        config = demo()
        screen.note(f"{config.stream} on {config.backbone}: {' beside '.join(DEMO_METHODS)}")
        _grid(config, DEMO_METHODS, (0,), self.out, screen, demo=True)


@dataclass(frozen=True, kw_only=True)
class Run(RunConfig, Command):
    """Learn a stream with one method."""

    recipe: str | None = None
    """Name from `perdure list recipes`: its options, unless they are given here too."""
    out: Path
    """Folder of the run; it must not hold one yet."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Run, report."""
        config = RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})
        if self.recipe:
            screen.note(f"recipe {self.recipe}: {shlex.join(flags(config))}")
        screen.wait("reading the data and the model")
        with skippable("skip_bad=True in the stream"):
            summary = run(config, self.out, screen)
        _finished(self.out, summary, screen)


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    """Go on with a run that was stopped or killed, with the same result as if it never was."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The run's folder."""

    def __call__(self, screen: Screen) -> None:
        """Resume, report."""
        screen.wait("reading the data and the model")
        with skippable("skip_bad=True in the stream of a new run"):
            summary = resume(self.folder, screen)
        _finished(self.folder, summary, screen)


@dataclass(frozen=True, kw_only=True)
class Learn(Command):
    """Teach a learner one more task, from a folder whose sub-folders are the classes, or from images with captions."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of class folders, or with train/ and test/ in it; with --objective retrieve a parquet or JSONL file of
    images and captions, or a folder of them."""
    into: Path
    """The learner's folder; a new one is made with the options below."""
    backbone: str | None = None
    """For a new learner; pocket() unless said otherwise."""
    method: str | None = None
    """For a new learner; inflora(rank=10) unless said otherwise."""
    objective: str | None = None
    """For a new learner; classify() unless said otherwise."""
    epochs: int | None = None
    """Passes over the images; 5 unless said otherwise, and more over few images, for at least 60 steps."""
    lr: float | None = None
    """Learning rate; 1e-3 unless said otherwise."""
    batch_size: int | None = None
    """Images per step; 64 unless said otherwise."""
    seed: int | None = None
    """For a new learner; 0 unless said otherwise."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """For a new learner; auto unless said otherwise."""
    skip_bad: bool = False
    """Leave unreadable images out, and list them."""
    captions: str | None = None
    """Column of the captions, for a learner of captions; captions unless said otherwise."""

    def __call__(self, screen: Screen) -> None:
        """Learn, say what is known now."""
        screen.wait("reading the data and the model")
        names = [f.name for f in fields(RunConfig) if hasattr(self, f.name)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        config = RunConfig(stream="", **given)
        task, summary = teach_folder(self.folder, self.into, config, given, screen, self.skip_bad, self.captions)
        skipped = [where for data in (task.train, task.test) for where in getattr(data, "skipped", ())]
        tell_skipped(skipped, screen.note)
        write_report([self.into], self.into / "report.html")
        into = shlex.quote(str(self.into))
        ask = f"predict {into} IMAGE" if summary["score"] == "accuracy" else f"search {into} FOLDER 'words'"
        screen.result(
            {"event": "learnt", "task": task.describe(), "summary": summary, "skipped": skipped},
            f"learnt {', '.join(task.names)}; ask it with: perdure {ask}",
        )


@dataclass(frozen=True, kw_only=True)
class Compare(RunConfig, Command):
    """Methods side by side over several seeds (class orders): scores, bytes and step cost in a table, plots."""

    methods: tuple[str, ...]
    """Methods, each in quotes."""
    method: Annotated[str, tyro.conf.Suppress] = field(default="")
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run a method for each; unless the stream fixes it, a seed is also a class order."""
    seed: Annotated[int, tyro.conf.Suppress] = field(default=0)
    out: Path
    """Folder of the grid; finished runs in it are not repeated."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Run the grid, print the table, write the report."""
        names = [f.name for f in fields(RunConfig) if f.name not in ("method", "seed")]
        config = RunConfig(**{n: getattr(self, n) for n in names})
        _grid(config, self.methods, self.seeds, self.out, screen)


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write report.html for one or several runs."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDERS")]
    """Runs' folders, or a grid's."""
    out: Path | None = None
    """The file; report.html in the first folder when left out."""

    def __call__(self, screen: Screen) -> None:
        """Write and print the path."""
        inner = [run for folder in self.folders for run in _runs_in(folder)]
        path = write_report(inner, self.out or self.folders[0] / "report.html")
        screen.result({"report": str(path)}, f"report: {path}")


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """What there is: methods, streams, backbones, recipes."""

    what: tyro.conf.Positional[Literal["methods", "streams", "backbones", "recipes"]]
    """Which."""
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """One of them, with all that is written about it."""

    def __call__(self, screen: Screen) -> None:
        """Print names, options and what they are."""
        register()
        tables: dict[str, Mapping[str, Callable[..., Any]]] = {
            "methods": METHODS,
            "streams": STREAMS,
            "backbones": BACKBONES,
            "recipes": RECIPES,
        }
        found = tables[self.what]
        if self.name is None:
            screen.listing([(name, _options(made), _sentence(made)) for name, made in sorted(found.items())])
            return
        if self.name not in found:
            near = difflib.get_close_matches(self.name, found, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"'perdure list {self.what}' names them"
            raise ValueError(f"{self.name!r} is not among the {self.what}; {meant}")
        made = found[self.name]
        about = inspect.cleandoc(made.__doc__ or "")
        if inspect.isclass(made):
            about = f"{inspect.cleandoc(sys.modules[made.__module__].__doc__ or '')}\n\n{about}"
        text = f"{self.name}({_options(made)})\n\n{about}" if _options(made) else f"{self.name}\n\n{about}"
        screen.result({"name": self.name, "options": _options(made), "about": about}, text)


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "run": Run,
    "resume": Resume,
    "learn": Learn,
    "predict": Predict,
    "search": Search,
    "compare": Compare,
    "advise": Advise,
    "eval": Eval,
    "report": Report,
    "export": Export,
    "move": Move,
    "list": List,
}


def _grid(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], out: Path, screen: Screen, demo: bool = False
) -> None:
    grid = cells(methods, seeds, out)
    with skippable("skip_bad=True in the stream"):
        table = compare(config, grid, out, screen, steps=not demo)
    if demo:
        for cell in grid:
            names = [t["name"] for t in read_record(cell.folder)["stream"]["tasks"]]
            screen.matrix(read_summary(cell.folder), names, cell.method)
    screen.table(table)
    _tell_notes([read_record(cell.folder) for cell in grid], screen)
    path = write_report([cell.folder for cell in grid], out / "report.html")
    screen.result({"event": "report", "path": str(path)}, f"report: {path}")


def _finished(out: Path, summary: dict[str, Any], screen: Screen) -> None:
    record = read_record(out)
    _tell_notes([record], screen)
    screen.matrix(summary, [t["name"] for t in record["stream"]["tasks"]], record["config"]["method"])
    path = write_report([out], out / "report.html")
    screen.result({"event": "done", "summary": summary, "report": str(path)}, f"report: {path}")


def _tell_notes(records: Sequence[dict[str, Any]], screen: Screen) -> None:
    """Say, once, what runs left out of their data."""
    for line in dict.fromkeys(line for record in records for line in told(record["stream"])):
        screen.note(line)
    tell_skipped(records[0]["stream"].get("skipped", []), screen.note)


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "run.json").exists():
        return [folder]
    inner = sorted(p.parent for p in folder.glob("*/run.json"))
    if not inner:
        raise ValueError(f"{folder} is neither a run's nor a grid's folder: it has no run.json")
    return inner


def _options(made: Callable[..., Any]) -> str:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = [p for p in inspect.signature(made).parameters.values() if p.kind in named]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in options)


def _sentence(made: Callable[..., Any]) -> str:
    text = inspect.cleandoc((sys.modules[made.__module__].__doc__ if inspect.isclass(made) else made.__doc__) or "")
    return " ".join(text.partition("\n\n")[0].split())
