"""`perdure combine`: finished learners behind one face, or merged into one.

What it computes with is imported when it is called: its help waits for no torch.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from perdure.cli.console import Screen
from perdure.cli.tables import routing_lines
from perdure.cli.use import LearnerCommand
from perdure.options.ranges import Count, Range, Seed, without_effect


@dataclass(frozen=True, kw_only=True)
class Combine(LearnerCommand):
    """Put finished learners behind one face, which sends each question to one of them; or merge them into one."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDERS")]
    """Learners' or runs' folders, two or more, of any methods and backbones."""
    into: Path
    """Folder to write; it must hold no learner yet."""
    route: Literal["gaussian", "nearest", "subspace", "text", "linucb", "uniform"] | None = None
    """Who answers: by class statistics (gaussian unless said otherwise), texts, rewards (linucb), or all (uniform)."""
    gate: str | None = None
    """The frozen model that looks at each image; the first member's that sees when left out."""
    pool_bytes: str | None = None
    """Most that statistics and examples of what members were taught may take; 20MB unless said otherwise."""
    per_class: Count | None = None
    """Training images of a class that are looked at; 50 unless said otherwise."""
    merge: str | None = None
    """One learner instead, of members with one backbone: ties, average, arithmetic or dare, with options in quotes."""
    weights: tuple[Annotated[float, Range(0, 1e6)], ...] = ()
    """With --merge: of each member; all count alike when left out."""
    seed: Seed = 0
    """Of the images that are looked at, and of what dare drops."""

    def __call__(self, screen: Screen) -> None:
        """Combine, measure, print the table."""
        if self.merge is not None:
            idle = {"route": self.route, "gate": self.gate, "pool_bytes": self.pool_bytes, "per_class": self.per_class}
            without_effect("with --merge, which leaves one learner", **idle)
            self._merge(screen)
            return
        without_effect("without --merge", weights=self.weights or None)
        from perdure.api.combine import combine
        from perdure.api.routing_scores import measure_routing

        screen.wait("looking at what members were taught")
        how = {"pool_bytes": self.pool_bytes, "per_class": self.per_class, "route": self.route}
        given: dict[str, Any] = {name: value for name, value in how.items() if value is not None}
        team = combine(
            self.folders, self.into, gate=self.gate, seed=self.seed, device=self.device, progress=screen, **given
        )
        for name, why in team.missing.items():
            screen.warn(f"{name} is left out: {why}")
        screen.wait("evaluating")
        try:
            table = measure_routing(team, None, screen)
        except ValueError as error:  # members may have no tests, and still answer
            screen.note(f"not measured: {error}")
        else:
            screen.result({"event": "routing", **table}, *routing_lines(table))
        into = shlex.quote(str(self.into))
        members = [facts["name"] for facts in team.record["members"]]
        content = {"event": "combined", "folder": str(self.into), "members": members, "route": team.record["route"]}
        screen.result(content, f"combined {', '.join(members)}; ask them with: perdure predict {into} IMAGE")

    def _merge(self, screen: Screen) -> None:
        from perdure.api.combine import open_all
        from perdure.api.merge import merge, write_merged

        assert self.merge is not None
        screen.wait("merging")
        learners = open_all(self.folders, self.device)
        made = merge(learners, self.merge, self.weights or None, self.seed)
        write_merged(made, self.into)
        content = {"event": "merged", "folder": str(self.into), "members": list(learners), "merge": self.merge}
        into = shlex.quote(str(self.into))
        screen.result(content, f"merged {', '.join(learners)}; ask it with: perdure predict {into} IMAGE")
