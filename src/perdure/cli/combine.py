"""`perdure combine`: finished learners behind one face, or merged or distilled into one.

What it computes with is imported when it is called: its help waits for no torch.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from perdure.cli.console import Screen
from perdure.cli.inputs import images_in
from perdure.cli.tables import routing_lines
from perdure.cli.use import LearnerCommand
from perdure.options.ranges import Count, Epochs, Range, Rate, Seed, without_effect

if TYPE_CHECKING:
    from perdure.api.learner import Learner
    from perdure.api.specialists import Specialists


@dataclass(frozen=True, kw_only=True)
class Combine(LearnerCommand):
    """Put finished learners behind one face, which sends each question to one of them; or make one of them."""

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
    distil: str | None = None
    """One learner instead, taught by the members: its method, such as 'lora(rank=16)'; on the pool's images."""
    images: tuple[Path, ...] = ()
    """With --distil: images without labels, or folders of them, to distil on instead."""
    epochs: Epochs | None = None
    """With --distil: passes over the images; 5 unless said otherwise, and more over few, for at least 60 steps."""
    lr: Rate | None = None
    """With --distil: the learning rate; the student's own unless said otherwise."""
    seed: Seed | None = None
    """Of the images that are looked at, of what dare drops, and of a student; 0 unless said otherwise."""

    def __call__(self, screen: Screen) -> None:
        """Combine, measure, print the table."""
        looking = {"gate": self.gate, "pool_bytes": self.pool_bytes, "per_class": self.per_class, "route": self.route}
        given = {name: value for name, value in looking.items() if value is not None}
        if self.merge is None:
            without_effect("without --merge", weights=self.weights or None)
        if self.distil is None:
            without_effect(
                "without --distil", images=" ".join(map(str, self.images)) or None, epochs=self.epochs, lr=self.lr
            )
        if self.merge is not None:
            without_effect("with --merge, which leaves one learner", distil=self.distil, **looking)
            self._merge(screen)
        elif self.distil is not None:
            self._distil(given, screen)
        else:
            self._combine(given, screen)

    def _combine(self, given: dict[str, Any], screen: Screen) -> None:
        from perdure.api.combine import combine

        screen.wait("looking at what members were taught")
        team = combine(self.folders, self.into, seed=self.seed or 0, device=self.device, progress=screen, **given)
        for name, why in team.missing.items():
            screen.warn(f"{name} is left out: {why}")
        _measured(team, {}, screen)
        members = [facts["name"] for facts in team.record["members"]]
        content = {"event": "combined", "folder": str(self.into), "members": members, "route": team.record["route"]}
        screen.result(content, f"combined {', '.join(members)}; {self._ask('them', team.able)}")

    def _merge(self, screen: Screen) -> None:
        from perdure.api.combine import open_all
        from perdure.api.merge import merge, write_merged

        assert self.merge is not None
        screen.wait("merging")
        learners = open_all(self.folders, self.device)
        made = merge(learners, self.merge, self.weights or None, self.seed)
        write_merged(made, self.into)
        content = {"event": "merged", "folder": str(self.into), "members": list(learners), "merge": self.merge}
        screen.result(content, f"merged {', '.join(learners)}; {self._ask('it', made.objective.asks.__contains__)}")

    def _distil(self, given: dict[str, Any], screen: Screen) -> None:
        from perdure.api.combine import gather
        from perdure.api.distil import distil
        from perdure.core.manifests import check_new

        assert self.distil is not None
        check_new(self.into)
        files = [file for path in self.images for file in images_in(path, Counter())]
        screen.wait("looking at what members were taught")
        team = gather(self.folders, self.into, seed=self.seed or 0, device=self.device, progress=screen, **given)
        given = {"epochs": self.epochs, "lr": self.lr}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        student = distil(team, self.distil, files or None, progress=screen, seed=self.seed or 0, **options)
        student.save(self.into)
        _measured(team, {"distilled": student}, screen)
        content = {"event": "distilled", "folder": str(self.into), "members": team.names, "method": self.distil}
        screen.result(
            content, f"distilled {', '.join(team.names)}; {self._ask('it', student.objective.asks.__contains__)}"
        )

    def _ask(self, whom: str, able: Callable[[str], object]) -> str:
        """How they are asked: by the first of three commands that they are `able` to answer."""
        into = shlex.quote(str(self.into))
        ways = {
            "classes": f"predict {into} IMAGE",
            "conversations": f"ask {into} IMAGE 'question'",
            "captions": f"search {into} FOLDER 'words'",
        }
        return f"ask {whom} with: perdure {next(way for asks, way in ways.items() if able(asks))}"


def _measured(team: "Specialists", made: "Mapping[str, Learner]", screen: Screen) -> None:
    from perdure.api.routing_scores import measure_routing

    if not (team.able("classes") or team.able("conversations")):
        screen.note("not measured: of specialists those are that learnt classes or answer in words, and no member does")
        return
    if team.able("classes") and team.able("conversations"):
        screen.note("measured are the members that learnt classes, not those that answer in words")
    screen.wait("evaluating")
    try:
        table = measure_routing(team, None, screen, made)
    except ValueError as error:  # members may have no tests, and still answer
        screen.note(f"not measured: {error}")
    else:
        screen.result({"event": "routing", **table}, *routing_lines(table))
