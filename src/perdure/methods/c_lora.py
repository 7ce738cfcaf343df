"""C-LoRA: self-regularised low-rank adaptation (Smith et al., TMLR 2024, arXiv:2304.06027, "Continual Diffusion").

Every task gets a fresh branch; where former tasks changed a weight much, the new one may change it little:
loss + strength · ‖ |Σ_{t'<t} A_t' B_t'| ⊙ A_t B_t ‖²_F (equation 5), summed over layers, never averaged.

Differs: made for cross-attention in diffusion models; here for any layers of an encoder, with local cross-entropy, as
the InfLoRA paper uses it (rank 64, strength 0.5).
"""

import torch
from torch import Tensor

from perdure.adapters.low_rank import LowRankSet
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Rank, Strength
from perdure.types import Batch, Task


class CLoRA(Method, name="c_lora"):
    """A branch per task, held back where former branches changed the weights.

    Args:
        rank: inner dimension of each branch.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        strength: weight of the penalty (the paper's λ); 0 is `lora(per_task=True)`. The penalty is of fourth order in
            the updates, so small updates need a large one.
    """

    changes_encoder = True
    derived = ("_past",)

    def __init__(
        self,
        rank: Rank = 10,
        at: str = "kv",
        blocks: str | None = None,
        tower: Tower = "vision",
        strength: Strength = 0.5,
    ) -> None:
        super().__init__()
        self.rank, self.at, self.blocks, self.tower, self.strength = rank, at, blocks, tower, strength
        self.adapters = LowRankSet()
        self._past: list[Tensor] = []  # |sum of former updates| per layer, made anew from the adapters for each task

    def grow(self, learner: Core, task: Task) -> None:
        """A new branch in every chosen layer."""
        sites = learner.backbone.sites(self.at, self.blocks, self.tower)
        self.adapters.open(learner.backbone, sites, self.rank)
        self._past = []

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · Σ (|past| ⊙ A B)² over all layers; 0 in the first task."""
        if not learner.learnt or not self.strength:
            return 0.0
        if not self._past:
            merged = [adapter.delta(0, branches=False) for adapter in self.adapters]
            self._past = [past.abs() for past in merged if past is not None]
        terms = [
            (past * (adapter.up[0] @ adapter.down)).square().sum()
            for past, adapter in zip(self._past, self.adapters, strict=True)
            if adapter.down is not None
        ]
        return self.strength * torch.stack(terms).sum()

    def end_task(self, learner: Core, task: Task) -> None:
        """The new branch becomes part of the past."""
        self.adapters.merge()
