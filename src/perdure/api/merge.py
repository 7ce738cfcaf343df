"""Finished learners of one backbone become one learner: their linear updates merged, their heads side by side.

How updates become one is in `perdure.mechanisms.merging`.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.adapters.injection import prompted, updates
from perdure.adapters.low_rank import LowRank
from perdure.api.learner import OPEN, Learner
from perdure.api.specialists import speaks
from perdure.core.manifests import check_new
from perdure.core.method import parts_of, predicts, treated
from perdure.mechanisms.merging import MERGES, Vector, merged_vectors
from perdure.options.ranges import without_effect
from perdure.options.spec import Spec, parse_one
from perdure.process import plain
from perdure.training.config import RunConfig, one
from perdure.training.loop import Fitted
from perdure.training.summary import facts_of
from perdure.types import Task

_EXACT = 1e-6
"""Of the largest singular value: what is smaller is rounding."""


@plain()
def merge(
    learners: Mapping[str, Learner],
    how: str = "ties()",
    weights: Sequence[float] | None = None,
    seed: int | None = None,
) -> Learner:
    """One learner of all that several have learnt, which costs what one does; none of them is changed.

    Args:
        learners: by name; of one backbone, one objective, and updates of the same layers that weights can hold.
        how: `average`, `arithmetic`, `ties` or `dare`, with options.
        weights: of each one; 1 when None.
        seed: of what is dropped by `dare`; 0 when None.

    Raises:
        ValueError: when they cannot be merged.
    """
    if reason := unlike(learners):
        raise ValueError(f"{reason}: combine them as specialists, without --merge")
    start = time.perf_counter()
    way = one(how, MERGES, "merge")
    if parse_one(how).name != "dare":
        without_effect(f"with {how}, which drops nothing at random", seed=seed)
    vectors = [task_vector(each) for each in learners.values()]
    shares = [1.0] * len(vectors) if weights is None else list(weights)
    update = merged_vectors(way, vectors, shares, seed or 0)
    first = next(iter(learners.values()))
    made = Learner.of(_config(first, _places(first)), first.runtime)
    made.scenario = first.scenario
    every = list(learners.values())
    alike = not speaks(first) and len({tuple(each.known) for each in every}) == 1
    for task in _tasks([first] if alike else every):
        made.grow(task, over=True)
        made.prepare()
    for site, adapter, part in updates(made.backbone):
        assert isinstance(adapter, LowRank)
        adapter.merge()
        if site.key in update:
            adapter.merged.clear()
            for name, value in _factors(update[site.key], part).items():
                adapter.merged[name] = value.to(made.device)
    made.objective.load_state_dict(_heads(every, shares, alike))
    made.learnt = len(made.tasks)
    made._hashes = _hashes(every, len(made.tasks))
    if not alike:
        sources = [each._sources.get(index) for each in every for index in range(each.learnt)]
        made._sources = {index: source for index, source in enumerate(sources) if source}
    made._facts = facts_of(Fitted(0.0, 0.0, time.perf_counter() - start, 0, 0, True), 0.0)
    made.prepare()
    return made


def unlike(learners: Mapping[str, Learner]) -> str:
    """Why learners cannot be merged; empty where they can."""
    names, every = list(learners), list(learners.values())
    for name, each in learners.items():
        method = each.config.method
        if any(not k.startswith("heads.") for k in each.objective.state_dict()):
            return f"{name} learns {min(each.objective.asks)}, and more than heads and updates would have to be merged"
        if predicts(each.method) or treated(each.method) or prompted(each.backbone) or each.tunes_backbone:
            return f"{name} was taught by {method!r}, whose answers no update of weights holds"
        if not all(adapter.folds for _, adapter, _ in updates(each.backbone)):
            return f"{name} was taught by {method!r}, whose update depends on the image"
        if each.fingerprint != every[0].fingerprint:
            return f"{names[0]} and {name} have different backbones"
        if each.config.objective != every[0].config.objective or each.scenario != every[0].scenario:
            return f"{names[0]} and {name} have different objectives or scenarios"
        if _places(each) != _places(every[0]):
            return f"{names[0]} and {name} adapt different layers"
    if speaks(every[0]):  # tasks of one name may be other questions: nothing is kept by name
        return ""
    known = [tuple(each.known) for each in every]
    shared = [c for i, each in enumerate(known) for c in each if any(c in other for other in known[:i])]
    if shared and len(set(known)) > 1:
        return f"several have learnt {shared[0]!r}, but not all the same classes in one order"
    if shared and len({tuple(task.names for task in each.tasks[: each.learnt]) for each in every}) > 1:
        return f"several have learnt {shared[0]!r}, but in other lessons"
    return ""


def _headed(learner: Learner) -> bool:
    return bool(learner.objective.state_dict())


def task_vector(learner: Learner) -> Vector:
    """Layer -> all of a learner's update, dense, float32 on the CPU."""
    found: Vector = {}
    for site, adapter, part in updates(learner.backbone):
        if (update := adapter.delta(part, branches=True)) is not None:
            update = update.detach().float().cpu()
            found[site.key] = found[site.key] + update if site.key in found else update
    return found


