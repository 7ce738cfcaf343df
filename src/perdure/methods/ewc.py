"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796), online form.

Schwarz et al., ICML 2018, arXiv:1805.06370: one running Fisher diagonal F ← γF + F_t and the last task's optimum θ*
instead of one pair per task; loss + strength/2 · Σ F (θ - θ*)².

Differs: the Fisher of a task is scaled to mean 1, so that `strength` means the same for every model (in pre-trained
transformers it spans 1e-12 to 1e-2).
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.learner import Core
from perdure.memory.tensors import Tensors
from perdure.method import Method, at_least_zero
from perdure.types import Batch, Task

_CHUNK = 16  # examples whose gradients are held at once


class EWC(Method, name="ewc"):
    """Pulls each shared parameter to its old value, in proportion to its importance.

    The Fisher diagonal is a mean of squared gradients of single examples (labels as given), never the square of a
    batch's mean gradient, which is far smaller.

    Args:
        strength: weight of the pull (the paper's lambda); 0 is plain fine-tuning.
        decay: what is left of the old importance after a task (gamma); 1 keeps it all.
        samples: number of training images the Fisher is taken from.
    """

    protects = True

    def __init__(self, strength: float = 100.0, decay: float = 1.0, samples: int = 512) -> None:
        super().__init__()
        at_least_zero(strength=strength)
        self.strength, self.decay, self.samples = strength, decay, samples
        self.fisher, self.anchor = Tensors(), Tensors()

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength/2 · Σ F (θ - θ*)² over parameters that are still trained."""
        if not self.fisher or not self.strength:
            return 0.0
        params = learner.trainable()
        drift = [(f * (params[k] - self.anchor[k]) ** 2).sum() for k, f in self.fisher.items() if k in params]
        return self.strength / 2 * torch.stack(drift).sum() if drift else 0.0

    def end_task(self, learner: Core, task: Task) -> None:
        """Add this task's Fisher; anchor at what was learnt."""
        params = learner.shared()
        if not params:  # the last shared branch was closed for good, and there are no heads
            self.fisher.clear()
            self.anchor.clear()
            return
        learner.settle()  # a branch that another part has just closed must stand in the weights
        total = {k: torch.zeros_like(p) for k, p in params.items()}
        for views in learner.views(learner.method.data(learner, task), self.samples, "fisher", size=_CHUNK):
            for k, g in self._gradients(learner, params, views).items():
                total[k] += g.square().sum(0)
        mean = torch.cat([f.flatten() for f in total.values()]).mean().clamp_min(torch.finfo(torch.float32).tiny)
        for k in list(self.fisher):
            if k not in params:  # a frozen head cannot drift
                del self.fisher[k], self.anchor[k]
        for k, p in params.items():
            self.fisher[k] = self.decay * self.fisher.get(k, 0.0) + total[k] / mean
            self.anchor[k] = p

    @staticmethod
    def _gradients(learner: Core, params: dict[str, nn.Parameter], batch: Batch) -> dict[str, Tensor]:
        """Gradient of each example's loss, (B, *shape)."""
        local = learner.objective.competes_locally(batch)

        def loss(values: dict[str, Tensor], example: Batch) -> Tensor:
            single = {k: v.unsqueeze(0) for k, v in example.items()}
            named = {f"learner.{k}": v for k, v in values.items()}
            out: Tensor = functional_call(_Loss(learner, local), named, (single,))
            return out

        # vmap has no rule for the fused kernels and would run them one example at a time
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(grad(loss), in_dims=(None, 0))({k: p.detach() for k, p in params.items()}, batch)  # type: ignore[no-any-return]


class _Loss(nn.Module):
    """The objective's loss as a module, for `functional_call`."""

    def __init__(self, learner: Core, local: bool) -> None:
        super().__init__()
        self.learner, self.local = learner, local

    def forward(self, batch: Batch) -> Tensor:
        return self.learner.objective.losses(self.learner.encode(batch), batch, self.local).mean()
