"""MoE-Adapters: a mixture of bottleneck experts beside each MLP, with a router per task (Yu et al., CVPR 2024).

arXiv:2403.11549. In every block y + scale · Σ_e g_e · A_e(x), A_e a bottleneck, g the softmax over the `top` largest
scores of the task's router. After a task its router and the experts that it has used most are frozen; the others go on
learning. At test time nobody tells the task: a gateway (the paper's DDAS) sends an image through the router of the task
that knows it best, and an image that no task knows through the pre-trained model as it is.

Differs: every image is sent by itself, where the published code sends whole batches, and so leaks the task. The gateway
is in closed form: Gaussians on the pre-trained model's own features, where the paper trains an auto-encoder on
AlexNet's; its limit comes from training images alone. Experts stand in the vision tower only: a text has no task, and
the published router of the text tower reads a token that is the same for all texts. Routers read the mean of an image's
tokens; their noise has a fixed deviation. No dropout. `expand` is ours.
"""

import torch
from torch import Tensor

from perdure.adapters.attach import Adapters, attach
from perdure.adapters.experts import Experts, Routes, routing
from perdure.learner import Core
from perdure.memory.familiarity import Familiarity
from perdure.method import Method, at_least_zero, parts_of
from perdure.prompting import QUERY, query
from perdure.types import Batch, Data, Task

_OPEN_END = 8  # experts of a stream of which nobody knows the end
_LOOK = 1024  # images that say how new a task is


