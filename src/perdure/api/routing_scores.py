"""Specialists are measured: how right those are who are asked, beside each alone, all, the best and a random choice.

The controls: the best single member, a random one, the uniform ensemble, the oracle (right where any member that was
taught the class is right); and where members can be merged, the merged learners.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.api.folders import tasks_with_data
from perdure.api.learner import Learner
from perdure.api.merge import merge, unlike
from perdure.api.specialists import Specialists, seen_by, unit_features
from perdure.core import checkpoint
from perdure.mechanisms.merging import MERGES
from perdure.process import plain
from perdure.reporting.specialists import TABLE
from perdure.storage.files import write_sealed
from perdure.storage.schema import SPECIALISTS, RoutingTable
from perdure.streams import ImageSet, build_stream
from perdure.training.loop import Progress, Quiet
from perdure.training.summary import taught_hashes


@dataclass(frozen=True)
class Named:
    """Images with the name of the class of each."""

    images: ImageSet
    names: tuple[str, ...]


@plain()
def measure_routing(
    team: Specialists,
    stream: str | None = None,
    progress: Progress | None = None,
    made: Mapping[str, Learner] | None = None,
) -> RoutingTable:
    """The table of a team, which is also written into its folder; of members that learnt classes.

    Args:
        team: as it was opened; members that are missing are not measured.
        stream: what to measure on, without images that a member was taught; None is all that members were tested on.
        progress: who is told.
        made: learners that were made of the members, which are measured beside them.

    Raises:
        ValueError: when there is nothing to measure on, or a class is none that a member has learnt.
    """
    progress = progress or Quiet()
    able = team.able("classes")
    sets = _tests(team, able, progress) if stream is None else _of_stream(team, stream)
    truths = [name for each in sets for name in each.names]
    if not truths:
        raise ValueError(f"the members of {team.folder} have no test images that can be read: give some with --stream")
    known = set(team.known)
    if strange := [name for name in truths if name not in known]:
        raise ValueError(f"class {strange[0]!r} is none that a member of {team.folder} has learnt")
    columns = {name: place for place, name in enumerate(dict.fromkeys((*team.known, *truths)))}
    target = torch.tensor([columns[name] for name in truths])
    shares, took = {}, {}
    for name in able:
        shares[name], took[name] = _shares(team.members[name], sets, columns)
    right = torch.stack([shares[name].argmax(1) == target for name in able])
    owns = torch.stack([torch.tensor([name in team.members[each].known for name in truths]) for each in able])
    bytes_of = {name: _stored(team, name) for name in able}
    rows = [_row(f"{name} alone", right[place], 1, took[name], bytes_of[name]) for place, name in enumerate(able)]
    every = sum(bytes_of.values())
    rows.append(_row("a random member", right.float().mean(0), 1, sum(took.values()) / len(able), every))
    together = torch.stack([shares[name] for name in able]).mean(0)
    rows.append(_row("all, averaged", together.argmax(1) == target, len(able), sum(took.values()), every))
    found: float | None = None
    if team.router is not None and len(able) > 1:
        start = time.perf_counter()
        features = torch.cat([unit_features(team.backbone, each.images) for each in sets])
        chosen, _ = team._chosen(features, able)
        looked = 1000 * (time.perf_counter() - start) / len(truths)
        place = torch.tensor([able.index(name) for name in chosen]).unsqueeze(0)
        found = owns.gather(0, place)[0].float().mean().item()
        spent = looked + sum(took[name] for name in chosen) / len(chosen)
        held = every + team.pool.nbytes
        rows.append(_row(f"routed ({team.record['route']})", right.gather(0, place)[0], 1, spent, held))
    rows.append(_row("oracle", (right & owns).any(0), 1, None, every))
    for who, learner in (dict(made or {}) | _merged(team, able)).items():
        answers, spent = _shares(learner, sets, columns)
        size = sum(value.nbytes for value in learner.learnt_state().values())
        rows.append(_row(who, answers.argmax(1) == target, 1, spent, size))
    table: Any = {"images": len(truths), "routing_accuracy": found, "rows": rows}
    if (team.folder / SPECIALISTS).exists():
        write_sealed(team.folder / TABLE, table)
    return table  # type: ignore[no-any-return]


def _row(who: str, right: Tensor, asked: float, milliseconds: float | None, size: int) -> dict[str, Any]:
    share = right.float().mean().item()
    return {"who": who, "accuracy": share, "asked": float(asked), "milliseconds": milliseconds, "bytes": size}


def _merged(team: Specialists, able: Sequence[str]) -> dict[str, Learner]:
    learners = {name: team.members[name] for name in able}
    if len(able) < 2 or unlike(learners):
        return {}
    return {f"merged by {how}": merge(learners, f"{how}()") for how in MERGES}


def _shares(learner: Learner, sets: Sequence[Named], columns: dict[str, int]) -> tuple[Tensor, float]:
    """Shares (n, columns) of a member's answers, and the milliseconds an image that they took."""
    start, found = time.perf_counter(), []
    for each in sets:
        shares = torch.zeros(len(each.names), len(columns))
        for row, line in enumerate(learner.predict(seen_by(each.images, learner.backbone))):
            for name, share in line:
                shares[row, columns[name]] = share
        found.append(shares)
    return torch.cat(found), 1000 * (time.perf_counter() - start) / sum(len(each.names) for each in sets)


def _stored(team: Specialists, name: str) -> int:
    return checkpoint.stored_bytes(checkpoint.whole(place_of(team, name))[-1])


def place_of(team: Specialists, name: str) -> Path:
    """Where a member lies."""
    facts = next(each for each in team.record["members"] if each["name"] == name)
    there = Path(facts["folder"])
    return there if there.exists() else team.folder / facts["beside"]


def _tests(team: Specialists, able: Sequence[str], progress: Progress) -> list[Named]:
    found = []
    for name in able:
        learner, folder = team.members[name], place_of(team, name)
        tasks = tasks_with_data(learner, folder, checkpoint.whole(folder), progress.note)[: learner.learnt]
        found += [_named(task.test, task.classes, task.names, team) for task in tasks if len(task.test)]
    return found


def _of_stream(team: Specialists, described: str) -> list[Named]:
    stream = build_stream(described, team.backbone.preprocess, 0, measured=True)
    if stream.gives != "classes":
        raise ValueError(f"{described} gives {stream.gives}: give a stream of classes")
    taught = torch.cat([taught_hashes(place_of(team, name))[0] for name in team.members])
    found = []
    for task in stream:
        data: Any = task.test
        fresh = (~data.shows(taught)).nonzero().flatten()
        if len(fresh):
            found.append(_named(data.subset(fresh), task.classes, task.names, team))
    return found


def _named(data: Any, classes: Sequence[int], names: Sequence[str], team: Specialists) -> Named:
    name: Callable[[int], str] = dict(zip(classes, names, strict=True)).__getitem__
    return Named(seen_by(data, team.backbone), tuple(map(name, data.labels.tolist())))
