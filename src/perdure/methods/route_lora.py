"""C-LoRA with a routing matrix (Zhang et al., 2025, arXiv:2502.17920): ΔW = A R B, one pair A, B for all tasks.

R = R_old + R_δ: the former tasks' part is frozen and stops gradients, y = W x + sg[A R_old B] x + A R_δ B x, so that A
and B learn through R_δ only; loss + strength · ‖U(R_old)ᵀ R_δ‖² keeps R_δ off the leading directions U of R_old.

Differs: the paper gives neither R's start nor what U(R_old) is. Here R_δ starts from the identity in the first task
(which is LoRA with a trainable R) and from 0 afterwards; U are the left singular vectors that hold `energy` of R_old's
squared singular values. Since A and B go on learning, A R_old B drifts without any loss noticing. The paper's argument
that this is little (the gradient of A and B is small while R_δ is) holds for SGD only: Adam gives every parameter steps
of the same size, and the accuracy of all tasks collapses. Hence `bases_lr`, which slows A and B after the first task.
Named `route_lora` because another method is called C-LoRA too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from perdure.adapters.injection import Adapters
from perdure.adapters.shared_basis import SharedBasis
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Factor, Rank, Share, Strength
from perdure.types import Batch, Task


class RouteLoRA(Method, name="route_lora"):
    """One low-rank pair for all tasks, joined by a routing matrix that grows by an increment a task.

    Args:
        rank: inner dimension.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        strength: weight of the orthogonality penalty (λ); 0 leaves the stop-gradient only.
        energy: share of R_old's energy that the increment is kept off, in (0, 1].
        bases_lr: learning rate of A and B after the first task, as a factor of the run's.
    """

    changes_encoder = True
    trains_shared = True
    derived = ("_leading",)

    def __init__(
        self,
        rank: Rank = 10,
        at: str = "qv",
        blocks: str | None = None,
        tower: Tower = "vision",
        strength: Strength = 1.0,
        energy: Share = 0.95,
        bases_lr: Factor = 0.01,
    ) -> None:
        super().__init__()
        self.rank, self.at, self.blocks, self.tower = rank, at, blocks, tower
        self.strength, self.energy, self.bases_lr = strength, energy, bases_lr
        self.adapters: Adapters[SharedBasis] = Adapters()
        self._leading: list[Tensor] = []  # U(R_old) per layer, made anew from the cores for each task

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """A and B; each task has an R_δ of its own."""
        return [p for adapter in self.adapters for p in (adapter.up, adapter.down)]

    def grow(self, learner: Core, task: Task) -> None:
        """A new increment in every chosen layer."""
        sites = learner.backbone.sites(self.at, self.blocks, self.tower)
        self.adapters.place(learner.backbone, sites, lambda site: SharedBasis(site, self.rank))
        for adapter in self.adapters:
            start = torch.eye(self.rank, dtype=torch.float32)
            adapter.open(torch.zeros_like(start) if task.index else start)
        self._leading = []

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · Σ ‖U(R_old)ᵀ R_δ‖² over all layers; 0 in the first task."""
        if not learner.learnt or not self.strength:
            return 0.0
        if not self._leading:
            self._leading = [_leading(adapter.core, self.energy) for adapter in self.adapters]
        pairs = zip(self._leading, self.adapters, strict=True)
        return self.strength * torch.stack([(u.T @ a.branch[0]).square().sum() for u, a in pairs]).sum()

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Gentler A and B after the first task."""
        bases = {id(p) for p in self.shared_parameters()}
        return {n: self.bases_lr for n, p in learner.trainable().items() if learner.learnt and id(p) in bases}

    def end_task(self, learner: Core, task: Task) -> None:
        """R_old takes the increment."""
        for adapter in self.adapters:
            adapter.merge()


def _leading(core: Tensor, energy: float) -> Tensor:
    """The fewest left singular vectors (rank, k) that hold `energy` of the squared singular values."""
    left: Tensor
    left, values, _ = torch.linalg.svd(core)
    share = values.square().cumsum(0) / values.square().sum()
    count = int((share < energy).sum()) + 1
    return left[:, :count]
