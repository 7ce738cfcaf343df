"""What methods share that give each task an expert of its own, which learns alone and is frozen afterwards."""

from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from perdure.adapters.injection import Adapters
from perdure.adapters.low_rank import scale_of
from perdure.adapters.task_branches import TaskBranches, routed, sharing
from perdure.backbones.base import OneTower
from perdure.core.learner import Core
from perdure.core.method import Method, parts_of
from perdure.mechanisms.class_statistics import TaskMeans
from perdure.mechanisms.prompting import QUERY, conversation_query, query
from perdure.types import Batch, Task

ExpertTower = Literal["language", "vision"]
Keys = Literal["image,text", "image", "text"]
_LOOK = 4096  # examples of a task that the router is fitted to


class TaskRouter(Protocol):
    """What knows of each task what its examples look like; see `perdure.mechanisms.class_statistics`."""

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        ...

    def add(self, task: int, features: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """A task's keys (n, d), and the class of each."""
        ...

    def route(self, features: Tensor, bounded: bool = True) -> Tensor:
        """For each key the place of its task in `tasks`, int64 (n,); -1 for none, where it is `bounded`."""
        ...


class TaskExperts(Method):
    """Base of methods with an expert a task: here a low-rank branch in each chosen layer, see `TaskBranches`.

    In training every example takes the open expert. Else the router looks at the example's key: what the untouched
    model is given of its images and words, which nothing that is trained changes.

    Args:
        router: which has learnt nothing yet.
        tower: where experts stand; None is `language` in a language model, else `vision`.
        blocks: which blocks, all by default.
        rank, at, alpha: of the branches, see `LoRAExperts`; not read where `place` puts something else.
        keys: what the router looks at: images, words, or both; None is all there is.
    """

    changes_encoder, sole_adapter, follows_task, learns_aside = True, True, True, True
    apart = True
    """Whether an example whose task is told is answered by that task's expert alone."""
    fallback = False
    """Whether an example that no task knows takes no expert."""

    def __init__(
        self,
        router: TaskRouter,
        tower: ExpertTower | None,
        blocks: str | None = None,
        *,
        rank: int = 0,
        at: str = "",
        alpha: float | None = None,
        keys: Keys | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.at, self.blocks, self.tower, self.alpha, self.keys = rank, at, blocks, tower, alpha, keys
        self.treats = frozenset({tower} if tower else {"language", "vision"})
        self.experts: Adapters[Any] = Adapters()
        self.router = router

    def grow(self, learner: Core, task: Task) -> None:
        """A new expert."""
        talks = "conversations" in learner.objective.asks
        tower = self.tower or ("language" if talks else "vision")
        if talks != (tower == "language"):
            wanted = "language" if talks else "vision"
            raise ValueError(f"{self.name}(tower={tower!r}): each example has an expert in the {wanted} tower alone")
        if not talks and self.keys not in (None, "image"):
            raise ValueError(f"{self.name}(keys={self.keys!r}): an image comes without words here: write keys='image'")
        self.treats = frozenset({tower})
        if not len(self.experts):
            self.place(learner, tower)
        for expert in self.experts:
            expert.start(learner.device, task.index)

    def place(self, learner: Core, tower: OneTower) -> None:
        """Put what holds the experts into `tower`."""
        sites, scale = learner.backbone.sites(self.at, self.blocks, tower), scale_of(self.alpha, self.rank)
        self.experts.place(learner.backbone, sites, lambda site: TaskBranches(site, self.rank, scale), fold=False)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse parts that look at examples of old tasks, whose experts are finished."""
        if others := [part.name for part in parts_of(learner.method) if part.rehearses or part.gradient_projection]:
            raise ValueError(
                f"{others[0]} has no effect beside {self.name}, whose experts learn from their own task: leave it out"
            )

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the router looks at; nobody asks it in training."""
        return {} if learner.training else {QUERY: self.query(learner, batch)}

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, each example takes its expert; in training all take the one that learns, without being told."""
        if learner.training or not self.router.tasks:
            return super().applied(learner, batch, tower)
        return self.answering(learner, batch)

    def answering(self, learner: Core, batch: Batch) -> AbstractContextManager[None]:
        """Within, each example is answered by its expert."""
        return routed(list(self.experts), self.routes(learner, batch))

    def end_task(self, learner: Core, task: Task) -> None:
        """Close the expert, and let the router know the task's examples."""
        data = learner.method.data(learner, task)
        order = torch.randperm(len(data), generator=learner.generator(self.name))[:_LOOK]
        with learner.inference():
            asked = torch.cat([self.keys_of(learner, batch) for batch in learner.batches(data, 64, order)])
        labels = data.labels[order.to(data.labels.device)].to(asked.device)
        self.router.add(task.index, asked.clone(), labels, learner.generator(f"{self.name} router"))
        for expert in self.experts:
            expert.close(task.index)

    def routes(self, learner: Core, batch: Batch) -> Tensor:
        """For each example the task whose expert it takes, int64 (B,), or -1; the one that is told under "task"."""
        if "task" in batch:
            told: Tensor = batch["task"]
            return told
        tasks = torch.tensor([*self.router.tasks, -1], device=learner.device)
        return tasks[self.router.route(self.keys_of(learner, batch), bounded=self.fallback)]

    @torch.no_grad()
    def measures(self, learner: Core) -> dict[str, float]:
        """Of the test sets that are measured: shares of examples that take their own task's expert, and none."""
        right, none, total = 0, 0, 0
        with learner.inference():
            for task in learner.tasks if learner.tested is None else learner.tested:
                for batch in learner.batches(learner.cache.test(task.test), 64) if len(task.test) else ():
                    taken = self.routes(learner, batch)
                    right += int((taken == task.index).sum())
                    none += int((taken < 0).sum())
                    total += len(taken)
        shares = {"routing_accuracy": right / total, "fallback_share": none / total} if total else {}
        return {"experts": float(len(self.router.tasks)), **shares}

    def query(self, learner: Core, batch: Batch) -> Tensor:
        """Unit features of the untouched model (B, dim); of conversations those of images beside those of words."""
        if "conversations" in learner.objective.asks:
            return conversation_query(learner, batch)
        return query(learner, batch)

    def keys_of(self, learner: Core, batch: Batch) -> Tensor:
        """What the router looks at, (B, d)."""
        asked = self.query(learner, batch)
        if self.keys in (None, "image,text") or "conversations" not in learner.objective.asks:
            return asked
        images, words = asked.chunk(2, dim=1)
        return images if self.keys == "image" else words


class MixedExperts(TaskExperts):
    """Base of methods that mix experts by how like an example is to each task; their router is `TaskMeans`."""

    router: TaskMeans

    def grow(self, learner: Core, task: Task) -> None:
        """A new expert; it is known now of how many kinds a key is."""
        super().grow(learner, task)
        both = "conversations" in learner.objective.asks and self.keys in (None, "image,text")
        self.router.kinds = 2 if both else 1

    def answering(self, learner: Core, batch: Batch) -> AbstractContextManager[None]:
        """Within, every layer takes of each expert what `shares` say."""
        return sharing(list(self.experts), [self.shares(learner, batch)] * len(self.experts))

    def shares(self, learner: Core, batch: Batch) -> Tensor:
        """What each example takes of each expert, (B, experts); all of the one that is told under "task"."""
        every = torch.tensor(self.experts[0].tasks, device=learner.device)
        if "task" in batch:
            told: Tensor = batch["task"]
            return (told.unsqueeze(1) == every).float()
        found = self.router.shares(self.keys_of(learner, batch))
        shares = found.new_zeros(len(found), len(every))  # nothing of an expert whose task was forgotten
        shares[:, torch.isin(every, torch.tensor(self.router.tasks, device=every.device))] = found
        return shares
