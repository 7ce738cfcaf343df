"""Finished learners are combined: a gate looks once at what they were taught; pool and router are written."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.api.folders import tasks_with_data
from perdure.api.given import seen_by, unit_features
from perdure.api.learner import OPEN, Learner
from perdure.api.specialists import Specialists, write_specialists
from perdure.backbones.base import Backbone
from perdure.core import checkpoint
from perdure.core.learner import derived_seed
from perdure.core.manifests import check_new, read_record
from perdure.formatting import command, count_bytes, human_bytes, told_apart
from perdure.mechanisms.experience_pool import ExperiencePool
from perdure.mechanisms.routing import LinUCB, Route, router_of
from perdure.options.ranges import Count, Seed, checking
from perdure.process import plain
from perdure.storage import schema
from perdure.streams import Captioned, ConversationSet, ImageSet
from perdure.training.config import make_backbone
from perdure.training.loop import Progress, told_by
from perdure.types import Data, Task
from perdure.version import __version__

_TEXTS = 64
"""Captions or questions of a task that are remembered."""
_LOOKING = ("gaussian", "nearest", "subspace", "linucb")
"""Routes that are made from images; the last goes on with rewards where there are none."""


@plain()
@checking("into", "route", "gate", "per_class", "seed")
def combine(
    folders: Sequence[str | Path],
    into: str | Path,
    route: Route = "gaussian",
    gate: str | None = None,
    pool_bytes: float | str = "20MB",
    per_class: Count = 50,
    seed: Seed = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Specialists:
    """Put finished learners behind one face; they stay where they are, and are opened when they are asked.

    Args:
        folders: of learners or runs, two or more.
        into: a new folder.
        route: how one is chosen for an image: `gaussian` or `nearest` by class statistics, `subspace` by what a basis
            does not explain, `text` by the most similar class name, or question, `linucb` by rewards (here: whether the
            one member that was asked was right, on one pass over the pool's examples); `uniform` asks all and averages.
        gate: the frozen encoder whose features decide; None is the first member's that sees and does not speak, else
            pocket().
        pool_bytes: most that the pool may take; its examples give way first.
        per_class: training images of a class that are looked at, of all lessons that taught it in turn.
        seed: which those are.
        device: to compute on; None is each member's own.
        progress: who is told.

    Raises:
        ValueError: when a folder is no learner, the images that a route needs are gone, or `into` is not new.
    """
    into = Path(into)
    check_new(into)
    team = gather(folders, into, route, gate, pool_bytes, per_class, seed, device, progress)
    write_specialists(into, team.record, team.pool, team.router)
    return Specialists.load(into, device)


@plain()
@checking("route", "gate", "per_class", "seed")
def gather(
    folders: Sequence[str | Path],
    into: Path,
    route: Route = "gaussian",
    gate: str | None = None,
    pool_bytes: float | str = "20MB",
    per_class: Count = 50,
    seed: Seed = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Specialists:
    """The same in memory, for what is to lie in `into`: nothing is written."""
    progress = told_by(progress)
    learners = open_all(folders, device)
    spec = gate or next((e.config.backbone for e in learners.values() if _looks(e)), "pocket()")
    encoder = make_backbone(spec).requires_grad_(False).eval().to("cpu" if device in (None, "auto") else device)
    limit = count_bytes(pool_bytes, "--pool-bytes ")
    judged = LinUCB.nbytes(len(learners), encoder.dim) if route == "linucb" else 0
    if judged > limit:
        raise ValueError(
            f"what the bandit learns of {len(learners)} members takes {human_bytes(judged)}, and the pool may take "
            f"{human_bytes(limit)}: give more with --pool-bytes, or a --gate with fewer features"
        )
    pool = ExperiencePool(limit - judged)
    classes: list[tuple[int, str]] = []
    for number, (name, learner) in enumerate(learners.items()):
        tasks = _lessons(learner, _folder_of(folders, name), route, progress)
        shown, said = _taught(tasks, learner, encoder, per_class, seed + number)
        if "text" in encoder.towers() and said:
            with torch.inference_mode():
                pool.texts[str(number)] = F.normalize(encoder.encode_text(said).float(), dim=1).cpu()
        if shown:
            ids = range(len(classes), len(classes) + len(shown))
            features = [unit_features(encoder, ImageSet.queries(each, encoder.preprocess)) for each in shown.values()]
            pool.add(number, list(shown.values()), features, list(ids))
            classes += [(number, each) for each in shown]
    if route in _LOOKING[:3] and not classes:
        route = _without_images(route, pool, spec, progress)
    router = router_of(route, pool, [member for member, _ in classes], len(learners), encoder.dim)
    facts = [_facts(_folder_of(folders, name), into, name, each) for name, each in learners.items()]
    record: dict[str, Any] = {
        "format": schema.FORMAT,
        "perdure": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "route": route,
        "gate": {"spec": spec, "fingerprint": encoder.fingerprint()},
        "pool_bytes": limit,
        "members": facts,
        "classes": classes,
        "known": None,
    }
    team = Specialists(into, record, encoder, pool, router, learners, {})  # type: ignore[arg-type]
    if isinstance(router, LinUCB):
        _try_out(team, router, seed)
    elif router is not None and classes:
        images, _ = pool.sample(4096, torch.Generator().manual_seed(derived_seed(seed, 0, "limit")))
        if len(images):
            router.settle(unit_features(encoder, ImageSet.queries(images, encoder.preprocess)))
    return team


def open_all(folders: Sequence[str | Path], device: str | None = None) -> dict[str, Learner]:
    """The learners of folders, by names that tell them apart.

    Raises:
        ValueError: when there are fewer than two, or one stands twice.
    """
    if isinstance(folders, str | Path) or not isinstance(folders, Sequence):
        raise ValueError(f"folders: got {type(folders).__name__}, expected a list of two or more")
    places = [Path(each).resolve() for each in folders]
    if len(places) < 2:
        raise ValueError("one learner alone is no team: give the folders of two or more")
    if twice := [each for each in places if places.count(each) > 1]:
        raise ValueError(f"{twice[0]} stands twice: give each learner once")
    return {name: Learner.load(place, device) for name, place in zip(told_apart(places), places, strict=True)}


def _folder_of(folders: Sequence[str | Path], name: str) -> Path:
    places = [Path(each).resolve() for each in folders]
    return places[told_apart(places).index(name)]


def _without_images(route: Route, pool: ExperiencePool, gate: str, progress: Progress) -> Route:
    """The route of members that were taught no image: by their texts, which is told."""
    why = f"no member was taught images, which --route {route} looks at"
    if not pool.texts:
        raise ValueError(f"{why}, and the gate {gate} reads no texts to choose by: give --gate 'pocket()'")
    progress.note(f"{why}: their texts choose, as with --route text")
    return "text"


def _lessons(learner: Learner, folder: Path, route: Route, progress: Progress) -> list[Task]:
    """What a member was taught, with the data that is at hand.

    Raises:
        ValueError: when the route looks at images of which none of a task are.
    """
    done = checkpoint.whole(folder)
    tasks = tasks_with_data(learner, folder, done, progress.note)
    gone = [task.name for task in tasks if not len(task.train) and _to_be_seen(task, learner)]
    if gone and route in _LOOKING:
        written = learner.config.stream != OPEN or len(checkpoint.sources(done)) == len(tasks)
        raise _gone(folder, gone[0], route, written)
    return tasks


def _gone(folder: Path, task: str, route: Route, written: bool) -> ValueError:
    """What to raise when images that `route` looks at are gone; `written` says that it is known which they were."""
    why, remedy = "cannot be read any more", "say where it is now with 'perdure move'"
    if not written:
        why = "came from Python, where nobody wrote down what images they were"
        remedy = f"teach it from a folder, with {command('learn', 'FOLDER', '--into', folder)}"
    return ValueError(
        f"what {folder} was taught as {task!r} {why}, and --route {route} looks at it: {remedy}, or use --route text "
        "or uniform"
    )


def _to_be_seen(task: Task, learner: Learner) -> bool:
    """Whether something is to be answered by what the task taught: by pre-training and forgotten classes it is not."""
    return not task.pretext and bool(task.classes or "classes" not in learner.objective.asks)


def _looks(learner: Learner) -> bool:
    return "vision" in learner.backbone.towers() and "conversations" not in learner.objective.asks


def _facts(folder: Path, into: Path, name: str, learner: Learner) -> dict[str, Any]:
    return {
        "name": name,
        "folder": str(folder),
        "beside": os.path.relpath(folder, into.resolve()),
        "run": schema.seal(read_record(folder)),
        "learnt": learner.learnt,
        "gives": min(learner.objective.asks),
        "method": learner.config.method,
        "backbone": learner.config.backbone,
        "text": "text" in learner.backbone.towers(),
    }


def _taught(
    tasks: Sequence[Task], learner: Learner, gate: Backbone, per_class: int, seed: int
) -> tuple[Mapping[str, Tensor], list[str]]:
    """What a member was taught: images uint8 (n, 3, side, side) by class, or by task; and in words."""
    shown: dict[str, list[Tensor]] = {}
    said: list[str] = []
    for task in tasks:
        generator = torch.Generator().manual_seed(derived_seed(seed, task.index, "pool"))
        data = task.train
        if "classes" in learner.objective.asks:
            said += [template.format(name) for name in task.names for template in learner.objective.templates[:1]]
            for name, c in zip(task.names, task.classes, strict=True):
                rows = (data.labels == c).nonzero().flatten()
                if len(rows):
                    shown.setdefault(name, []).append(_seen(data, _some(rows, per_class, generator), gate))
            continue
        rows = _some(torch.arange(len(data)), max(per_class, _TEXTS), generator)
        said += _words(data, rows[:_TEXTS])
        if len(rows):
            shown.setdefault(task.name, []).append(_seen(data, rows[:per_class], gate))
    return {name: _in_turn(each)[:per_class] for name, each in shown.items() if sum(map(len, each))}, said


def _in_turn(lessons: Sequence[Tensor]) -> Tensor:
    """The first image of each lesson, then the second of each: so the first of them are of all, however few."""
    return torch.cat(list(lessons))[torch.cat([torch.arange(len(each)) for each in lessons]).argsort(stable=True)]


def _some(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:most]]


def _seen(data: Data, rows: Tensor, gate: Backbone) -> Tensor:
    """Images at `rows` as the gate sees them; of conversations, all that they show."""
    if isinstance(data, ImageSet):
        found: Tensor = seen_by(data.subset(rows), gate).__getitems__(range(len(rows)))["image"]
        return found
    pictures = [picture for each in data.__getitems__(rows.tolist())["conversation"] for picture in each.images]
    side = gate.preprocess.size
    if not pictures:
        return torch.zeros(0, 3, side, side, dtype=torch.uint8)
    given = ImageSet.queries(pictures, gate.preprocess)
    read: Tensor = given.__getitems__(range(len(pictures)))["image"]
    return read


def _words(data: Data, rows: Tensor) -> list[str]:
    if isinstance(data, Captioned):
        return [data.texts[row][0] for row in rows.tolist() if data.texts[row]]
    if isinstance(data, ConversationSet):
        return [each.question for each in data.__getitems__(rows.tolist())["conversation"]]
    return []


def _try_out(team: Specialists, router: LinUCB, seed: int) -> None:
    """Let the bandit ask one member about each example of the pool, and see whether it was right."""
    generator = torch.Generator().manual_seed(derived_seed(seed, 0, "rewards"))
    images, ids = team.pool.sample(10**6, generator)
    able, names = team.able("classes"), [name for _, name in team.record["classes"]]
    owners = [team.names[member] for member, _ in team.record["classes"]]
    rows = torch.tensor([row for row, c in enumerate(ids.tolist()) if owners[c] in able], dtype=torch.int64)
    if not len(rows):
        return
    images, truths = images[rows], [names[c] for c in ids[rows].tolist()]
    said = {name: [line[0][0] for line in team.members[name].predict(images, 1)] for name in able}
    features = unit_features(team.backbone, ImageSet.queries(images, team.backbone.preprocess))
    places = [team.names.index(name) for name in able]
    for row, (feature, truth) in enumerate(zip(features, truths, strict=True)):
        place = int(router.choose(feature.unsqueeze(0), places)[0])
        router.learn(feature, place, float(said[team.names[place]][row] == truth))
