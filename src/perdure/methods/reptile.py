"""Reptile (Nichol, Achiam & Schulman, 2018, arXiv:1803.02999), within batches as in MER (Riemer et al., ICLR 2019).

`backward`: θ'_0 = θ, θ'_{i+1} = θ'_i - α ∇L_i(θ'_i), each L_i on another part of the batch; the optimizer finds
(θ - θ'_k) / α, the sum of these gradients, as section 2 has it for adaptive optimizers: with SGD, Reptile's ε is
lr / α. With one inner step it is plain training, bit for bit.

Differs: inner steps are plain gradient descent, in the official code Adam with β₁ = 0; a batch is a task, as in MER
(arXiv:1810.11910), of which this is the inner loop: `lora + replay + reptile` has its memory too. ε follows the run's
schedule.
"""

from torch import Tensor

from perdure.core.learner import Core
from perdure.mechanisms.meta_learning import InnerSteps, Weights, check_taught, inner_step, interleaved, set_gradients
from perdure.options.ranges import Count, Rate
from perdure.types import Batch, Task, take


class Reptile(InnerSteps, name="reptile"):
    """Moves what its partner trains towards where several small steps in a row lead.

    The gradients of the parts of a batch are so made to agree, up to second order of the inner rate.

    Args:
        inner_steps: number of steps a batch, each on a part of it; at most one an example.
        inner_lr: their rate, of plain gradient descent; of heads' weights in units of 10 / mean ‖feature‖².
    """

    borderless = True

    def __init__(self, inner_steps: Count = 4, inner_lr: Rate = 0.1) -> None:
        super().__init__()
        self.inner_steps, self.inner_lr, self.divides = inner_steps, inner_lr, inner_steps > 1

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        check_taught(learner, self, task)

    def backward(self, learner: Core, loss: Tensor, batch: Batch) -> None:
        """The sum of the gradients along the way."""
        weights: Weights = dict(learner.trainable())
        rates = self.inner_rates(weights)
        total: dict[str, Tensor] = {}
        for rows in interleaved(len(batch["label"]), self.inner_steps):
            weights, gradients = inner_step(learner, weights, take(batch, rows), rates, Core.loss)
            weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient
        set_gradients(learner, total)
