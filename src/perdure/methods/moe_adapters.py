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
Routers read the mean of an input's tokens; their noise has a fixed deviation. No dropout. Growth is ours. In a language
model, whose norms are of kinds of their own, x is what the MLP itself reads.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from torch import nn

from perdure.adapters.experts import Experts, routing
from perdure.backbones.base import Tower, named_towers
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import ClassTable, TaskGaussians
from perdure.mechanisms.expert_mixture import Mixture, pretrained_features
from perdure.mechanisms.prompting import QUERY, PerTower, check_routes_once, conversation_query, query
from perdure.options.ranges import Factor, Range, Rank, Share, Strength, without_effect
from perdure.types import Batch, Task

_OPEN_END = 8  # experts of a stream of which nobody knows the end
_LOOK = 1024  # images or texts that say how new a task is
_NOVEL = 0.5  # share of strange images that makes a task new


class MoEAdapters(PerTower[Mixture], name="moe_adapters"):
    """Experts that tasks share, routers of their own, and task identification by the images seen.

    Args:
        experts: number in each block; None is `freeze` for each task of the stream (8 where its end is open), or,
            where it grows, as many as an image takes.
        top: experts that an image or text takes.
        rank: units of an expert.
        scale: factor of what experts add.
        freeze: how many experts of each block, the most used ones, are frozen after a task.
        noise: deviation of what is added to a router's scores in training.
        known: share of a task's own images, or texts, that it is to know; less is stricter. Where no task knows
            one, it gets exactly the pre-trained features.
        directions: of the covariance with which an image is compared with a task's.
        grow: "novel" lets a task bring `freeze` new experts where its images (texts) are new, and a repeated one none;
            None leaves their number as it is, unless `expand` is given.
        expand: share of its images (texts) that no former task knows by which a task is new; with "novel", None is 0.5.
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
        grow: Literal["novel"] | None = None,
        expand: Share | None = None,
        blocks: str | None = None,
        tower: Tower = "vision",
    ) -> None:
        super().__init__(tower)
        if experts is not None and experts < top:
            raise ValueError(f"experts={experts}: expected at least top={top}, which an image takes")
        if not freeze:
            without_effect("with freeze=0, which brings no new experts", expand=expand, grow=grow)
        self.experts, self.top, self.rank, self.scale = experts, top, rank, scale
        self.freeze, self.noise, self.blocks = freeze, noise, blocks
        self.expand = _NOVEL if grow and expand is None else expand
        self.directions, self.known = directions, known

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those of experts; a router belongs to its task."""
        return [p for name, p in self.named_parameters() if not name.endswith("router")]

    def grow(self, learner: Core, task: Task) -> None:
        """Experts at the first task, and a router for each."""
        check_routes_once(learner, self)
        for tower in named_towers(self.tower):
            if tower in self.towers:
                self.of(tower).open(0, learner.device)
                continue
            names = tower == "text" and "classes" in learner.objective.asks
            identifier = ClassTable() if names else TaskGaussians(self.directions, self.known)
            own, count = Mixture(identifier, tower, self.noise), self._first(task)
            own.place(learner, self.blocks, self.rank, self.top, self.scale, count)
            own.open(count, learner.device)
            self.towers[tower] = own

    def begin_task(self, learner: Core, task: Task) -> None:
        """Bring new experts where the images, or texts, are new."""
        if self.expand is None or not learner.learnt:
            return
        for tower in named_towers(self.tower):
            own, data = self.of(tower), learner.method.data(learner, task)
            order = torch.randperm(len(data), generator=learner.generator("moe_adapters"))[:_LOOK]
            unknown = own.task_identifier.route(pretrained_features(learner, data, order, tower)[0]) < 0
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
            identifier = self.of(tower).task_identifier
            features, labels = pretrained_features(learner, data, mine, tower)
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
            routes = own.in_training(learner, len(next(iter(batch.values()))), batch.get("label"), counted, seen)
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
