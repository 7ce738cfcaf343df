"""The command that says what a folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from perdure.cli.console import Command, Screen
from perdure.storage.schema import SPECIALISTS


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """What a learner was taught, when, how well it knows it, and what of the data its folder holds."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder, or that of specialists."""

    config: bool = False
    """Print how the run was configured instead, as a file for --config."""

    def __call__(self, screen: Screen) -> None:
        """Print it."""
        if self.config:
            from perdure.cli.config_file import written
            from perdure.core.manifests import read_record

            made = dict(read_record(self.learner)["config"])
            screen.result(made, *written(made).splitlines())
            return
        if (self.learner / SPECIALISTS).is_file():
            from perdure.reporting.specialists import team_contents, told_team

            team = team_contents(self.learner)
            screen.result(team, *told_team(self.learner, team))
            return
        from perdure.reporting.contents import contents, told_contents

        found = contents(self.learner)
        screen.result(found, *told_contents(self.learner, found))