def _places(learner: Learner) -> dict[str, Any]:
    """Which layers are adapted, in options of `lora`; empty where none are."""
    part = next((p for p in parts_of(learner.method) if p.changes_encoder and hasattr(p, "at")), None)
    if part is None:
        return {}
    found = {name: getattr(part, name, None) for name in ("at", "blocks", "tower")}
    return {name: value for name, value in found.items() if value is not None} | {"at": found["at"] or "kv"}


def _config(first: Learner, places: Mapping[str, Any]) -> RunConfig:
    """Of the merged learner; a later lesson teaches it a head, or a fresh branch where no head is taught."""
    later = (("rank", 1), *places.items(), ("tasks", 1)) if _headed(first) else (*places.items(), ("per_task", True))
    method = str(Spec("lora", later))
    return dataclasses.replace(first.config, stream=OPEN, method=method, calibrate=0.0, retain=())


def _tasks(learners: Sequence[Learner]) -> list[Task]:
    """Their tasks one after the other, without data, classes numbered anew."""
    found: list[Task] = []
    start = 0
    for learner in learners:
        for task in learner.tasks[: learner.learnt]:
            name = task.name if task.name not in {each.name for each in found} else f"{task.name} ({len(found)})"
            classes = tuple(start + c for c in task.classes)
            found.append(Task(len(found), name, classes, task.names, None, score=task.score, pretext=task.pretext))
        start = max((c for task in found for c in task.classes), default=-1) + 1
    return found


def _hashes(learners: Sequence[Learner], tasks: int) -> dict[int, Tensor]:
    """Of the images that they were taught, by the position of the task in who they become, where all know them."""
    known = [(learner, learner._taught()) for learner in learners]
    each = [hashes.get(index) for learner, hashes in known for index in range(learner.learnt)]
    found = {index: each[index::tasks] for index in range(tasks)}  # several where all have the same tasks
    every = {index: [hashes for hashes in some if hashes is not None] for index, some in found.items()}
    return {index: torch.unique(torch.cat(some)) for index, some in every.items() if len(some) == len(found[index])}


def _heads(learners: Sequence[Learner], weights: Sequence[float], alike: bool) -> dict[str, Tensor]:
    """Heads side by side; where all have the same classes, their mean by the weights."""
    states = [each.objective.state_dict() for each in learners]
    if alike:
        shares = torch.tensor(weights) / sum(weights)
        return {
            k: torch.stack([s[k].cpu() * share for s, share in zip(states, shares, strict=True)]).sum(0)
            for k in states[0]
        }
    found, before = {}, 0
    for state in states:
        numbers = {int(key.split(".")[1]) for key in state}
        for key, value in state.items():
            _, number, rest = key.split(".", 2)
            found[f"heads.{before + int(number)}.{rest}"] = value
        before += len(numbers)
    return found


def _factors(update: Tensor, part: int) -> dict[str, Tensor]:
    """What `LowRank` keeps of an update: exact factors where they are smaller, else all of it."""
    left, sizes, right = torch.linalg.svd(update, full_matrices=False)
    rank = max(1, int((sizes > _EXACT * sizes[0]).sum()))
    if rank * sum(update.shape) > update.numel():
        return {f"dense/{part}": update}
    return {"down": right[:rank].contiguous(), f"up/{part}": (left[:, :rank] * sizes[:rank]).contiguous()}


def write_merged(made: Learner, into: Path) -> Path:
    """Save a merged learner in a new folder."""
    check_new(into)
    return made.save(into)
