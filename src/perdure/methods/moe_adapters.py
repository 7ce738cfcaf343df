"""MoE-Adapters: a mixture of bottleneck experts beside each MLP, with a router per task (Yu et al., CVPR 2024).

arXiv:2403.11549. In every block y + scale · Σ_e g_e · A_e(x), x what enters the norm before the MLP (as in the
published code), A_e a bottleneck, g the softmax over the `top` largest scores of the task's router. After a task its
router and the experts that it has used most are frozen; the others go on learning. At test time nobody tells the task:
task identification (the paper's DDAS) sends an image through the router of the task that knows it best, and an image
that no task knows through the pre-trained model as it is.

Differs: every image is sent by itself, where the published code sends whole batches, and so leaks the task. Tasks are
identified in closed form: Gaussians on the pre-trained model's own features, where the paper trains an auto-encoder on
AlexNet's; the limit comes from training images alone. Texts go their own way: a class name through the router of the
task that taught it, a caption as an image does, where the published code sends them where the images go, and its router
reads a token that is the same for all texts. By default experts stand in the vision tower only (published: in both).
Routers read the mean of an input's tokens; their noise has a fixed deviation. No dropout. `expand` is ours.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Annotated

import torch
from torch import Tensor, nn

from perdure.adapters.experts import Experts, Routes, routing
from perdure.adapters.injection import Adapters, attach, overhear
from perdure.backbones.base import OneTower, Tower, named_towers
from perdure.core.learner import Core
from perdure.core.method import parts_of
from perdure.core.sharing import Portion
from perdure.formatting import room_for
from perdure.mechanisms.class_statistics import ClassTable, TaskGaussians
from perdure.mechanisms.prompting import QUERY, PerTower, check_routes_once, conversation_query, query, text_query
from perdure.options.ranges import Factor, Range, Rank, Share, Strength
from perdure.types import Batch, Data, Task

_OPEN_END = 8  # experts of a stream of which nobody knows the end
_LOOK = 1024  # images or texts that say how new a task is
_CHUNK = 256


class Mixture(nn.Module):
    """Experts in the blocks of one tower, and what knows whose inputs they have seen.

    Args:
        task_identifier: of this tower; a table where its inputs are class names.
    """

    def __init__(self, task_identifier: TaskGaussians | ClassTable) -> None:
        super().__init__()
        self.adapters: Adapters[Experts] = Adapters()
        self.task_identifier = task_identifier

    @property
    def learning(self) -> bool:
        """Whether there are routers in training, which a task has until it ends."""
        return next(iter(self.adapters)).routes_new

    def by_itself(
        self,
        asked: Tensor,
        counted: Tensor | None = None,
        seen: Tensor | None = None,
        told: Tensor | None = None,
    ) -> list[Routes]:
        """Every input by the router of the task that knows its query (n, dim) best, or of that which it is `told`."""
        tasks = self.task_identifier.tasks  # in the order in which they were learnt
        if told is None:
            place = self.task_identifier.route(asked)
        else:
            place = torch.searchsorted(torch.tensor(tasks, device=told.device), told)
        routes = Routes(tasks, place, counted=counted, seen=seen)
        return [routes] * len(self.adapters)

    def open(self, count: int, device: torch.device) -> None:
        """`count` new experts in each block, and a new router over them all."""
        for adapter in self.adapters:
            adapter.add(count, device)
        for adapter in self.adapters:
            adapter.open_router(device)


class MoEAdapters(PerTower[Mixture], name="moe_adapters"):
    """Experts that tasks share, routers of their own, and task identification by the images seen.

    Args:
        experts: number in each block; None is `freeze` for each task of the stream (8 where its end is open), or,
            with `expand`, as many as an image takes.
        top: experts that an image or text takes.
        rank: units of an expert.
        scale: factor of what experts add.
        freeze: how many experts of each block, the most used ones, are frozen after a task.
        noise: deviation of what is added to a router's scores in training.
        known: share of a task's own images, or texts, that it is to know; less is stricter. Where no task knows
            one, it gets exactly the pre-trained features.
        directions: of the covariance with which an image is compared with a task's.
        expand: a task of whose images (texts) at least this share is known to no task before it brings `freeze` new
            experts; None leaves their number as it is.
        blocks: which blocks, all by default.
        tower: which encoder; each has experts, routers and task identification of its own.
    """

    trains_shared, follows_task, encodes_once = True, True, True

    def __init__(
        self,
        experts: Annotated[int, Range(2, 1024)] | None = None,
        top: Annotated[int, Range(2, 1024)] = 2,  # the only one of an image has weight 1, and routers no use
        rank: Rank = 16,
        scale: Factor = 0.1,
        freeze: Annotated[int, Range(0, 1024)] = 2,
        noise: Strength = 0.7,
        known: Share = 0.99,
        directions: Rank = 16,
        expand: Share | None = None,
        blocks: str | None = None,
        tower: Tower = "vision",
    ) -> None:
        super().__init__(tower)
        if experts is not None and experts < top:
            raise ValueError(f"experts={experts}: expected at least top={top}, which an image takes")
        if expand is not None and not freeze:
            raise ValueError(f"expand={expand} has no effect with freeze=0, which brings no new experts: leave it out")
        self.experts, self.top, self.rank, self.scale = experts, top, rank, scale
        self.freeze, self.noise, self.expand, self.blocks = freeze, noise, expand, blocks
        self.directions, self.known = directions, known

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those of experts; a router belongs to its task."""
        return [p for name, p in self.named_parameters() if not name.endswith("router")]

    def grow(self, learner: Core, task: Task) -> None:
        """Experts at the first task, and a router for each."""
        backbone = learner.backbone
        check_routes_once(learner, self)
        for tower in named_towers(self.tower):
            if tower in self.towers:
                self.of(tower).open(0, learner.device)
                continue
            firsts, lasts = (backbone.sites(at, self.blocks, tower) for at in ("fc1", "fc2"))
            number = self._first(task)
            widths = sum(first.fan_in + last.fan_out for first, last in zip(firsts, lasts, strict=True))
            room_for(4 * number * self.rank * widths, f"moe_adapters with {number} experts of rank={self.rank}")
            names = tower == "text" and "classes" in learner.objective.asks
            self.towers[tower] = own = Mixture(ClassTable() if names else TaskGaussians(self.directions, self.known))
            for pair in zip(firsts, lasts, strict=True):
                norm = backbone.norm_before(pair[0])
                adapter = Experts(pair, self.rank, self.top, self.scale, norm is not None)
                own.adapters.append(adapter)
                attach(backbone, pair, adapter)
                if norm is not None:
                    overhear(backbone, pair[0], norm, adapter.overhear)
            own.open(number, learner.device)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Bring new experts where the images, or texts, are new."""
        if self.expand is None or not learner.learnt:
            return
        for tower in named_towers(self.tower):
            own, data = self.of(tower), learner.method.data(learner, task)
            order = torch.randperm(len(data), generator=learner.generator("moe_adapters"))[:_LOOK]
            unknown = own.task_identifier.route(self._read(learner, data, order, tower)[0]) < 0
            if unknown.float().mean() >= self.expand:
                own.open(self.freeze, learner.device)

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """Features of the pre-trained model, to identify tasks; of conversations routers read them too, in training."""
        if "language" in self.treats:
            return {QUERY: conversation_query(learner, batch)}
        return {QUERY: query(learner, batch)} if "vision" in self.treats and not learner.training else {}

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """The batch as it is; a step begins."""
        for adapter in self._all():
            adapter.chosen = None
        return batch

    def after_step(self, learner: Core, batch: Batch) -> None:
        """Count which experts were taken."""
        for adapter in self._all():
            adapter.tally(learner.processes.sum)

    def end_task(self, learner: Core, task: Task) -> None:
        """Learn to identify the task's images and texts; freeze its routers and the experts it has used most."""
        data = learner.method.data(learner, task)
        mine = torch.isin(data.labels.cpu(), torch.tensor(task.classes)).nonzero().flatten()
        for tower in named_towers(self.tower):
            identifier, (features, labels) = self.of(tower).task_identifier, self._read(learner, data, mine, tower)
            if isinstance(identifier, ClassTable):
                identifier.add(task.index, features)
            else:
                identifier.add(task.index, features, labels, learner.generator("moe_adapters end"))
        for adapter in self._all():
            adapter.close_router(task.index)
            adapter.freeze(self.freeze)

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, inputs take experts: in training by the task's router, else by that of who knows each one best."""
        own, counted = self.of(tower), learner.backbone.counted(batch) if tower == "text" else None
        asked = None if learner.training and tower != "language" else self.asked_of(learner, batch, tower)
        seen = asked.chunk(2, dim=1)[1] if asked is not None and tower == "language" else None
        if learner.training and own.learning:
            routes = self._told(learner, tower, len(next(iter(batch.values()))), batch.get("label"), counted, seen)
        else:
            asked = self.asked_of(learner, batch, tower) if asked is None else asked
            routes = own.by_itself(asked, counted, seen, batch.get("task"))
        return routing(list(own.adapters), routes)

    def measures(self, learner: Core) -> dict[str, float]:
        """Experts of a block, and how many of them are frozen, as means over blocks."""
        experts = list(self._all())
        return {
            "experts": sum(adapter.count for adapter in experts) / len(experts),
            "frozen_experts": sum(len(adapter.shut) for adapter in experts) / len(experts),
        }

    def _all(self) -> Iterator[Experts]:
        return (adapter for own in self.placed() for adapter in own.adapters)

    def _first(self, task: Task) -> int:
        if self.experts is not None:
            return self.experts
        by_rule = self.freeze * task.total if task.total and not self.expand else 0
        return max(self.top, by_rule or (self.top if self.expand else _OPEN_END))

    def _told(
        self,
        learner: Core,
        tower: str,
        count: int,
        labels: Tensor | None,
        counted: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> list[Routes]:
        """Everything by the router in training; what is of old tasks, as replay brings it, by those of its task."""
        adapters = self.of(tower).adapters
        place = torch.zeros(count, dtype=torch.int64, device=learner.device)
        routers: list[int | None] = [None]
        # class names of old tasks are read in every step
        mixed = tower == "text" or any(part.rehearses for part in parts_of(learner.method))
        if labels is not None and len(learner.tasks) > 1 and mixed:
            owner = {c: task.index for task in learner.tasks for c in task.classes}
            routers += self.of(tower).task_identifier.tasks
            table = torch.zeros(max(owner) + 1, dtype=torch.int64)
            for c, index in owner.items():
                table[c] = routers.index(index) if index in routers else 0
            place = table.to(learner.device)[labels]
        most = max(adapter.count for adapter in adapters)
        purpose = "moe_adapters" if tower == "vision" else "moe_adapters text"
        generator = learner.generator(purpose, learner.step)
        # what a process draws for its part of a batch is what one would draw for it of the whole
        part = learner.part or Portion(range(count), count)
        draw = torch.randn(len(adapters), part.of, most, dtype=torch.float32, generator=generator)
        draw = draw[:, part.rows.start : part.rows.stop]
        tallied = learner.part is not None or learner.processes.first  # what all read counts once
        # routers of former tasks have nothing to try out any more
        noise = (self.noise * draw).to(learner.device) * (place == 0).unsqueeze(1)
        return [
            Routes(routers, place, its[:, : a.count], counted, seen, tallied)
            for its, a in zip(noise, adapters, strict=True)
        ]

    def _read(self, learner: Core, data: Data, order: Tensor, tower: OneTower) -> tuple[Tensor, Tensor]:
        """Unit features (n, dim) of images, or of what is said of them, by the pre-trained model, and labels (n,)."""
        with learner.inference():
            if tower != "text":
                found = [self.asked_of(learner, batch, tower) for batch in learner.batches(data, _CHUNK, order)]
                labels = data.labels.to(learner.device)[order.to(learner.device)]
            else:
                texts = self._texts(learner, data, order)
                lines, labels = list(texts), torch.tensor(list(texts.values()), device=learner.device)
                found = [
                    text_query(learner, learner.backbone.tokenised(lines[start : start + _CHUNK]))
                    for start in range(0, len(lines), _CHUNK)
                ]
        # cloned: tensors made under inference_mode may not take part in training
        return torch.cat(found).clone(), labels.clone()

    @staticmethod
    def _texts(learner: Core, data: Data, order: Tensor) -> dict[str, int]:
        """The class names of the task, or all captions of the images, and of which class each is."""
        found: dict[str, int] = {}
        if "classes" in learner.objective.asks:
            lines, labels = learner.objective.texts(learner, {})
            return dict(zip(lines, labels.tolist(), strict=True))
        for batch in learner.batches(data, _CHUNK, order):
            for texts, label in zip(batch["text"], batch["label"].tolist(), strict=True):
                found |= dict.fromkeys(texts, label)
        return found
