"""From constraints to a ranked list of methods, by measured numbers only; what was not measured is said to be unknown.

Imports nothing that computes, so that the answer comes at once. Settings and rows: see `perdure.reporting.tables`.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, Literal

from perdure.formatting import count_bytes, human_bytes
from perdure.options.ranges import Count, Range, check_fields
from perdure.options.spec import parse
from perdure.reporting.abilities import exportable, searchable

_STEADY = 0.1  # growth of stored bytes per task may vary by so much and still be carried on as its mean


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a method must keep to; None where it does not matter."""

    bytes: str | None = None
    """Most that may be stored between tasks, such as 50MB: what was learnt, and examples that a memory refers to."""
    old_data: bool = True
    """Whether examples of old tasks may be kept."""
    tasks: Count | None = None
    """How many tasks there will be; as many as were measured when left out."""
    task_id_known: Literal["yes", "no"] | None = None
    """Whether it is known at test time which task an image is of; no unless said otherwise."""
    step_cost: Annotated[float, Range(0, 1e6)] | None = None
    """Most that a training step may cost, as a multiple of plain LoRA's, such as 1.2."""
    scenario: Literal["class", "domain", "task"] | None = None
    """class: tasks bring new classes; domain: the same classes look different; task: class, with the task known."""

    exportable: bool = False
    """Only what `perdure export` can write for other libraries."""
    searchable: bool = False
    """Only what `perdure search` can find images with, by words."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scenario == "task" and self.task_id_known == "no":
            raise ValueError("--scenario task means that the task is known at test: leave out --task-id-known no")
        _ = self.limit

    @property
    def limit(self) -> float | None:
        """Most bytes.

        Raises:
            ValueError: when they are not written as a number with a unit.
        """
        return None if self.bytes is None else float(count_bytes(self.bytes, "--bytes "))

    @property
    def task_known(self) -> bool:
        """Whether accuracy with the task id counts."""
        return self.task_id_known == "yes" or self.scenario == "task"

    @property
    def classes_grow(self) -> bool:
        """Whether class-incremental measurements are asked for."""
        return self.scenario != "domain"


@dataclass(frozen=True)
class RankedMethod:
    """A method that keeps to the constraints, with what speaks for it."""

    method: str
    backbone: str
    """Where it is another than the setting's, as one that reads more layers; else empty."""
    place: int
    """1 for the best; methods within the spread of the first of a place share it."""
    tied: bool
    seeds: int
    share: tuple[float, float | None]
    """What it is ranked by: accuracy after the last task, with the task id where that is known."""
    new_task_acc: tuple[float, float | None] | None
    forgetting: tuple[float, float | None] | None
    stored_bytes: float | None
    stored: Literal["measured", "extrapolated", "at most", "unknown"]
    """`at most`: carried on with the largest growth seen, where growth was not steady."""
    step: float | None
    """Multiple of plain LoRA's step; None without steps, or where it was not measured (see `steps`)."""
    steps: Literal["measured", "none", "unknown"]


@dataclass(frozen=True)
class Advice:
    """The answer from one setting: a stream and a backbone on which methods were measured alike."""

    setting: dict[str, Any]
    """Where the numbers come from; without the rows."""
    tasks: int
    """After how many tasks the scores were measured."""
    choices: list[RankedMethod] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """By the constraint that they miss: methods, with the number that misses it."""
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """By what is not known of them: methods that may or may not keep to the constraints."""
    notes: list[str] = field(default_factory=list)
    """What the numbers cannot say."""


def shipped() -> list[dict[str, Any]]:
    """The settings that come with perdure."""
    text = resources.files("perdure.reporting").joinpath("measured.json").read_text("utf-8")
    settings: list[dict[str, Any]] = json.loads(text)["settings"]
    return settings


def advise(settings: Sequence[dict[str, Any]], asked: Constraints) -> list[Advice]:
    """One answer for each setting of the scenario asked for, that with the nearest number of tasks first.

    Empty when nothing was measured in that scenario.
    """
    fitting = [s for s in settings if _fits(s["scenario"], asked) and s["tasks"] > 1]
    if asked.tasks is not None:
        wanted = asked.tasks
        fitting.sort(key=lambda s: abs(s["tasks"] - wanted))
    return [_answer(setting, asked) for setting in fitting]


