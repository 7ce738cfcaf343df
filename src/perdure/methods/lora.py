"""LoRA in sequence (Hu et al., ICLR 2022, arXiv:2106.09685): one branch per layer, or a fresh one for each task."""

from perdure.adapters.low_rank import LowRankSet, scale_of
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Count, Factor, Rank, without_effect
from perdure.types import Task


class LoRA(Method, name="lora"):
    """W + (alpha / rank) · B A in each chosen layer.

    Args:
        rank: inner dimension of the update.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        alpha: scale times rank; None means a scale of 1, as in the published continual-learning codes.
        per_task: False goes on training one branch; True adds each task's branch to the weights and opens a new one.
        tasks: how many tasks adapt the encoder; later ones leave it as it is (RanPAC and others adapt in the first
            only). None means all.
    """

    changes_encoder = True
    carrier = True
    borderless = True  # without options that count tasks
    unlabelled = "any"

    def __init__(
        self,
        rank: Rank = 10,
        at: str = "kv",
        blocks: str | None = None,
        tower: Tower = "vision",
        alpha: Factor | None = None,
        per_task: bool = False,
        tasks: Count | None = None,
    ) -> None:
        super().__init__()
        if tasks == 1:
            without_effect("with tasks=1, which opens one branch only", per_task=per_task or None)
        self.rank, self.at, self.blocks, self.tower, self.alpha = rank, at, blocks, tower, alpha
        self.per_task, self.tasks = per_task, tasks
        self.trains_shared = not per_task and tasks != 1
        self.borderless = not per_task and tasks is None
        self.adapters = LowRankSet()

    def grow(self, learner: Core, task: Task) -> None:
        """Open the branches at the first task; later tasks go on with them, or with new ones, or with none."""
        if self._over(task.index):
            self.adapters.merge()  # they are when the task before has ended, but not where only descriptions are known
        elif task.index == 0 or self.per_task:
            sites = learner.backbone.sites(self.at, self.blocks, self.tower)
            self.adapters.open(learner.backbone, sites, self.rank, scale_of(self.alpha, self.rank))

    def end_task(self, learner: Core, task: Task) -> None:
        """Close the branches when no later task trains them."""
        if self.per_task or self._over(task.index + 1):
            self.adapters.merge()

    def _over(self, tasks: int) -> bool:
        return self.tasks is not None and tasks >= self.tasks
