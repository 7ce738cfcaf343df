"""FM-LoRA: factorised low-rank updates with a dynamic rank and a meta-prompt (Yu et al., CVPR workshops 2025).

arXiv:2504.08823. There is no public implementation, and of the paper only its abstract and digests were at hand: this
is a re-implementation, not a replication. Three parts, each of which can be switched off:

- F-LoRA: ΔW_t = A M_t N_tᵀ B, bases A and B learnt with the first task, then frozen; later tasks train M_t, N_t.
- DRS: the rank r_t of M_t, N_t is chosen per task, see `perdure.mechanisms.rank_selection`.
- DMP: m prompt tokens, shared and trained by all tasks, without position.

What the source fixes: the factorisation, the rule of DRS, that prompts are shared. What we chose: the bases are made
orthonormal after the first task and their triangular factors go into the core; M_t starts orthogonal and N_t at zero,
so that a task starts from the function of the last; all branches add up in one core, so that no task id is needed;
after the first task prompts learn at a tenth of the rate and are pulled to their last values; every value of every
option.

What it does not do: old inputs pass through B too, so a small core limits interference but does not remove it.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from perdure.adapters.injection import Adapters
from perdure.adapters.low_rank import LowRankSet
from perdure.adapters.prompt_tokens import PromptTokens
from perdure.adapters.shared_basis import SharedBasis
from perdure.adapters.state import BufferDict
from perdure.backbones.base import Tower, named_towers
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.prompting import check_tokens
from perdure.mechanisms.rank_selection import DRS, Mode
from perdure.options.ranges import Range, Rank, Strength, without_effect
from perdure.types import Batch, Task

_PROMPT_LR = 0.1  # after the first task, as a factor of the run's learning rate
_PROMPT_PULL = 0.01  # weight of ‖P - P_{t-1}‖²


class FMLoRA(Method, name="fm_lora"):
    """Shared bases, a small core a task, a rank chosen per task, and shared prompt tokens.

    Args:
        rank: dimension of the shared bases (r).
        ranks: candidates for r_t, or one number for all tasks; None means a quarter, a half and all of `rank`, of a
            fixed rank all.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder; each has bases and prompts of its own.
        share: False gives each task a fresh LoRA of rank r_t instead of a core between shared bases.
        drs: rule of the rank; None is `affine`, and `fixed` where there is one rank.
        rank_cost: with `affine`, price of the largest rank, see `DRS`; None is 0.5.
        prompts: number m of prompt tokens; 0 for none.
    """

    changes_encoder = True

    def __init__(
        self,
        rank: Rank = 16,
        ranks: Rank | Sequence[Rank] | None = None,
        at: str = "qv",
        blocks: str | None = None,
        tower: Tower = "vision",
        share: bool = True,
        drs: Mode | None = None,
        rank_cost: Strength | None = None,
        prompts: Annotated[int, Range(0, 256)] = 4,
    ) -> None:
        super().__init__()
        candidates = _candidates(rank, ranks, drs)
        drs = drs or ("fixed" if len(set(candidates)) == 1 else "affine")
        if max(candidates, default=0) > rank:
            raise ValueError(f"ranks={candidates}: expected at most rank={rank}, the dimension of the shared bases")
        if drs == "fixed":
            without_effect("with drs='fixed'", rank_cost=rank_cost)
        self.rank, self.at, self.blocks, self.tower = rank, at, blocks, tower
        self.share, self.prompts = share, prompts
        self.trains_shared = prompts > 0
        self.drs = DRS(candidates, drs, rank_cost)
        self.bases: Adapters[SharedBasis] = Adapters()
        self.branches = LowRankSet()  # instead of the bases, when they are not shared
        self.tokens = nn.ModuleDict()  # PromptTokens by tower
        self.previous_prompts = BufferDict()  # "<tower>": P of the last task

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The prompts."""
        return self._prompts().values()

    def grow(self, learner: Core, task: Task) -> None:
        """Bases and prompts at the first task; then a new core, open with the largest rank."""
        backbone = learner.backbone
        sites = backbone.sites(self.at, self.blocks, self.tower)
        if not task.index and self.prompts:
            for tower in named_towers(self.tower):
                tokens = PromptTokens(self.prompts, backbone.sites("q", "0", tower)[0].fan_in)
                tokens.attach([backbone.get_submodule(name) for name in backbone.blocks(tower)], tower)
                check_tokens(learner, tower)
                self.tokens[tower] = tokens
        if not self.share:
            self.branches.open(backbone, sites, self.drs.largest)
            return
        self.bases.place(backbone, sites, lambda site: SharedBasis(site, self.rank))
        for adapter in self.bases:
            if task.index == 0:
                adapter.open(torch.eye(self.rank, dtype=torch.float32), train=False)
            else:
                adapter.freeze()
                left = torch.nn.init.orthogonal_(torch.empty(self.rank, self.drs.largest, dtype=torch.float32))
                adapter.open(left, left.new_zeros(self.drs.largest, self.rank))

    def begin_task(self, learner: Core, task: Task) -> None:
        """Choose the task's rank."""
        if task.index or not self.share:
            self.drs.choose(learner, task, list(self.bases if self.share else self.branches))

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """0.01 · ‖P - P_{t-1}‖² after the first task, added over towers."""
        held = {tower: p for tower, p in self._prompts().items() if tower in self.previous_prompts}
        return _PROMPT_PULL * sum((p - self.previous_prompts[tower]).square().sum() for tower, p in held.items())

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Gentler prompts after the first task."""
        if not learner.learnt:
            return {}
        prompts = {id(p) for p in self._prompts().values()}
        return {name: _PROMPT_LR for name, p in learner.trainable().items() if id(p) in prompts}

    def end_task(self, learner: Core, task: Task) -> None:
        """Settle the core; after the first task, fix the bases."""
        self.branches.merge()
        for adapter in self.bases:
            adapter.merge()
            if task.index == 0:
                adapter.fix()
        for tower, prompt in self._prompts().items():
            self.previous_prompts[tower] = prompt

    def measures(self, learner: Core) -> dict[str, float]:
        """The task's `rank`, and the `complexity` that it was chosen by; the first task has the bases' rank."""
        fixed = self.rank if self.share and learner.task.index == 0 else self.drs.largest
        return {"rank": float(fixed)} | self.drs.measures()

    def _prompts(self) -> dict[str, nn.Parameter]:
        """P by tower."""
        return {tower: each.values for tower, each in self.tokens.items() if isinstance(each, PromptTokens)}


def _candidates(rank: int, ranks: int | Sequence[int] | None, drs: Mode | None) -> tuple[int, ...]:
    if isinstance(ranks, int):
        return (ranks,)
    if ranks is None:
        return (rank,) if drs == "fixed" else tuple(sorted({max(1, rank // 4), max(1, rank // 2), rank}))
    if drs == "fixed" and len(set(ranks)) > 1:
        raise ValueError(f"ranks={tuple(ranks)}: drs='fixed' takes one rank for all tasks; write ranks={max(ranks)}")
    return tuple(ranks)