def in_words(asked: Constraints) -> list[str]:
    """The constraints, one after the other."""
    said = ["the task is known at test" if asked.task_known else "the task is not known at test"]
    if asked.scenario == "domain":
        said.append("the same classes in every task")
    if asked.tasks is not None:
        said.append(f"{asked.tasks} tasks")
    if asked.bytes is not None:
        said.append(f"at most {asked.bytes} stored")
    if not asked.old_data:
        said.append("no old data kept")
    said += [f"{what} only" for what in ("exportable", "searchable") if getattr(asked, what)]
    if asked.step_cost is not None:
        said.append(f"a step costs at most {asked.step_cost:g} × plain LoRA's")
    return said


def bytes_at(stored: Sequence[Sequence[float | None] | None], tasks: int) -> tuple[float | None, Any]:
    """Stored bytes after `tasks` tasks, from the means after each one that was measured; and how that is known.

    Beyond what was measured, the growth of the second half of the tasks is carried on: its mean where it is steady,
    else the largest, which is a bound as long as growth does not quicken.
    """
    more, last = tasks - len(stored), stored[-1]
    if more <= 0:
        found = stored[tasks - 1]
        return (None, "unknown") if found is None else (found[0], "measured")
    grown = growth(stored)
    if not grown or last is None or last[0] is None:
        return None, "unknown"
    mean, most = sum(grown) / len(grown), max(grown)
    if most - min(grown) <= max(_STEADY * abs(mean), 2048):
        return last[0] + mean * more, "extrapolated"
    return last[0] + max(most, 0.0) * more, "at most"


def named(row: Mapping[str, Any]) -> str:
    """A row's method, with its backbone where that is not the setting's."""
    return f"{row['method']} on {row['backbone']}" if row.get("backbone") else row["method"]


