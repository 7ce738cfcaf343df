"""O-LoRA: orthogonal subspaces for tasks (Wang et al., Findings of EMNLP 2023, arXiv:2310.14152).

Every task gets a fresh branch, whose rows A_t are pushed away from the rows of all former ones:
loss + strength · Σ_i Σ |A_i A_tᵀ|, a sum of absolute values as in the official code.

Differs: former branches are added to the weights instead of being concatenated and recomputed in every step; only their
A stays, for the penalty. The code's second penalty (on the norm of the new branch) has weight 0 there and is left out.
"""

import torch
from torch import Tensor

from perdure.adapters.low_rank import LowRankSet
from perdure.adapters.state import BufferDict
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Rank, Strength
from perdure.types import Batch, Task


class OLoRA(Method, name="o_lora"):
    """A branch per task, orthogonal to former ones in its input factor.

    What is kept, and the penalty's cost, grow with the number of tasks: rank · fan_in numbers a layer and task.

    Args:
        rank: inner dimension of each branch.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        strength: weight of the penalty (the paper's λ1); 0 is `lora(per_task=True)`.
    """

    changes_encoder = True

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
        self.past_rows = BufferDict()  # number of the adapter -> A of all former tasks (t · rank, fan_in)

    def grow(self, learner: Core, task: Task) -> None:
        """A new branch in every chosen layer."""
        sites = learner.backbone.sites(self.at, self.blocks, self.tower)
        self.adapters.open(learner.backbone, sites, self.rank)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · Σ |A_i A_tᵀ| over former tasks i and all layers."""
        if not self.past_rows or not self.strength:
            return 0.0
        overlaps = [
            (self.past_rows[str(i)] @ adapter.down.T).abs().sum()
            for i, adapter in enumerate(self.adapters)
            if adapter.down is not None
        ]
        return self.strength * torch.stack(overlaps).sum()

    def end_task(self, learner: Core, task: Task) -> None:
        """Keep the new branch's rows, and merge it."""
        for i, adapter in enumerate(self.adapters):
            assert adapter.down is not None
            self.past_rows.append(str(i), adapter.down)
            adapter.merge()
