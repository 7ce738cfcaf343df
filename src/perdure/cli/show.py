"""The command that says what a folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from perdure.cli.console import Command, Screen


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """What a learner was taught, when, how well it knows it, and what of the data its folder holds."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")]
    """A learner's or a run's folder."""

    def __call__(self, screen: Screen) -> None:
        """Print it."""
        from perdure.reporting.contents import contents, told_contents

        found = contents(self.learner)
        screen.result(found, *told_contents(self.learner, found))
