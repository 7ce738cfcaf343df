"""HiDe-LLaVA: one LoRA a task, mixed in the last block by similarity, fused in all others (Guo et al., ACL 2025).

arXiv:2503.12941. In training the task's own branch alone is there. `answering`: in the last block Σ_i w_i B_i A_i x,
w = softmax(s / temperature), s_i the mean of the cosines of the example's image and words to task i's anchors, which
are means of such features; in the other blocks Σ_i B_i A_i x. `end_task` takes the anchors.

Differs: the published code fuses (Σ B_i)(Σ A_i), with all cross terms B_i A_j, knows the last block by the number 31,
and computes one w for a batch, from its largest similarity; here branches are fused as the paper has it, the last block
is the last one, and every example has its own w. Features are what the untouched model is given, not those of a CLIP
beside it. The projector is not trained. For images alone, in a ViT or CLIP, it is ours.
"""

from contextlib import AbstractContextManager

import torch

from perdure.adapters.task_branches import sharing
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskMeans
from perdure.mechanisms.task_experts import ExpertTower, MixedExperts
from perdure.options.ranges import Factor, Rank
from perdure.types import Batch


class HiDeLoRA(MixedExperts, name="hide_lora"):
    """A branch a task: all of them everywhere, and in the last block as much of each as an example is like its task.

    Args:
        rank: inner dimension of a branch.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default; the highest of them mixes.
        tower: where branches stand; None is `language` in a language model, else `vision`.
        alpha: scale times rank; None means a scale of 1.
        temperature: of the mixture; near 0 takes one branch.
    """

    apart = False

    def __init__(
        self,
        rank: Rank = 16,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: ExpertTower | None = None,
        alpha: Factor | None = None,
        temperature: Factor = 0.1,
    ) -> None:
        super().__init__(TaskMeans(temperature), tower, blocks, rank=rank, at=at, alpha=alpha)

    def answering(self, learner: Core, batch: Batch) -> AbstractContextManager[None]:
        """Within, the last block mixes the branches for each example, and the others add them all."""
        shares = self.shares(learner, batch)
        experts, every = list(self.experts), torch.ones_like(shares)
        last = experts[-1].block
        return sharing(experts, [shares if each.block == last else every for each in experts])
