"""Bottleneck adapters in sequence (Houlsby et al., ICML 2019, arXiv:1902.00751; AdaptFormer, arXiv:2205.13535).

`grow` puts y + scale · up gelu(down y) after each chosen layer, or, with `parallel`, from the input of each block's MLP
to its output (Chen et al., NeurIPS 2022). One adapter a layer serves all tasks and goes on being trained.

Differs: Houlsby et al. also train the layer norms, which stay frozen here; theirs stand after both halves of a block
(`at="o,fc2"`), by default there is one, after the MLP. AdaptFormer uses ReLU and scale 0.1. `up` starts at zero, so
that the model starts exactly as it was pre-trained.
"""

from perdure.adapters.bottleneck import Beside, Bottleneck
from perdure.adapters.injection import Adapters, attach, updates
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Count, Factor, Rank, without_effect
from perdure.types import Task


class BottleneckAdapter(Method, name="adapter"):
    """A small nonlinear network after each chosen layer, or beside each MLP.

    Args:
        rank: units in the middle of the bottleneck.
        at: after which layers, see `Backbone.sites`; None means "fc2", the MLP's output. "o,fc2" is Houlsby's.
        blocks: which blocks, all by default.
        tower: which encoder.
        scale: factor of what is added.
        parallel: False reads the layer's output; True the MLP's input, and adds to its output (AdaptFormer).
        tasks: how many tasks adapt the encoder; later ones leave it as it is (RanPAC and others adapt in the first
            only). None means all.
    """

    changes_encoder = True
    borderless = True  # without options that count tasks
    unlabelled = "any"

    def __init__(
        self,
        rank: Rank = 10,
        at: str | None = None,
        blocks: str | None = None,
        tower: Tower = "vision",
        scale: Factor = 1.0,
        parallel: bool = False,
        tasks: Count | None = None,
    ) -> None:
        super().__init__()
        if parallel:
            without_effect("with parallel=True, which stands beside each block's MLP", at=at)
        self.rank, self.at, self.blocks, self.tower, self.scale = rank, at or "fc2", blocks, tower, scale
        self.parallel, self.tasks = parallel, tasks
        self.trains_shared = tasks != 1
        self.borderless = tasks is None
        self.adapters: Adapters[Bottleneck] = Adapters()

    def grow(self, learner: Core, task: Task) -> None:
        """Adapters at the first task; later tasks go on with them."""
        backbone = learner.backbone
        if not self.parallel:
            sites = backbone.sites(self.at, self.blocks, self.tower)
            self.adapters.place(backbone, sites, lambda site: Bottleneck(site, self.rank, self.scale))
        elif not len(self.adapters):
            firsts, lasts = (backbone.sites(at, self.blocks, self.tower) for at in ("fc1", "fc2"))
            for pair in zip(firsts, lasts, strict=True):
                adapter = Beside(pair, self.rank, self.scale)
                self.adapters.append(adapter)
                attach(backbone, pair, adapter)
        self._train(task.index)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would be predicted with otherwise than it was trained.

        Raises:
            ValueError: when a part written later changes the weight of a layer whose output is read.
        """
        if self.parallel:  # which reads what no other part adds to
            return
        read: set[str] = set()
        for site, other, _ in updates(learner.backbone):
            if any(other is adapter for adapter in self.adapters):
                read.add(site.key)
            elif other.folds and site.key in read:
                raise ValueError(
                    f"adapter reads what {site.layer} gives, and a part written after it adds to that: write adapter "
                    "last, or choose other layers with at"
                )

    def end_task(self, learner: Core, task: Task) -> None:
        """Freeze the adapters when no later task trains them."""
        self._train(task.index + 1)

    def _train(self, index: int) -> None:
        """Whether task number `index` trains the adapters."""
        train = self.tasks is None or index < self.tasks
        for p in self.parameters():
            p.requires_grad_(train)
            if not train:
                p.grad = None