class MoEAdapters(Method, name="moe_adapters"):
    """Experts that tasks share, routers of their own, and a gateway that knows whose images it has seen.

    Args:
        experts: number in each block; None is `freeze` for each task of the stream (8 where its end is open), or,
            with `expand`, as many as an image takes.
        top: experts that an image takes.
        rank: units of an expert.
        scale: factor of what experts add.
        freeze: how many experts of each block, the most used ones, are frozen after a task.
        noise: deviation of what is added to a router's scores in training.
        known: share of a task's own images that the gateway is to know; less makes it stricter. Where none of the
            tasks knows an image, it gets exactly the pre-trained features.
        directions: of the covariance with which the gateway compares an image with a task's.
        expand: a task of whose images at least this share is known to no task before it brings `freeze` new experts;
            None leaves their number as it is.
        blocks: which blocks, all by default.
    """

    adapts, shares, guarantees = True, True, True
    records = (QUERY,)

    def __init__(
        self,
        experts: int | None = None,
        top: int = 2,
        rank: int = 16,
        scale: float = 0.1,
        freeze: int = 2,
        noise: float = 0.7,
        known: float = 0.99,
        directions: int = 16,
        expand: float | None = None,
        blocks: str | None = None,
    ) -> None:
        super().__init__()
        if top < 2:
            raise ValueError(
                f"top={top}: expected 2 or more; the only one of an image has weight 1, and routers no use"
            )
        if experts is not None and experts < top:
            raise ValueError(f"experts={experts}: expected at least top={top}, which an image takes")
        for name, value in (("rank", rank), ("directions", directions)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, such as 16")
        if scale <= 0:
            raise ValueError(f"scale={scale}: expected a positive factor, such as 0.1")
        at_least_zero(freeze=freeze, noise=noise)
        if not 0 < known <= 1:
            raise ValueError(f"known={known}: expected a share above 0 and at most 1, such as 0.99")
        if expand is not None and not 0 < expand <= 1:
            raise ValueError(f"expand={expand}: expected a share above 0 and at most 1, such as 0.5, or None")
        if expand is not None and not freeze:
            raise ValueError(f"expand={expand} has no effect with freeze=0, which brings no new experts: leave it out")
        self.experts, self.top, self.rank, self.scale = experts, top, rank, scale
        self.freeze, self.noise, self.expand, self.blocks = freeze, noise, expand, blocks
        self.adapters: Adapters[Experts] = Adapters()
        self.gateway = Familiarity(directions, known)

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        """Those of experts; a router belongs to its task."""
        return [p for name, p in self.named_parameters() if not name.endswith("router")]

    def grow(self, learner: Core, task: Task) -> None:
        """Experts at the first task, and a router for each."""
        if not len(self.adapters):
            backbone = learner.backbone
            firsts, lasts = (backbone.sites(at, self.blocks) for at in ("fc1", "fc2"))
            for pair in zip(firsts, lasts, strict=True):
                adapter = Experts(pair, self.rank, self.top, self.scale)
                adapter.add(self._first(task), learner.device)
                self.adapters.append(adapter)
                attach(backbone, pair, adapter)
        for adapter in self.adapters:
            adapter.open_router(learner.device)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Bring new experts where the images are new."""
        if self.expand is None or not self.gateway.tasks:
            return
        data = learner.method.data(learner, task)
        order = torch.randperm(len(data), generator=learner.generator("moe_adapters"))[:_LOOK]
        unknown = self.gateway.route(self._queries(learner, data, order)) < 0
        if unknown.float().mean() >= self.expand:
            for adapter in self.adapters:
                adapter.add(self.freeze, learner.device)
                adapter.open_router(learner.device)

    def record(self, learner: Core, batch: Batch) -> Batch:
        """Features of the pre-trained model, for the gateway, which is not asked in training."""
        return {} if learner.training else {QUERY: query(learner, batch)}

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """The batch as it is; a step begins."""
        for adapter in self.adapters:
            adapter.chosen = None
        return batch

    def after_step(self, learner: Core, batch: Batch) -> None:
        """Count which experts were taken."""
        for adapter in self.adapters:
            adapter.tally()

    def end_task(self, learner: Core, task: Task) -> None:
        """Let the gateway know the task's images; freeze its router and the experts that it has used most."""
        data = learner.method.data(learner, task)
        labels = data.labels.to(learner.device)
        mine = torch.isin(labels, torch.tensor(task.classes, device=learner.device)).nonzero().flatten()
        features = self._queries(learner, data, mine.cpu())
        self.gateway.add(task.index, features, labels[mine], learner.generator("moe_adapters end"))
        for adapter in self.adapters:
            adapter.close_router(task.index)
            adapter.freeze(self.freeze)

    def encode(self, learner: Core, batch: Batch) -> Tensor:
        """Features (B, dim): in training by the task's router, else by that of the task that knows an image best."""
        if learner.training and self.adapters[0].routes_new:  # which a task has until it ends
            routes = self._told(learner, batch)
        else:
            tasks = self.gateway.tasks
            routes = [Routes(tasks, self.gateway.route(query(learner, batch)))] * len(self.adapters)
        with routing(list(self.adapters), routes):
            return super().encode(learner, batch)

    def measures(self, learner: Core) -> dict[str, float]:
        """Experts of a block, and how many of them are frozen, as means over blocks."""
        blocks = len(self.adapters)
        return {
            "experts": sum(adapter.count for adapter in self.adapters) / blocks,
            "frozen_experts": sum(len(adapter.shut) for adapter in self.adapters) / blocks,
        }

    def _first(self, task: Task) -> int:
        if self.experts is not None:
            return self.experts
        by_rule = self.freeze * task.total if task.total and not self.expand else 0
        return max(self.top, by_rule or (self.top if self.expand else _OPEN_END))

    def _told(self, learner: Core, batch: Batch) -> list[Routes]:
        """Everything by the router in training; images of old tasks, as replay brings them, by those of their tasks."""
        images = next(iter(batch.values()))
        place = torch.zeros(len(images), dtype=torch.int64, device=learner.device)
        routers: list[int | None] = [None]
        if "label" in batch and len(learner.tasks) > 1 and any(part.rehearses for part in parts_of(learner.method)):
            owner = {c: task.index for task in learner.tasks for c in task.classes}
            routers += self.gateway.tasks
            table = torch.zeros(max(owner) + 1, dtype=torch.int64)
            for c, index in owner.items():
                table[c] = routers.index(index) if index in routers else 0
            place = table.to(learner.device)[batch["label"]]
        most = max(adapter.count for adapter in self.adapters)
        draw = torch.randn(
            len(self.adapters), len(images), most, generator=learner.generator("moe_adapters", learner.step)
        )
        noise = (self.noise * draw).to(learner.device)
        return [Routes(routers, place, its[:, : a.count]) for its, a in zip(noise, self.adapters, strict=True)]

    def _queries(self, learner: Core, data: Data, order: Tensor) -> Tensor:
        """Unit features (n, dim) of the pre-trained model."""
        with learner.inference():
            found = [query(learner, batch) for batch in learner.batches(data, 256, order)]
        # cloned: tensors made under inference_mode may not take part in training
        return torch.cat(found).clone()
