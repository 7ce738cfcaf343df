"""perdure reward: what answers of specialists were worth, for those who are chosen by rewards."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import msgspec
import tyro

from perdure.cli.console import Command, Screen
from perdure.storage.schema import SPECIALISTS

if TYPE_CHECKING:
    from perdure.api.specialists import Specialists


class Worth(TypedDict):
    """A line of rewards: what `predict --json` says of an image, with what it was worth."""

    image: str
    member: str
    reward: Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Reward(Command):
    """Tell specialists that were combined with --route linucb what their answers were worth."""

    team: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEAM")]
    """Folder that `perdure combine --route linucb` wrote."""
    rewards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Lines of JSON: those of `perdure predict TEAM IMAGES --json`, each with "reward": 1 where it was right, 0 where
    it was wrong, or a number between; - reads standard input."""
    device: str | None = None
    """Where to compute, such as cpu; auto when left out."""

    def __call__(self, screen: Screen) -> None:
        """Learn from all lines, or from none where one cannot be used."""
        from perdure.storage.files import locked

        if not (self.team / SPECIALISTS).is_file():
            raise ValueError(
                f"{self.team} is no team of specialists, who are chosen by rewards: combine learners with "
                "'perdure combine LEARNERS --into TEAM --route linucb'"
            )
        lines = self._lines()
        with locked(self.team):  # another process may not read in between what is to be changed here
            team, told = self._learn(lines)
        sums = {name: [each["reward"] for each in told if each["member"] == name] for name in team.names}
        for name, values in sums.items():
            if values:
                mean = sum(values) / len(values)
                screen.result(
                    {"member": name, "rewards": len(values), "mean": mean}, f"{name}: {len(values)}, {mean:.2f}"
                )

    def _learn(self, lines: "dict[int, Worth]") -> "tuple[Specialists, list[Worth]]":
        from perdure.api.specialists import Specialists

        team = Specialists.load(self.team, self.device)
        for number, line in lines.items():
            if line["member"] not in team.names:
                raise ValueError(
                    f"{self.rewards}, line {number}: {line['member']!r} is no member of {self.team}: give one of "
                    f"{', '.join(team.names)}"
                )
        told = list(lines.values())
        team.feedback(
            [each["image"] for each in told], [each["member"] for each in told], [each["reward"] for each in told]
        )
        team.save(held=True)
        return team, told

    def _lines(self) -> dict[int, Worth]:
        """By their numbers from 1."""
        try:
            content = sys.stdin.buffer.read() if self.rewards == "-" else Path(self.rewards).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{self.rewards} cannot be read ({error.strerror}): give a file of rewards, or -"
            ) from error
        found: dict[int, Worth] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    found[number] = msgspec.json.decode(line, type=Worth)
                except msgspec.DecodeError as error:
                    raise ValueError(
                        f"{self.rewards}, line {number}: {error}: expected image, member and a reward from 0 to 1"
                    ) from error
        if not found:
            raise ValueError(f"{self.rewards} holds no reward: give a line of JSON for each answer")
        return found
