"""Specialists: finished learners of any method and backbone behind one face, of whom each question goes to one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from perdure.api.abilities import TOKENS
from perdure.api.given import asked, seen_by, shown, unit_features
from perdure.api.learner import Learner
from perdure.backbones.base import Backbone
from perdure.core.manifests import RECORD, read_record, read_specialists
from perdure.core.method import follows_task
from perdure.formatting import shortened
from perdure.mechanisms.experience_pool import ExperiencePool, pool_file, read_pool
from perdure.mechanisms.routing import LinUCB, Router, TextRouter, router_of
from perdure.options.ranges import BatchSize, Count, checking
from perdure.process import plain
from perdure.storage import schema
from perdure.storage.files import in_use, locked, place, write_sealed
from perdure.storage.schema import SPECIALISTS, MemberFacts, SpecialistsRecord
from perdure.streams import ImageSet
from perdure.streams.conversations import Conversation
from perdure.streams.sources import listed
from perdure.training.config import make_backbone

_SIZE = 256


@dataclass(frozen=True)
class Routed:
    """What one image was taken for, by whom, and whether it seems to be of a kind that some member was taught."""

    labels: list[tuple[str, float]]
    member: str
    known: bool


class Specialists:
    """Learners that stand together: a gate that looks, a router that chooses, a pool that remembers.

    ```python
    team = combine(["runs/birds", "runs/cars"], "team")
    team.predict(["cat.jpg"])                 # as a learner
    team.answers(["cat.jpg"])[0].member       # who answered
    ```

    Each question goes to a member that can answer it: images to those that learnt classes, words that are searched for
    to those that read texts, questions to those that speak; among several the router chooses, for each image by itself.
    A member that cannot be opened is told in `missing`; the others answer.

    Args:
        folder: where it lies.
        record: of specialists.json.
        gate: the frozen encoder whose features the router reads.
        pool: what is remembered of what members were taught.
        router: who chooses; None where all are asked and their shares averaged.
        members: those that could be opened, by name.
        missing: why the others could not.
    """

    def __init__(
        self,
        folder: Path,
        record: SpecialistsRecord,
        gate: Backbone,
        pool: ExperiencePool,
        router: Router | None,
        members: dict[str, Learner],
        missing: dict[str, str],
    ) -> None:
        self.folder, self.record, self.backbone = folder, record, gate
        self.pool, self.router, self.members, self.missing = pool, router, members, missing
        self._gone = "; ".join(f"left out is {name}: {why}" for name, why in missing.items())
        self.names = [facts["name"] for facts in record["members"]]

    @classmethod
    @plain()
    def load(cls, folder: str | Path, device: str | None = None) -> Self:
        """The specialists of a folder that `perdure combine` wrote; members that cannot be opened are left out.

        Raises:
            ValueError: when the folder is damaged, the gate's weights have changed, or no member can be opened.
        """
        folder = Path(folder)
        record = read_specialists(folder)
        gate = make_backbone(record["gate"]["spec"])
        if gate.fingerprint() != record["gate"]["fingerprint"]:
            raise ValueError(f"{record['gate']['spec']}, the gate of {folder}, has other weights now: restore them")
        gate = gate.requires_grad_(False).eval().to("cpu" if device in (None, "auto") else device)
        members: dict[str, Learner] = {}
        missing: dict[str, str] = {}
        for facts in record["members"]:
            try:
                members[facts["name"]] = member_of(facts, folder, device)
            except (ValueError, OSError) as error:
                missing[facts["name"]] = str(error)
        if not members:
            raise ValueError(
                f"none of the members of {folder} can be opened; the first: {next(iter(missing.values()))}"
            )
        for number, name in record["classes"]:
            member = members.get(record["members"][number]["name"])
            if member is not None and "classes" in member.objective.asks and name not in member.known:
                raise ValueError(
                    f"{record['members'][number]['name']} has forgotten {name!r} since {folder} was made, whose pool "
                    "still holds it: combine again"
                )
        tensors = read_pool(folder, record["sha256"])
        pool = ExperiencePool(record["pool_bytes"])
        pool.load_state_dict({k.removeprefix("pool."): v for k, v in tensors.items() if k.startswith("pool.")})
        router = router_of(record["route"], pool, [m for m, _ in record["classes"]], len(record["members"]), gate.dim)
        if isinstance(router, LinUCB):  # the others are made of the pool
            router.load_state_dict({k.removeprefix("router."): v for k, v in tensors.items() if "router." in k})
        if router is not None:
            router.limit = -torch.inf if record["known"] is None else record["known"]
        return cls(folder, record, gate, pool, router, members, missing)

    @plain()
    def save(self, held: bool = False) -> Path:
        """Write what `feedback` has changed; `held` says that the caller holds the folder already."""
        with nullcontext() if held else locked(self.folder):
            write_specialists(self.folder, self.record, self.pool, self.router)
        return self.folder

    @property
    def known(self) -> tuple[str, ...]:
        """Names of all classes that members who are there have learnt."""
        return tuple(dict.fromkeys(name for each in self.able("classes") for name in self.members[each].known))

    def able(self, asks: str) -> list[str]:
        """Members who are there and learnt `classes`, `captions` or `conversations`; or with `text` read texts."""
        if asks == "text":
            return [n for n, each in self.members.items() if "text" in each.backbone.towers() and not speaks(each)]
        return [n for n, each in self.members.items() if asks in each.objective.asks]

    def check_sees(self, call: str) -> None:
        """Raise a ValueError where no member can be asked for `call`, predict or search."""
        self._some("classes" if call == "predict" else "text", call)

    def check_speaks(self) -> None:
        """Raise a ValueError unless a member answers in words."""
        self._some("conversations", "ask")

    def _some(self, asks: str, call: str) -> list[str]:
        if able := self.able(asks):
            return able
        what = {"text": "reads texts", "conversations": "answers in words"}.get(asks, f"has learnt {asks}")
        raise ValueError(f"no member of {self.folder} {what}, which {call} needs: {self._gone or 'combine one'}")

    def _knowing(self, able: list[str], task: str | None, chosen: bool = False) -> list[str]:
        """Those of `able` who have learnt the task of that name, where one is named; `chosen` as in `_told`."""
        owners = [name for name in able if task is None or task in _tasks(self.members[name])]
        if not owners:
            tasks = ", ".join(dict.fromkeys(repr(each) for name in able for each in _tasks(self.members[name])))
            have = "; ".join(filter(None, [f"they have: {tasks}", self._gone]))
            raise ValueError(f"no member of {self.folder} who can be asked this has a task {task!r}; {have}")
        alone = owners == able and not self.missing  # whoever is left out may have other tasks
        if task is not None and alone and not any(_told(self.members[name], task, chosen) for name in able):
            raise ValueError(
                f"task={task!r} has no effect: all who can be asked have it, and answer the same whatever the task; "
                "leave it out"
            )
        return owners

    @plain()
    def route(self, images: Any, among: Sequence[str] | None = None) -> tuple[list[str], list[bool]]:
        """For each of `images` the member that is to be asked, and whether it seems of a kind that one was taught.

        Args:
            images: as in `Learner.predict`.
            among: members that come into question; None is all that learnt classes.
        """
        among = self._some("classes", "predict") if among is None else self._named(among)
        data = shown(images, self)
        if len(among) == 1 or not len(data):
            return among * len(data), [True] * len(data)
        if self.router is None:
            raise ValueError(f"{self.folder} asks all its members and chooses none: combine with another --route")
        return self._chosen(self.encode(data), among)

    def _named(self, members: Sequence[str]) -> list[str]:
        """`members`, refused where one is none of these."""
        if wrong := [name for name in listed(members, "members") if name not in self.names]:
            raise ValueError(f"member {wrong[0]!r} is none of {', '.join(self.names)}")
        return list(members)

    def _chosen(self, features: Tensor, among: Sequence[str]) -> tuple[list[str], list[bool]]:
        assert self.router is not None
        places, known = self.router.choose(features, [self.names.index(name) for name in among])
        return [self.names[place] for place in places.tolist()], known.tolist()

    def encode(self, data: ImageSet) -> Tensor:
        """The gate's features (n, d) of unit length."""
        return unit_features(self.backbone, data)

    @plain()
    @checking("top", "batch_size", "calibrated", "task")
    def answers(
        self,
        images: Any,
        top: Count | None = None,
        batch_size: BatchSize = _SIZE,
        classes: Sequence[str] | None = None,
        calibrated: bool = False,
        task: str | None = None,
    ) -> list[Routed]:
        """As `predict`, with who answered."""
        able = self._some("classes", "predict") if classes is None else self._some("text", "predict with classes")
        able = self._knowing(able, task, classes is None)
        data = shown(images, self)
        several = self.router is None and len(able) > 1
        who, known = (list(able), [True] * len(data)) if several else self.route(data, able)
        labels: list[dict[str, float]] = [{} for _ in range(len(data))]
        for name in dict.fromkeys(who):
            rows = range(len(data)) if several else [row for row, each in enumerate(who) if each == name]
            learner = self.members[name]
            told = _told(learner, task, classes is None)
            part = seen_by(data.subset(torch.tensor(rows, dtype=torch.int64)), learner.backbone)
            for row, line in zip(rows, learner.predict(part, None, batch_size, classes, calibrated, told), strict=True):
                for label, share in line:
                    labels[row][label] = labels[row].get(label, 0.0) + share / (len(able) if several else 1)
        best = [sorted(line.items(), key=lambda each: -each[1])[:top] for line in labels]
        names = [" + ".join(able)] * len(data) if several else who
        return [Routed(*each) for each in zip(best, names, known, strict=True)]

    def predict(self, images: Any, top: int | None = None, batch_size: int = _SIZE, **how: Any) -> list[Any]:
        """Class names with scores, best first, for each image: those of the member it is routed to.

        Args:
            images: as in `Learner.predict`.
            top: how many names; all when None.
            batch_size: images at once; the answer does not depend on it.
            how: `classes`, `calibrated` and `task`, see `Learner.predict`; only members with that task are asked.
        """
        return [each.labels for each in self.answers(images, top, batch_size, **how)]

    @plain()
    def search(
        self, images: Any, text: str, top: int = 5, batch_size: int = _SIZE, task: str | None = None
    ) -> list[tuple[int, float]]:
        """Which of `images` fit `text` best, by one member: see `Learner.search`.

        Of several the one whose texts are most like `text`; those that learnt captions go before those that did not,
        and only those with `task` are asked.
        """
        able = self._knowing(self._some("text", "search"), task)
        able = [name for name in able if name in self.able("captions")] or able
        learner = self.members[self._by_text([text], able)[0]]
        part = seen_by(shown(images, self), learner.backbone)
        return learner.search(part, text, top, batch_size, _told(learner, task))

    @plain()
    def ask(self, images: Any, question: str | Sequence[str], tokens: int = TOKENS, task: str | None = None) -> Any:
        """What a member that speaks answers to a question, or to several; see `Learner.ask`."""
        self.check_speaks()
        said = self.reply(asked(images, question, self), tokens, task)
        return said[0] if isinstance(question, str) else said

    @plain()
    def reply(self, conversations: Sequence[Conversation], tokens: int = TOKENS, task: str | None = None) -> list[str]:
        """What is said next in each of `conversations`: by whom its image is most like, or its words are."""
        able = self._knowing(self._some("conversations", "ask"), task)
        who = [self._speaker(each, able) for each in conversations]
        said = [""] * len(who)
        for name in dict.fromkeys(who):
            rows = [row for row, each in enumerate(who) if each == name]
            mine, learner = [conversations[row] for row in rows], self.members[name]
            for row, answer in zip(rows, learner.reply(mine, tokens, _told(learner, task)), strict=True):
                said[row] = answer
        return said

    def _speaker(self, conversation: Conversation, able: Sequence[str]) -> str:
        if len(able) == 1:
            return able[0]
        looks = () if self.router is None or isinstance(self.router, TextRouter) else self.router.judged
        if conversation.images and any(self.names[each] in able for each in looks):  # by texts: no image's label
            return self.route(list(conversation.images[:1]), able)[0][0]
        return self._by_text([conversation.question], able)[0]

    def _by_text(self, texts: Sequence[str], among: Sequence[str]) -> list[str]:
        """For each of `texts` the member that was taught the most similar ones."""
        if len(among) == 1:
            return [among[0]] * len(texts)
        kept = {name: self.pool.texts.get(str(self.names.index(name))) for name in among}
        if not (near := {name: rows for name, rows in kept.items() if rows is not None}):
            raise ValueError(
                f"{' and '.join(among)} can answer, and {self.folder} holds no texts of theirs to choose by: "
                "combine with a --gate that reads texts, such as 'pocket()', or ask one of them by itself"
            )
        with torch.inference_mode():
            features = F.normalize(self.backbone.encode_text(list(texts)).float(), dim=1)
        scores = torch.stack([(features @ rows.to(features).T).amax(1) for rows in near.values()], dim=1)
        return [list(near)[place] for place in scores.argmax(1).tolist()]

    @plain()
    def feedback(self, images: Any, members: Sequence[str], rewards: Sequence[float]) -> None:
        """What answers were worth: the bandit learns from it. `save` keeps it.

        Args:
            images: as in `predict`.
            members: who answered on each, as `answers` says.
            rewards: 1 for a right answer, 0 for a wrong one, or anything between.

        Raises:
            ValueError: when members are chosen by something else than rewards, or numbers differ.
        """
        if not isinstance(self.router, LinUCB):
            raise ValueError(f"{self.folder} chooses by {self.record['route']}, not by rewards: use --route linucb")
        data, named, worth = shown(images, self), self._named(members), list(map(_worth, listed(rewards, "rewards")))
        if len({len(data), len(named), len(worth)}) > 1:
            raise ValueError(f"got {len(data)} images, {len(named)} members, {len(worth)} rewards: give as many")
        for feature, name, reward in zip(self.encode(data), named, worth, strict=True):
            self.router.learn(feature, self.names.index(name), reward)