def growth(stored: Sequence[Sequence[float | None] | None]) -> list[float]:
    """By how much stored bytes grew with each task of the second half; empty where that was not measured."""
    half = [None if pair is None else pair[0] for pair in stored[len(stored) // 2 - 1 :]] if len(stored) > 3 else []
    return [] if None in half else [b - a for a, b in itertools.pairwise(half) if a is not None and b is not None]


def _fits(scenario: str, asked: Constraints) -> bool:
    if scenario == "task":
        return asked.task_known and asked.classes_grow
    return scenario == ("class" if asked.classes_grow else "domain")


def _answer(setting: dict[str, Any], asked: Constraints) -> Advice:
    measured = int(setting["tasks"])
    tasks = measured if asked.tasks is None else asked.tasks
    at = min(tasks, measured) - 1
    answer = Advice({k: v for k, v in setting.items() if k != "rows"}, at + 1)
    found: list[RankedMethod] = []
    for row in setting["rows"]:
        choice = _choice(row, asked, at, tasks)
        if reason := _missed(row, choice, asked, row.get("backbone") or setting.get("backbone", "")):
            answer.left_out.setdefault(reason[0], []).append(reason[1])
        elif choice is None:
            answer.unknown.setdefault("accuracy", []).append(named(row))
        elif asked.step_cost is not None and choice.steps == "unknown":
            answer.unknown.setdefault("step cost", []).append(named(row))
        elif asked.bytes is not None and not _surely_small(choice, asked):
            answer.unknown.setdefault("stored bytes", []).append(_so_far(row, measured))
        else:
            found.append(choice)
    answer.choices.extend(_placed(found, setting.get("test_images")))
    answer.notes.extend(_notes(setting, answer, tasks))
    return answer


def _choice(row: dict[str, Any], asked: Constraints, at: int, tasks: int) -> RankedMethod | None:
    after, known = row["after"], "_with_task_id" if asked.task_known else ""
    share = after[f"acc{known}"][at]
    if share is None:
        return None
    stored, how = bytes_at(after["stored_bytes"], tasks)
    step = row.get("step") or {}
    ratio = step.get("ratio")
    return RankedMethod(
        method=row["method"],
        backbone=row.get("backbone", ""),
        place=0,
        tied=False,
        seeds=len(row["seeds"]),
        share=tuple(share),
        new_task_acc=_pair(after[f"new_task_acc{known}"][at]),
        forgetting=_pair(after[f"forgetting{known}"][at]),
        stored_bytes=stored,
        stored=how,
        step=ratio,
        steps="measured" if ratio is not None else "none" if step.get("why") == "no steps" else "unknown",
    )


def _missed(
    row: dict[str, Any], choice: RankedMethod | None, asked: Constraints, backbone: str
) -> tuple[str, str] | None:
    """The first constraint that a method misses, and the method with its number."""
    method, limit = named(row), asked.limit
    if any(("batchwise", True) in spec.kwargs for spec in parse(row["method"])):
        return "answers depend on which images share a batch", method
    if not asked.old_data and row["referenced_bytes"] > 0:
        return "--no-old-data", method
    if asked.exportable and not exportable(row["method"], backbone):
        return "--exportable", method
    if asked.searchable and not searchable(backbone):
        return "--searchable", method
    if choice is None:
        return None
    if limit is not None and choice.stored_bytes is not None:
        # where growth is only bounded, what was stored after the last measured task is the least there will be
        least = row["after"]["stored_bytes"][-1][0] if choice.stored == "at most" else choice.stored_bytes
        if least > limit:
            return f"--bytes {asked.bytes}", f"{method} ({human_bytes(least)})"
    if asked.step_cost is not None and choice.step is not None and choice.step > asked.step_cost:
        return f"--step-cost {asked.step_cost:g}", f"{method} ({choice.step:.2f})"
    return None


def _so_far(row: dict[str, Any], tasks: int) -> str:
    last = row["after"]["stored_bytes"][-1]
    return named(row) if last is None else f"{named(row)} ({human_bytes(last[0])} after {tasks} tasks)"


def _surely_small(choice: RankedMethod, asked: Constraints) -> bool:
    return asked.limit is None or (choice.stored_bytes is not None and choice.stored_bytes <= asked.limit)


def _placed(found: Sequence[RankedMethod], images: int | None) -> list[RankedMethod]:
    """Best first; who is within one standard deviation of the first of a place shares it.

    The largest counts: over runs of either, and of a share of so many test images, which are the same in every run.
    """
    groups: list[list[RankedMethod]] = []
    for choice in sorted(found, key=lambda c: -c.share[0]):
        leader = groups[-1][0] if groups else None
        by_chance = math.sqrt(choice.share[0] * (1 - choice.share[0]) / images) if images else 0.0
        spread = max(choice.share[1] or 0.0, (leader and leader.share[1]) or 0.0, by_chance)
        if leader and leader.share[0] - choice.share[0] <= spread:
            groups[-1].append(choice)
        else:
            groups.append([choice])
    placed, place = [], 1
    for group in groups:
        placed += [RankedMethod(**(vars(c) | {"place": place, "tied": len(group) > 1})) for c in group]
        place += len(group)
    return placed


def _notes(setting: dict[str, Any], answer: Advice, tasks: int) -> list[str]:
    notes, measured, choices = [], int(setting["tasks"]), answer.choices
    if tasks > measured:
        notes.append(
            f"scores are for {measured} tasks: how they go on until task {tasks} was not measured; stored bytes are "
            "carried on with the growth of the last tasks (~)"
        )
    if any(c.stored == "at most" for c in choices):
        notes.append("≤: growth per task was not steady; the largest is carried on, so this holds unless it quickens")
    if any(c.stored == "unknown" for c in choices):
        notes.append("stored bytes of some are not known for so many tasks")
    if any(c.steps == "unknown" for c in choices):
        notes.append("step cost '?': not measured")
    if any(c.tied for c in choices):
        notes.append(
            "=: the same place, for the difference is within one standard deviation, over seeds or of the test images"
        )
    if single := [c.method for c in choices if c.seeds == 1]:
        notes.append(f"one run only, so no spread: {', '.join(single)}")
    if any(c.steps == "measured" for c in choices):
        notes.append("a step is of the second task; with more tasks it may cost more")
    return notes


def _pair(value: Sequence[Any] | None) -> tuple[float, float | None] | None:
    return None if value is None else (value[0], value[1])
