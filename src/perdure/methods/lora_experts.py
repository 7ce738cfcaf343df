"""One LoRA for each task, and a router that picks one for each example, or none: isolated experts.

Ours, of what leads the published tables of continual instruction tuning: MR-LoRA (arXiv:2506.05453) trains each expert
from the same model and asks a second language model which to take. Where experts are mixed instead, by similarities to
means of features: `hide_lora`, `disco`.

`end_task` fits, in closed form, a Gaussian to the keys of the task's examples: what the untouched model is given of
their images and words. `applied` sends each example to the task under which its key is likeliest. An example that lies
farther from every task than `threshold` of the training examples do, each judged by Gaussians that were fitted without
it, is answered by the untouched model.

Differs: nothing is asked of a batch as a whole, no examples of old tasks are kept, experts never mix.
"""

from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.task_experts import ExpertTower, Keys, TaskExperts
from perdure.options.ranges import Factor, Rank, Share, without_effect


class LoRAExperts(TaskExperts, name="lora_experts"):
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

    def __init__(
        self,
        rank: Rank = 16,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: ExpertTower | None = None,
        alpha: Factor | None = None,
        keys: Keys | None = None,
        fallback: bool = True,
        threshold: Share | None = None,
    ) -> None:
        if not fallback:
            without_effect("with fallback=False", threshold=threshold)
        router = TaskGaussians() if threshold is None else TaskGaussians(known=threshold)
        super().__init__(router, tower, blocks, rank=rank, at=at, alpha=alpha, keys=keys)
        self.fallback = fallback
