"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796), offline and online.

Offline, the paper's: loss + strength/2 · Σ_s Σ_i F^s_i (θ_i - θ^{s*}_i)², a Fisher diagonal F^s and an optimum θ^{s*}
for each old task s. Online (Schwarz et al., ICML 2018, arXiv:1805.06370): one running F ← γF + F_t and the last task's
optimum θ* only.

Differs: the Fisher of a task is scaled to mean 1, so that `strength` means the same for every model (in pre-trained
transformers it spans 1e-12 to 1e-2). Offline, a pair for each task is not stored: the sum of quadratics is one
quadratic, with Σ_s F^s around the weighted mean of the θ^{s*}, and a constant, which has no gradient and is left out.
`of="updates"` is ours.
"""

from typing import Annotated, Literal

from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.importance import Of, QuadraticPenalty, check_updates, held, importance
from perdure.options.ranges import Count, Range, Strength, without_effect
from perdure.types import Batch, Task


class EWC(Method, name="ewc"):
    """Pulls what tasks share to its old values, each number in proportion to its importance.

    The Fisher diagonal is a mean of squared gradients of single examples (labels as given), never the square of a
    batch's mean gradient, which is far smaller. With `retrieve` an example is a pair, which competes with 64 others of
    the task as they are.

    Args:
        strength: weight of the pull (the paper's lambda); 0 is plain fine-tuning.
        decay: with `online`, what is left of the old importance after a task (gamma); None is 1, which keeps it all.
        samples: number of training images the Fisher is taken from.
        form: `online` pulls to the last task's optimum, `offline` to the optimum of every old task; both store two
            numbers for each that is held.
        of: `parameters`; or `updates`, the product of a layer's low-rank factors in their place. What factors matter
            depends on how a product is divided into two; a product has as many numbers as the layer's weight.
    """

    protects = "shared_parameters"

    def __init__(
        self,
        strength: Strength = 100.0,
        decay: Annotated[float, Range(0, 1)] | None = None,
        samples: Count = 512,
        form: Literal["online", "offline"] = "online",
        of: Of = "parameters",
    ) -> None:
        super().__init__()
        if form == "offline":
            without_effect("with form='offline', which keeps all importance", decay=decay)
        self.strength, self.decay, self.samples = strength, 1.0 if decay is None else decay, samples
        self.form, self.of = form, of
        self.quadratic_penalty = QuadraticPenalty()

    @property
    def fisher(self) -> BufferDict:
        """F by name; merged over tasks."""
        return self.quadratic_penalty.weights

    @property
    def anchor(self) -> BufferDict:
        """θ* by name; offline, the weighted mean of all."""
        return self.quadratic_penalty.anchors

    def begin_task(self, learner: Core, task: Task) -> None:
        """Refuse updates where there are none."""
        if self.of == "updates":
            check_updates(learner, self.name)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength/2 · Σ F (θ - θ*)² over what is still trained."""
        if not self.fisher or not self.strength:
            return 0.0
        return self.strength * self.quadratic_penalty.value(held(learner, self.of))

    def end_task(self, learner: Core, task: Task) -> None:
        """Add this task's Fisher; anchor at what was learnt."""
        data, loss = learner.method.data(learner, task), learner.objective.example_loss
        fisher = importance(learner, data, self.of, self.samples, "fisher", loss, power=2)
        # what is held no more cannot drift: frozen heads, and branches that were closed for good
        values = held(learner, self.of)
        if self.form == "offline":
            self.quadratic_penalty.accumulate(fisher, values)
        else:
            self.quadratic_penalty.move_anchor(fisher, values, self.decay)
