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

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.attach import Adapters
from perdure.adapters.bases import Bases
from perdure.adapters.lowrank import Branches
from perdure.adapters.tokens import Tokens
from perdure.backbones.base import Tower, named_towers
from perdure.drs import DRS, Mode
from perdure.learner import Core
from perdure.memory.tensors import Tensors
from perdure.method import Method, without_effect
from perdure.prompting import check_tokens
from perdure.ranges import Count, Factor, Range, Rank, Strength
from perdure.types import Batch, Task

Reading = Literal["accumulate", "per_task", "continued"]
_PROMPT_LR, _PROMPT_PULL = 0.1, 0.01


class FMLoRA(Method, name="fm_lora"):
    """Shared bases, a small core a task, a rank chosen per task, and shared prompt tokens.

    Args:
        rank: dimension of the shared bases (r).
        ranks: candidates for r_t, or one number for all tasks; None means a quarter, a half and all of `rank`, of a
            fixed rank all.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder; each has bases and prompts of its own. `per_task` needs images.
        share: False gives each task a fresh LoRA of rank r_t instead of a core between shared bases.
        reading: how cores meet at test time, which the source does not say: `accumulate` adds them up (no task id
            needed, folded into the weights); `per_task` keeps each and routes an image to the core of the nearest class
            mean of the pre-trained features; `continued` goes on training one M and N.
        drs: rule of the rank; None is `affine`, and `fixed` where there is one rank.
        rank_cost: with `affine`, price of the largest rank, see `DRS`; None is 0.5.
        warm_up: epochs of the warm-up; None is 1.
        prompts: number m of prompt tokens; 0 for none.
        prompt_lr: the prompts' learning rate after the first task, as a factor of the run's; None is 0.1.
        prompt_pull: weight of ‖P - P_{t-1}‖² after the first task; None is 0.01.
        freeze_prompts: train them in the first task only.
    """

    adapts = True

    def __init__(
        self,
        rank: Rank = 16,
        ranks: Rank | Sequence[Rank] | None = None,
        at: str = "qv",
        blocks: str | None = None,
        tower: Tower = "vision",
        share: bool = True,
        reading: Reading = "accumulate",
        drs: Mode | None = None,
        rank_cost: Strength | None = None,
        warm_up: Count | None = None,
        prompts: Annotated[int, Range(0, 256)] = 4,
        prompt_lr: Factor | None = None,
        prompt_pull: Strength | None = None,
        freeze_prompts: bool = False,
    ) -> None:
        super().__init__()
        candidates = _candidates(rank, ranks, drs)
        drs = drs or ("fixed" if len(set(candidates)) == 1 else "affine")
        if max(candidates, default=0) > rank:
            raise ValueError(f"ranks={candidates}: expected at most rank={rank}, the dimension of the shared bases")
        if drs != "affine":
            without_effect(f"with drs={drs!r}", rank_cost=rank_cost)
        if drs == "fixed":
            without_effect("with a fixed rank", warm_up=warm_up)
        if reading != "accumulate" and not share:
            raise ValueError(f"reading={reading!r} is about cores between shared bases: leave out share=False")
        if reading == "per_task" and tower != "vision":
            raise ValueError(f"tower={tower!r}: reading='per_task' routes images only; write tower='vision'")
        if reading == "continued" and drs != "fixed":
            raise ValueError(
                "reading='continued' goes on with one M and N, whose rank cannot change: write drs='fixed'"
            )
        if not prompts:
            frozen = freeze_prompts or None
            without_effect("with prompts=0", prompt_lr=prompt_lr, prompt_pull=prompt_pull, freeze_prompts=frozen)
        if freeze_prompts:
            without_effect("with freeze_prompts=True", prompt_lr=prompt_lr, prompt_pull=prompt_pull)
        self.rank, self.at, self.blocks, self.tower = rank, at, blocks, tower
        self.share, self.reading = share, reading
        self.prompts = prompts
        self.prompt_lr = _PROMPT_LR if prompt_lr is None else prompt_lr
        self.prompt_pull = _PROMPT_PULL if prompt_pull is None else prompt_pull
        self.freeze_prompts = freeze_prompts
        # with `per_task` a task's core is put away when it ends: no gradient could tell what was important to it
        self.shares = reading == "continued" or (reading == "accumulate" and prompts > 0 and not freeze_prompts)
        self.leaves = frozenset() if reading == "per_task" else frozenset({"encode"})
        self.drs = DRS(candidates, drs, rank_cost, warm_up)
        self.bases: Adapters[Bases] = Adapters()
        self.branches = Branches()  # instead of the bases, when they are not shared
        self.tokens = nn.ModuleDict()  # of Tokens, for each tower
        self.kept = Tensors()  # "<tower>": P of the last task; "means/<task>": unit class means of pre-trained features

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The prompts; with `continued` M and N too."""
        if self.reading != "per_task" and not self.freeze_prompts:
            yield from self._prompts().values()
        if self.reading == "continued":
            yield from (factor for adapter in self.bases for factor in adapter.branch)

    def grow(self, learner: Core, task: Task) -> None:
        """Bases and prompts at the first task; then a new core, open with the largest rank."""
        backbone = learner.backbone
        sites = backbone.sites(self.at, self.blocks, self.tower)
        if task.index:
            self.tokens.requires_grad_(not self.freeze_prompts)
        elif self.prompts:
            for tower in named_towers(self.tower):
                tokens = Tokens(self.prompts, backbone.sites("q", "0", tower)[0].fan_in)
                tokens.attach([backbone.get_submodule(name) for name in backbone.blocks(tower)], tower)
                check_tokens(learner, tower)
                self.tokens[tower] = tokens
        if not self.share:
            self.branches.open(backbone, sites, self.drs.largest)
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
        """prompt_pull · ‖P - P_{t-1}‖² after the first task, added over towers."""
        if not self.prompt_pull:
            return 0.0
        held = {tower: p for tower, p in self._prompts().items() if tower in self.kept}
        return self.prompt_pull * sum((p - self.kept[tower]).square().sum() for tower, p in held.items())

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Gentler prompts after the first task."""
        if not learner.learnt:
            return {}
        prompts = {id(p) for p in self._prompts().values()}
        return {name: self.prompt_lr for name, p in learner.trainable().items() if id(p) in prompts}

    def end_task(self, learner: Core, task: Task) -> None:
        """Settle the core; after the first task, fix the bases."""
        self.branches.settle()
        for adapter in self.bases:
            if task.index == 0:
                adapter.settle()
                adapter.fix()
            if self.reading == "per_task":
                adapter.keep(task.index)
            elif self.reading == "accumulate":
                adapter.settle()
        for tower, prompt in self._prompts().items():
            self.kept[tower] = prompt
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

    def _prompts(self) -> dict[str, nn.Parameter]:
        """P by tower."""
        return {tower: each.values for tower, each in self.tokens.items() if isinstance(each, Tokens)}

    def _pretrained(self, learner: Core, batch: Batch) -> Tensor:
        with ExitStack() as after:
            for adapter in self.bases:
                after.callback(setattr, adapter, "folded", adapter.folded)
                adapter.folded = True
            for tokens in self.tokens.children():
                assert isinstance(tokens, Tokens)
                after.callback(setattr, tokens, "off", False)
                tokens.off = True
            return super().encode(learner, batch).float()

    @torch.no_grad()
    def _means(self, learner: Core, task: Task) -> Tensor:
        data = learner.method.data(learner, task)
        features = torch.cat([self._pretrained(learner, batch) for batch in learner.batches(data, 256)])
        labels = data.labels.to(features.device)
        return F.normalize(torch.stack([features[labels == c].mean(0) for c in torch.unique(labels).tolist()]), dim=1)


def _candidates(rank: int, ranks: int | Sequence[int] | None, drs: Mode | None) -> tuple[int, ...]:
    if isinstance(ranks, int):
        return (ranks,)
    if ranks is None:
        return (rank,) if drs == "fixed" else tuple(sorted({max(1, rank // 4), max(1, rank // 2), rank}))
    if drs == "fixed" and len(set(ranks)) > 1:
        raise ValueError(f"ranks={tuple(ranks)}: drs='fixed' takes one rank for all tasks; write ranks={max(ranks)}")
    return tuple(ranks)
