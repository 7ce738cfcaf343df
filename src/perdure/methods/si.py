"""Synaptic intelligence (Zenke et al., ICML 2017, arXiv:1703.04200): importance from the path that training took.

ω_k = -Σ_steps g_k Δθ_k adds up what each parameter contributed to the fall of the task's loss; at the task's end
Ω_k += max(0, ω_k) / ((θ_k(end) - θ_k(start))² + ξ); loss + strength/2 · Σ Ω (θ - θ*)² with the last task's θ*.
g is the gradient of the loss without the pull: the pull's own, known in closed form, is taken off.

Differs: the Ω of a task is scaled to mean 1, as in `ewc`, so that `strength` means the same for every model, and the
pull has the ½ of EWC: the paper's c is half of `strength`, for Ω of mean 1.
"""

import torch
from torch import Tensor, nn

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.importance import QuadraticPenalty, mean_one
from perdure.options.ranges import Factor, Strength, without_effect
from perdure.types import Batch, Task

_DAMPING = 1e-3


class SI(Method, name="si"):
    """Pulls each shared parameter to its old value, by how much it did for the old tasks' losses while it was learnt.

    Needs no pass over data at a task's end. The loss is the run's, with what other parts add to it; where another part
    changes gradients (gem), write si before it.

    Args:
        strength: weight of the pull (twice the paper's c); 0 is plain fine-tuning.
        damping: ξ, which bounds the importance of parameters that hardly moved; in squared parameter units.
    """

    protects = "shared_parameters"

    def __init__(self, strength: Strength = 100.0, damping: Factor = _DAMPING) -> None:
        super().__init__()
        if not strength:
            without_effect("with strength=0", damping=None if damping == _DAMPING else damping)
        self.strength, self.damping = strength, damping
        self.quadratic_penalty = QuadraticPenalty()
        self.path, self.start = BufferDict(), BufferDict()  # ω, and values at the task's start
        # parameters, their gradients without the pull, their values before the step: between two hooks of one step
        self._before: tuple[dict[str, nn.Parameter], list[Tensor], list[Tensor]] | None = None

    def begin_task(self, learner: Core, task: Task) -> None:
        """Start a new path."""
        for name, parameter in learner.shared().items():
            self.path[name], self.start[name] = torch.zeros_like(parameter), parameter.contiguous()

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength/2 · Σ Ω (θ - θ*)² over parameters that are still trained."""
        if not self.quadratic_penalty.weights or not self.strength:
            return 0.0
        return self.strength * self.quadratic_penalty.value(learner.trainable())

    def after_backward(self, learner: Core) -> None:
        """Remember values, and gradients of the loss without the pull."""
        moving = {k: p for k, p in learner.trainable().items() if k in self.path and p.grad is not None}
        gradients = {k: p.grad.clone() for k, p in moving.items() if p.grad is not None}
        if self.strength:
            for name, force in self.quadratic_penalty.gradient(moving).items():
                gradients[name].sub_(force, alpha=self.strength)
        self._before = moving, list(gradients.values()), [p.detach().clone() for p in moving.values()]

    @torch.no_grad()
    def after_step(self, learner: Core, batch: Batch) -> None:
        """ω ← ω - g Δθ."""
        assert self._before is not None
        moving, gradients, before = self._before
        self._before = None
        if moving:
            steps = torch._foreach_sub(list(moving.values()), before)
            torch._foreach_addcmul_([self.path[name] for name in moving], gradients, steps, value=-1.0)

    @torch.no_grad()
    def end_task(self, learner: Core, task: Task) -> None:
        """Add what the path says; anchor at what was learnt."""
        kept = {k: p for k, p in learner.shared().items() if k in self.path}
        weights = {k: self.path[k].relu() / ((p - self.start[k]).square() + self.damping) for k, p in kept.items()}
        self.quadratic_penalty.move_anchor(mean_one(weights) if weights else {}, kept)
        self.path.clear()
        self.start.clear()