def opened(folder: str | Path, device: str | None = None) -> Learner | Specialists:
    """What lies in a folder: a learner, or specialists."""
    found = Specialists if (Path(folder) / SPECIALISTS).is_file() else Learner
    return found.load(folder, device)


def member_of(facts: MemberFacts, folder: Path, device: str | None = None) -> Learner:
    """The learner that specialists.json in `folder` describes.

    Raises:
        ValueError: when it is gone, another one, damaged, or being taught.
    """
    places = Path(facts["folder"]), folder / facts["beside"]
    there = next((each for each in places if (each / RECORD).is_file()), None)
    if there is None:
        raise ValueError(f"{facts['folder']} is not there, or has no {RECORD}: bring it back, or combine the others")
    if schema.seal(read_record(there)) != facts["run"]:
        raise ValueError(f"{there} holds another learner than was combined: combine again")
    if in_use(there):
        raise ValueError(f"{there} is locked, another process is working in it: wait until that is done")
    learner = Learner.load(there, device)
    if learner.learnt < facts["learnt"]:
        raise ValueError(
            f"{there} has {learner.learnt} of the {facts['learnt']} tasks that it had when it was combined: restore "
            "them, or combine again"
        )
    return learner


def write_specialists(folder: Path, record: Any, pool: ExperiencePool, router: Router | None) -> None:
    """Write the pool under a name of its own, then the record that names it, then remove the pool before."""
    tensors = {f"pool.{k}": v for k, v in pool.state_dict().items()}
    if isinstance(router, LinUCB):
        tensors |= {f"router.{k}": v for k, v in router.state_dict().items()}
    content: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    limit = None if router is None or router.limit == -torch.inf else router.limit
    folder.mkdir(parents=True, exist_ok=True)
    place(pool_file(folder, digest), content)
    record = {k: v for k, v in record.items() if k != "seal"} | {"sha256": digest, "known": limit}
    write_sealed(folder / SPECIALISTS, record)
    for old in folder.glob("pool-*.safetensors"):
        if old != pool_file(folder, digest):
            old.unlink()


def _worth(reward: float) -> float:
    found = math.nan
    with suppress(TypeError, ValueError):
        found = float(reward)
    if not 0 <= found <= 1:
        raise ValueError(f"a reward is {shortened(repr(reward))}: expected a number from 0 to 1")
    return found


def _tasks(learner: Learner) -> list[str]:
    return [task.name for task in learner.tasks[: learner.learnt] if not task.pretext]


def _told(learner: Learner, task: str | None, chosen: bool = False) -> str | None:
    """`task` where it changes what `learner` answers; else it has said who is asked, which is an effect too.

    `chosen` says that answers are chosen among the classes that were learnt, of which a task may have fewer.
    """
    if task is None or follows_task(learner.method):
        return task
    own = [{*each.classes} for each in learner.tasks[: learner.learnt] if each.name == task]
    return task if chosen and own != [{*learner.objective.classes}] else None


def speaks(learner: Learner) -> bool:
    """Whether it answers in words."""
    return "conversations" in learner.objective.asks
