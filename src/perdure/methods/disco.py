"""DISCO: one LoRA a task, mixed in every layer by what an example's words are like (Guo et al., ICCV 2025).

"Federated Continual Instruction Tuning", arXiv:2503.12897, without its clients: its dynamic knowledge organisation
keeps a branch a task, its subspace selective activation mixes them. In training the task's own branch alone is there.
`answering`: Σ_i w_i B_i A_i x, w = softmax(cos(words, centroid_i) / temperature). `end_task` takes the centroid.

Differs: the published code computes one w for a batch. Features of words are the mean of the untouched model's own
embeddings, not those of a CLIP beside it. The projector is not trained. Where an example is an image alone, in a ViT or
CLIP, that is looked at, which is ours.
"""

from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskMeans
from perdure.mechanisms.task_experts import ExpertTower, Keys, MixedExperts
from perdure.options.ranges import Factor, Rank
from perdure.types import Task


class Disco(MixedExperts, name="disco"):
    """A branch a task, of which an example takes as much as its words are like those of the task.

    Args:
        rank: inner dimension of a branch.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: where branches stand; None is `language` in a language model, else `vision`.
        alpha: scale times rank; None means a scale of 1.
        keys: what is compared: words, as published, images, or both; None is words where there are any.
        temperature: of the mixture; near 0 takes one branch.
    """

    def __init__(
        self,
        rank: Rank = 16,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: ExpertTower | None = None,
        alpha: Factor | None = None,
        keys: Keys | None = None,
        temperature: Factor = 0.05,
    ) -> None:
        super().__init__(TaskMeans(temperature), tower, blocks, rank=rank, at=at, alpha=alpha, keys=keys)

    def grow(self, learner: Core, task: Task) -> None:
        """A new branch; it is known now whether there are words."""
        if self.keys is None and "conversations" in learner.objective.asks:
            self.keys = "text"
        super().grow(learner, task)
