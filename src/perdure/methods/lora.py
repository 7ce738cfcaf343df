"""LoRA in sequence (Hu et al., ICLR 2022, arXiv:2106.09685): one branch per layer, trained on every task."""

from torch import nn

from perdure.adapters.attach import attach
from perdure.adapters.lowrank import LowRank
from perdure.backbones.base import Tower
from perdure.learner import Core
from perdure.method import Method
from perdure.types import Task


class LoRA(Method, name="lora"):
    """W + (alpha / rank) · B A in each chosen layer, shared by all tasks.

    Args:
        rank: inner dimension of the update.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        alpha: scale times rank; None means a scale of 1, as in the published continual-learning codes.
    """

    shares = True

    def __init__(
        self,
        rank: int = 10,
        at: str = "kv",
        blocks: str | None = None,
        tower: Tower = "vision",
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.at, self.blocks, self.tower, self.alpha = rank, at, blocks, tower, alpha
        self.adapters = nn.ModuleList()

    def grow(self, learner: Core, task: Task) -> None:
        """Open the branches at the first task; later tasks go on with them."""
        if self.adapters:
            return
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        for site in learner.backbone.sites(self.at, self.blocks, self.tower):
            adapter = LowRank([site], self.rank, scale)
            adapter.open()
            self.adapters.append(adapter)
            attach(learner.backbone, [site], adapter)
