"""Memory aware synapses (Aljundi et al., ECCV 2018, arXiv:1711.09601): importance without labels.

Ω = mean over examples of |∂ ‖f(x)‖² / ∂θ|, f the scores of the seen classes (with `retrieve`: cosines of a pair to the
texts and images of 64 others), added up over tasks;
loss + strength/2 · Σ Ω (θ - θ*)² with the last task's θ*.

Differs: the Ω of a task is scaled to mean 1, so that `strength` means the same for every model, and the pull has the ½
of EWC: the paper's λ is half of `strength`, for Ω of mean 1. `of="updates"` is ours.
"""

from torch import Tensor

from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.core.objective import Competitors
from perdure.mechanisms.importance import Of, QuadraticPenalty, check_updates, held, importance
from perdure.options.ranges import Count, Strength
from perdure.types import Batch, Task


class MAS(Method, name="mas"):
    """Pulls what tasks share to its old values, by how much the scores of the task's images depend on each number.

    Args:
        strength: weight of the pull; 0 is plain fine-tuning.
        samples: number of training images the importance is taken from; their labels are not used.
        of: `parameters`; or `updates`, the product of a layer's low-rank factors in their place. What factors matter
            depends on how a product is divided into two; a product has as many numbers as the layer's weight.
    """

    protects = "shared_parameters"

    def __init__(self, strength: Strength = 100.0, samples: Count = 512, of: Of = "parameters") -> None:
        super().__init__()
        self.strength, self.samples, self.of = strength, samples, of
        self.quadratic_penalty = QuadraticPenalty()

    def begin_task(self, learner: Core, task: Task) -> None:
        """Refuse updates where there are none."""
        if self.of == "updates":
            check_updates(learner, self.name)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength/2 · Σ Ω (θ - θ*)² over what is still trained."""
        if not self.quadratic_penalty.weights or not self.strength:
            return 0.0
        return self.strength * self.quadratic_penalty.value(held(learner, self.of))

    def end_task(self, learner: Core, task: Task) -> None:
        """Add this task's importance; anchor at what was learnt."""

        def length(features: Tensor, example: Batch, rivals: Competitors) -> Tensor:
            return learner.objective.example_scores(features, example, rivals).square().sum()

        data = learner.method.data(learner, task)
        weights = importance(learner, data, self.of, self.samples, "importance", length, power=1)
        self.quadratic_penalty.move_anchor(weights, held(learner, self.of))
