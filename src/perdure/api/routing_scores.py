"""Specialists are measured: how right those are who are asked, beside each alone, all, the best and a random choice.

The controls: the best single member, a random one, the uniform ensemble, the oracle (right where any member that was
taught the task is right); and where members can be merged, the merged learners.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.api.learner import Learner
from perdure.api.merge import merge, unlike
from perdure.api.routing_exams import exam_of, place_of
from perdure.api.specialists import Specialists
from perdure.core import checkpoint
from perdure.mechanisms.merging import MERGES
from perdure.mechanisms.routing import LinUCB
from perdure.process import plain
from perdure.reporting.specialists import TABLE
from perdure.storage.files import write_sealed
from perdure.storage.schema import SPECIALISTS, RoutingTable
from perdure.training.loop import Progress, told_by


@plain()
def measure_routing(
    team: Specialists,
    stream: str | None = None,
    progress: Progress | None = None,
    made: Mapping[str, Learner] | None = None,
) -> RoutingTable:
    """The table of a team, which is also written into its folder; of members that learnt classes, else of speakers.

    Args:
        team: as it was opened; members that are missing are not measured.
        stream: what to measure on, without what a member was taught; None is all that members were tested on.
        progress: who is told.
        made: learners that were made of the members, which are measured beside them.

    Raises:
        ValueError: when there is nothing to measure on, or a class is none that a member has learnt.
    """
    exam = exam_of(team, stream, told_by(progress))
    able, owns, count = exam.able, exam.owns, exam.owns.shape[1]
    said, took = {}, {}

    def ask(learner: Learner) -> tuple[Any, float]:
        start = time.perf_counter()
        return exam.ask(learner), 1000 * (time.perf_counter() - start) / count

    for name in able:
        said[name], took[name] = ask(team.members[name])
    marks = torch.stack([exam.marks(said[name]) for name in able])
    bytes_of = {name: _stored(team, name) for name in able}
    rows = [_row(f"{name} alone", marks[place], 1, took[name], bytes_of[name]) for place, name in enumerate(able)]
    every = sum(bytes_of.values())
    rows.append(_row("a random member", marks.mean(0), 1, sum(took.values()) / len(able), every))
    if (together := exam.together(list(said.values()))) is not None:
        rows.append(_row("all, averaged", exam.marks(together), len(able), sum(took.values()), every))
    found: float | None = None
    if team.router is not None and len(able) > 1:
        start = time.perf_counter()
        chosen = exam.routed()
        looked = 1000 * (time.perf_counter() - start) / count
        place = torch.tensor([able.index(name) for name in chosen]).unsqueeze(0)
        found = owns.gather(0, place)[0].float().mean().item() if owns.any(0).all() else None
        spent = looked + sum(took[name] for name in chosen) / len(chosen)
        router = LinUCB.nbytes(len(team.names), team.backbone.dim) if isinstance(team.router, LinUCB) else 0
        held = every + team.pool.nbytes + router
        rows.append(_row(f"routed ({team.record['route']})", marks.gather(0, place)[0], 1, spent, held))
    if owns.any(0).all():
        rows.append(_row("oracle", (marks * owns).amax(0), 1, None, every))
    for who, learner in (dict(made or {}) | _merged(team, able)).items():
        answers, spent = ask(learner)
        size = sum(value.nbytes for value in learner.learnt_state().values())
        rows.append(_row(who, exam.marks(answers), 1, spent, size))
    table: Any = {"images": count, "things": exam.things, "routing_accuracy": found, "rows": rows}
    if (team.folder / SPECIALISTS).exists():
        write_sealed(team.folder / TABLE, table)
    return table  # type: ignore[no-any-return]


def _row(who: str, marks: Tensor, asked: float, milliseconds: float | None, size: int) -> dict[str, Any]:
    share = marks.float().mean().item()
    return {"who": who, "accuracy": share, "asked": float(asked), "milliseconds": milliseconds, "bytes": size}


def _merged(team: Specialists, able: Sequence[str]) -> dict[str, Learner]:
    learners = {name: team.members[name] for name in able}
    if len(able) < 2 or unlike(learners):
        return {}
    return {f"merged by {how}": merge(learners, f"{how}()") for how in MERGES}


def _stored(team: Specialists, name: str) -> int:
    return checkpoint.stored_bytes(checkpoint.whole(place_of(team, name))[-1])
