"""RegLoRA: a fresh LoRA a task, kept off the entries of weights that former tasks moved most (SEFE, ICML 2025).

Chen et al., arXiv:2505.02486. After a task its update ΔW_t = scale · B A is added to the weights, and in each layer the
`share` largest of its entries by absolute value join M, the union over all tasks so far. `penalty` is strength · the
mean over layers of the mean over M of |(scale · B A)_ij|, for the branch in training.

Differs: the published code keeps the entries of each task as dense lists of indices (2 GB a task for a model of 7
billion weights), in which one that several tasks have counts several times; here M is one bit an entry, whatever the
number of tasks, and each entry counts once. It leaves out the scale, divides by 224 whatever the number of layers, and
keeps B A of all layers for backward (see `HeldEntries`). The other half of SEFE, which rewrites the answers of a
training set in several styles, is done to data, and not here. In a ViT or CLIP it is ours.
"""

import torch
from torch import Tensor

from perdure.adapters.low_rank import LowRankSet, scale_of
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.held_entries import HeldEntries
from perdure.options.ranges import Factor, Rank, Share, Strength, without_effect
from perdure.types import Batch, Task

_SHARE = 0.02


class RegLoRA(Method, name="reg_lora"):
    """A branch a task, punished for changing what former ones changed most.

    Args:
        rank: inner dimension of a branch.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        alpha: scale times rank; None means a scale of 1.
        strength: weight of the penalty; 0 for none.
        share: of the entries of a task's update, the largest, that are held.
    """

    changes_encoder = True

    def __init__(
        self,
        rank: Rank = 10,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: Tower = "vision",
        alpha: Factor | None = None,
        strength: Strength = 2500.0,
        share: Share = _SHARE,
    ) -> None:
        super().__init__()
        if not strength:
            without_effect("with strength=0", share=None if share == _SHARE else share)
        self.rank, self.at, self.blocks, self.tower, self.alpha = rank, at, blocks, tower, alpha
        self.strength = strength
        self.adapters, self.held = LowRankSet(), HeldEntries(share)

    def grow(self, learner: Core, task: Task) -> None:
        """A fresh branch in every layer."""
        sites = learner.backbone.sites(self.at, self.blocks, self.tower)
        self.adapters.open(learner.backbone, sites, self.rank, scale_of(self.alpha, self.rank))

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """What the open branches do to held entries; 0 in the first task."""
        if not self.held or not self.strength:
            return 0.0
        sizes = []
        for number, adapter in enumerate(self.adapters):
            if adapter.down is not None:
                sizes.append(self.held.size(str(number), adapter.scale * adapter.up[0], adapter.down))
        return self.strength * torch.stack(sizes).mean() if sizes else 0.0

    def end_task(self, learner: Core, task: Task) -> None:
        """The largest entries of each update are held from now on; the branches become part of the weights."""
        for number, adapter in enumerate(self.adapters):
            if adapter.down is not None and self.strength:
                self.held.add(str(number), (adapter.scale * adapter.up[0] @ adapter.down).detach())
        self.adapters.merge()

    def measures(self, learner: Core) -> dict[str, float]:
        """The share of all entries that is held."""
        held = entries = 0
        for number, adapter in enumerate(self.adapters):
            size = adapter.fan_in * adapter.fan_outs[0]
            entries += size
            held += int(self.held.mask(str(number), size).sum()) if str(number) in self.held.bits else 0
        return {"held_share": held / entries} if entries else {}
