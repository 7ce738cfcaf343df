"""`perdure tune`: apart from the other commands, with what a search is told and tells."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perdure.cli.console import Command, Screen
from perdure.formatting import counted, settings
from perdure.options.ranges import Range, Seed
from perdure.options.search_space import parse_space
from perdure.training.config import RunConfig

_MOST = 10  # trials shown


@dataclass(frozen=True, kw_only=True)
class Tune(RunConfig, Command):
    """Search for the best options of a method, on a class order that is not reported."""

    space: str
    """What is searched: 'rank=4..32, lr=1e-4..1e-2 log, blocks=["0-4", None]'. Settings by their name (lr, epochs);
    an option of a method where it says so: --method 'inflora(rank=?, blocks=?)'."""
    trials: Annotated[int, Range(1, 10**5)] = 40
    """How many, those that were given up included."""
    order_seed: Seed = 100
    """Seed and class order of the trials."""
    report_seeds: tuple[Seed, ...] = (0, 1, 2)
    """Class orders on which you will report: the one above must not be among them."""
    seed: Annotated[Seed, tyro.conf.Suppress] = 0
    shard: Annotated[Literal["none", "blocks"], tyro.conf.Suppress] = "none"
    out: Path
    """Folder of the study; with the same options a search in it goes on."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with values for the flags; those that are typed win."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Search, print the best trials, what mattered, and the command to report with."""
        from perdure.backbones.preprocess import skippable
        from perdure.experiments.tune import tune

        space = parse_space(self.space)
        given = {field.name: getattr(self, field.name) for field in fields(RunConfig)} | {"seed": self.order_seed}
        screen.wait("reading the data and the model")
        with skippable("skip_bad=True in the stream"):
            found = tune(
                RunConfig(**given),
                space,
                self.out,
                trials=self.trials,
                report_seeds=self.report_seeds,
                progress=screen,
            )
        screen.result({"event": "tuned", **found}, *search_lines(found))


def search_lines(found: Mapping[str, Any]) -> list[str]:
    """A finished search for people, line by line."""
    rows = found["trials"]
    pruned, failed = found["pruned"], len(found["failed"])
    lines = [f"{counted(len(rows), 'trial')} finished, {pruned} given up early, {failed} could not be run"]
    lines += [f"  {100 * row['score']:5.1f} %  {settings(row['options'])}" for row in rows[:_MOST]]
    if found["importance"]:
        shares = ", ".join(f"{name} {100 * value:.0f} %" for name, value in found["importance"].items())
        lines.append(f"what mattered among the finished: {shares}")
    return [*lines, f"report it with: {found['command']}"]
