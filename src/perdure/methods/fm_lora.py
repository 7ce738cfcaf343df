"""FM-LoRA: factorised low-rank updates with a dynamic rank and a meta-prompt (Yu et al., CVPR workshops 2025).

arXiv:2504.08823. There is no public implementation, and of the paper only its abstract and digests were at hand: this
is a re-implementation, not a replication. Three parts, each of which can be switched off:

- F-LoRA: ΔW_t = A M_t N_tᵀ B, bases A and B learnt with the first task, then frozen; later tasks train M_t, N_t.
- DRS: the rank r_t of M_t, N_t is chosen per task, see `perdure.drs`.
- DMP: m prompt tokens, shared and trained by all tasks, without position.

What the source fixes: the factorisation, the rule of DRS, that prompts are shared. What we chose: the bases are made
orthonormal after the first task and their triangular factors go into the core; M_t starts orthogonal and N_t at zero,
so that a task starts from the function of the last; all branches add up in one core (`reading`); after the first task
prompts learn at a tenth of the rate and are pulled to their last values; every value of every option.

What it does not do: old inputs pass through B too, so a small core limits interference but does not remove it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.attach import Adapters
from perdure.adapters.bases import Bases
from perdure.adapters.lowrank import LowRank
from perdure.adapters.tokens import Tokens
from perdure.backbones.base import Tower
from perdure.drs import DRS, Mode
from perdure.learner import Core
from perdure.memory.tensors import Tensors
from perdure.method import Method
from perdure.types import Batch, Task

Reading = Literal["accumulate", "per_task", "continued"]


class FMLoRA(Method, name="fm_lora"):
    """Shared bases, a small core a task, a rank chosen per task, and shared prompt tokens.

    Args:
        rank: dimension of the shared bases (r).
        ranks: candidates for r_t, or one number for all tasks; None means a quarter, a half and all of `rank`.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder the bases are in; prompts are in the vision tower.
        share: False gives each task a fresh LoRA of rank r_t instead of a core between shared bases.
        reading: how cores meet at test time, which the source does not say: `accumulate` adds them up (no task id
            needed, folded into the weights); `per_task` keeps each and routes an image to the core of the nearest class
            mean of the pre-trained features; `continued` goes on training one M and N.
        drs: rule of the rank, `fixed` takes the largest of `ranks`.
        rank_cost: price of the largest rank, see `DRS`.
        warm_up: epochs of the warm-up.
        prompts: number m of prompt tokens; 0 for none.
        prompt_lr: the prompts' learning rate after the first task, as a factor of the run's.
        prompt_pull: weight of ‖P - P_{t-1}‖² after the first task.
        freeze_prompts: train them in the first task only.
    """

    adapts = True

    def __init__(
        self,
        rank: int = 16,
        ranks: int | Sequence[int] | None = None,
        at: str = "qv",
        blocks: str | None = None,
        tower: Tower = "vision",
        share: bool = True,
        reading: Reading = "accumulate",
        drs: Mode = "affine",
        rank_cost: float = 0.5,
        warm_up: int = 1,
        prompts: int = 4,
        prompt_lr: float = 0.1,
        prompt_pull: float = 0.01,
        freeze_prompts: bool = False,
    ) -> None:
        super().__init__()
        candidates = (max(1, rank // 4), max(1, rank // 2), rank) if ranks is None else ranks
        candidates = (candidates,) if isinstance(candidates, int) else tuple(candidates)
        if max(candidates, default=0) > rank:
            raise ValueError(f"ranks={candidates}: expected at most rank={rank}, the dimension of the shared bases")
        if reading != "accumulate" and not share:
            raise ValueError(f"reading={reading!r} is about cores between shared bases: leave out share=False")
        if reading == "continued" and drs != "fixed":
            raise ValueError(
                "reading='continued' goes on with one M and N, whose rank cannot change: write drs='fixed'"
            )
        if prompts < 0:
            raise ValueError(f"prompts={prompts}: expected a number of tokens, or 0 for none")
        self.rank, self.at, self.blocks, self.tower = rank, at, blocks, tower
        self.share, self.reading = share, reading
        self.prompts, self.prompt_lr, self.prompt_pull = prompts, prompt_lr, prompt_pull
        self.freeze_prompts = freeze_prompts
        self.leaves = frozenset() if reading == "per_task" else frozenset({"encode"})
        self.drs = DRS(candidates, drs, rank_cost, warm_up)
        self.bases: Adapters[Bases] = Adapters()
        self.branches: Adapters[LowRank] = Adapters()  # instead of the bases, when they are not shared
        self.tokens: Tokens | None = None
        self.kept = Tensors()  # "prompt": P of the last task; "means/<task>": unit class means of pre-trained features

    def grow(self, learner: Core, task: Task) -> None:
        """Bases and prompts at the first task; then a new core, open with the largest rank."""
        backbone = learner.backbone
        sites = backbone.sites(self.at, self.blocks, self.tower)
        if self.prompts and self.tokens is None:
            self.tokens = Tokens(self.prompts, backbone.sites("q", "0")[0].fan_in)
            self.tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
        if self.tokens is not None and task.index:
            self.tokens.requires_grad_(not self.freeze_prompts)
        if not self.share:
            self.branches.place(backbone, sites, lambda site: LowRank([site], self.drs.largest))
            for branch in self.branches:
                branch.open()
            return
        self.bases.place(backbone, sites, lambda site: Bases(site, self.rank))
        for adapter in self.bases:
            adapter.folds = self.reading != "per_task"
            if task.index == 0:
                adapter.open(torch.eye(self.rank), train=False)
                continue
            adapter.freeze()
            if task.index == 1 or self.reading != "continued":
                left = torch.nn.init.orthogonal_(torch.empty(self.rank, self.drs.largest))
                adapter.open(left, torch.zeros(self.drs.largest, self.rank))

    def begin_task(self, learner: Core, task: Task) -> None:
        """Choose the task's rank."""
        if task.index or not self.share:
            self.drs.choose(learner, task, list(self.bases if self.share else self.branches))

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """prompt_pull · ‖P - P_{t-1}‖² after the first task."""
        if self.tokens is None or "prompt" not in self.kept or not self.prompt_pull:
            return 0.0
        return self.prompt_pull * (self.tokens.values - self.kept["prompt"]).square().sum()

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Gentler prompts after the first task."""
        if self.tokens is None or not learner.learnt:
            return {}
        return {name: self.prompt_lr for name, p in learner.trainable().items() if p is self.tokens.values}

    def end_task(self, learner: Core, task: Task) -> None:
        """Settle the core; after the first task, fix the bases."""
        for branch in self.branches:
            branch.settle()
        for adapter in self.bases:
            if task.index == 0:
                adapter.settle()
                adapter.fix()
            if self.reading == "per_task":
                adapter.keep(task.index)
            elif self.reading == "accumulate":
                adapter.settle()
        if self.tokens is not None:
            self.kept["prompt"] = self.tokens.values
        if self.reading == "per_task":
            self.kept[f"means/{task.index}"] = self._means(learner, task)

    def measures(self, learner: Core) -> dict[str, float]:
        """The task's `rank`, and the `complexity` that it was chosen by; the first task has the bases' rank."""
        fixed = self.rank if self.share and learner.task.index == 0 else self.drs.largest
        return {"rank": float(fixed)} | self.drs.measures()

    def encode(self, learner: Core, batch: Batch) -> Tensor:
        """Features by the core of the task that each image seems to be of; in training, by the current one."""
        known = [key for key in self.kept if key.startswith("means/")]
        if self.reading != "per_task" or self.training or not known:
            return super().encode(learner, batch)
        plain = F.normalize(self._pretrained(learner, batch), dim=1)
        nearest = [(plain @ self.kept[f"means/{t}"].T).amax(1) for t in range(len(known))]
        route = torch.stack(nearest, 1).argmax(1)
        with ExitStack() as after:
            for adapter in self.bases:
                adapter.route = route
                after.callback(setattr, adapter, "route", None)
            return super().encode(learner, batch)

    def _pretrained(self, learner: Core, batch: Batch) -> Tensor:
        with ExitStack() as after:
            for adapter in self.bases:
                after.callback(setattr, adapter, "folded", adapter.folded)
                adapter.folded = True
            if self.tokens is not None:
                after.callback(setattr, self.tokens, "off", False)
                self.tokens.off = True
            return super().encode(learner, batch).float()

    @torch.no_grad()
    def _means(self, learner: Core, task: Task) -> Tensor:
        data = learner.method.data(learner, task)
        features = torch.cat([self._pretrained(learner, batch) for batch in learner.batches(data, 256)])
        labels = data.labels.to(features.device)
        return F.normalize(torch.stack([features[labels == c].mean(0) for c in torch.unique(labels).tolist()]), dim=1)
