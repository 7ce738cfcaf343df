"""One LoRA for each task, and a router that picks one for each example, or none: isolated experts.

Ours, of what leads the published tables of continual instruction tuning: MR-LoRA (arXiv:2506.05453) trains each expert
from the same model and asks a second language model which to take; HiDe-LLaVA (arXiv:2503.12941) and DISCO mix
experts by similarities to means of CLIP's features.

`end_task` fits, in closed form, a Gaussian to the keys of the task's examples: what the untouched model is given of
their images and words. `applied` sends each example to the task under which its key is likeliest. An example that lies
farther from every task than `threshold` of the training examples do, each judged by Gaussians that were fitted without
it, is answered by the untouched model.

Differs: nothing is asked of a batch as a whole, no examples of old tasks are kept, experts never mix.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from perdure.adapters.injection import Adapters, attach
from perdure.adapters.task_branches import TaskBranches, routed
from perdure.core.learner import Core
from perdure.core.method import Method, parts_of
from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.prompting import QUERY, conversation_query, query
from perdure.options.ranges import Factor, Rank, Share, without_effect
from perdure.types import Batch, Data, Task

_LOOK = 4096  # examples of a task that its Gaussian is fitted to
_DIRECTIONS = 16
_THRESHOLD = 0.99


class LoRAExperts(Method, name="lora_experts"):
    """A branch a task, each trained from the pre-trained model alone; every example takes the one that knows it.

    Args:
        rank: inner dimension of an expert.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: where experts stand; None is `language` in a language model, else `vision`.
        alpha: scale times rank; None means a scale of 1.
        keys: what the router looks at: an example's images, its words (without answers), or both; None is all there is.
        fallback: whether what no expert knows is answered by the untouched model; False takes the nearest expert.
        threshold: with `fallback`, share of a task's own examples that its expert is to know; None is 0.99.
    """

    changes_encoder, sole_adapter, follows_task = True, True, True

    def __init__(
        self,
        rank: Rank = 16,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: Literal["language", "vision"] | None = None,
        alpha: Factor | None = None,
        keys: Literal["image,text", "image", "text"] | None = None,
        fallback: bool = True,
        threshold: Share | None = None,
    ) -> None:
        super().__init__()
        if not fallback:
            without_effect("with fallback=False", threshold=threshold)
        self.rank, self.at, self.blocks, self.tower, self.alpha = rank, at, blocks, tower, alpha
        self.keys, self.fallback = keys, fallback
        self.treats = frozenset({tower} if tower else {"language", "vision"})
        self.experts: Adapters[TaskBranches] = Adapters()
        self.router = TaskGaussians(_DIRECTIONS, _THRESHOLD if threshold is None else threshold)

    def grow(self, learner: Core, task: Task) -> None:
        """A new expert."""
        talks = "conversations" in learner.objective.asks
        tower = self.tower or ("language" if talks else "vision")
        if talks != (tower == "language"):
            wanted = "language" if talks else "vision"
            raise ValueError(f"lora_experts(tower={tower!r}): each example has an expert in the {wanted} tower alone")
        if not talks and self.keys not in (None, "image"):
            raise ValueError(f"lora_experts(keys={self.keys!r}): an image comes without words here: write keys='image'")
        self.treats = frozenset({tower})
        if not len(self.experts):
            scale = 1.0 if self.alpha is None else self.alpha / self.rank
            for site in learner.backbone.sites(self.at, self.blocks, tower):
                expert = TaskBranches(site, self.rank, scale)
                self.experts.append(expert)
                attach(learner.backbone, [site], expert, fold=False)
        for expert in self.experts:
            expert.start(learner.device)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse parts that bring examples of old tasks, whose experts are finished."""
        if others := [part.name for part in parts_of(learner.method) if part.rehearses]:
            raise ValueError(
                f"{others[0]} has no effect beside lora_experts, whose experts learn from their own task: leave it out"
            )

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the router looks at; nobody asks it in training."""
        return {} if learner.training else {QUERY: self._query(learner, batch)}

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, each example takes its expert; in training all take the one that learns, without being told."""
        if learner.training:
            return super().applied(learner, batch, tower)
        return routed(list(self.experts), self.routes(learner, batch))

    def end_task(self, learner: Core, task: Task) -> None:
        """Close the expert, and let the router know the task's examples."""
        data = learner.method.data(learner, task)
        order = torch.randperm(len(data), generator=learner.generator("lora_experts"))[:_LOOK]
        with learner.inference():
            asked = torch.cat([self._keys(learner, batch) for batch in learner.batches(data, 64, order)])
        labels = data.labels[order.to(data.labels.device)].to(asked.device)
        self.router.add(task.index, asked.clone(), labels, learner.generator("lora_experts router"))
        for expert in self.experts:
            expert.close(task.index)

    def routes(self, learner: Core, batch: Batch) -> Tensor:
        """For each example the task whose expert it takes, int64 (B,), or -1; the one that is told under "task"."""
        if "task" in batch:
            told: Tensor = batch["task"]
            return told
        tasks = torch.tensor([*self.router.tasks, -1], device=learner.device)
        return tasks[self.router.route(self._keys(learner, batch), bounded=self.fallback)]

    @torch.no_grad()
    def measures(self, learner: Core) -> dict[str, float]:
        """Of the test sets at hand: shares of examples that take their own task's expert, and that take none."""
        right, none, total = 0, 0, 0
        with learner.inference():
            for task in learner.tasks:
                for batch in learner.batches(self._tests(learner, task), 64) if len(task.test) else ():
                    taken = self.routes(learner, batch)
                    right += int((taken == task.index).sum())
                    none += int((taken < 0).sum())
                    total += len(taken)
        shares = {"routing_accuracy": right / total, "fallback_share": none / total} if total else {}
        return {"experts": float(len(self.router.tasks)), **shares}

    def _tests(self, learner: Core, task: Task) -> Data:
        return learner.cache.test(task.test)

    def _query(self, learner: Core, batch: Batch) -> Tensor:
        """Unit features of the untouched model (B, dim); of conversations those of images beside those of words."""
        if "conversations" in learner.objective.asks:
            return conversation_query(learner, batch)
        return query(learner, batch)

    def _keys(self, learner: Core, batch: Batch) -> Tensor:
        asked = self._query(learner, batch)
        if self.keys in (None, "image,text") or "conversations" not in learner.objective.asks:
            return asked
        images, words = asked.chunk(2, dim=1)
        return images if self.keys == "image" else words
