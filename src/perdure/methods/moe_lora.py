"""MoELoRA: a mixture of low-rank experts in each layer, with a router that reads every token (CoIN, NeurIPS 2024).

Chen et al., arXiv:2403.08350. y = W x + (alpha / rank) · Σ_e softmax(W_g x)_e B_e A_e x for each token, `rank` being
divided evenly among experts (see `TokenMixture`). All tasks train the same experts and routers, nothing is frozen, and
no loss balances the experts' load: with those alone it forgets as plain LoRA does, unless a part beside it protects.

Differs: W_g starts as A does (Kaiming uniform); scores are computed in float32; no dropout; the projector is not
trained. In a ViT or CLIP it is ours.
"""

from perdure.adapters.injection import Adapters
from perdure.adapters.low_rank import scale_of
from perdure.adapters.low_rank_mixture import TokenMixture
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Count, Factor, Rank
from perdure.types import Task


class MoELoRA(Method, name="moe_lora"):
    """Low-rank experts that every token takes in shares of its own, trained by all tasks.

    Args:
        rank: of all experts together.
        experts: how many; they divide `rank` evenly.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        alpha: scale times rank; None means a scale of 1.
    """

    changes_encoder, trains_shared, borderless = True, True, True

    def __init__(
        self,
        rank: Rank = 16,
        experts: Count = 8,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: Tower = "vision",
        alpha: Factor | None = None,
    ) -> None:
        super().__init__()
        if experts < 2 or rank % experts:
            raise ValueError(f"experts={experts}: expected at least 2 that divide rank={rank} evenly")
        self.rank, self.experts, self.at, self.blocks, self.tower, self.alpha = rank, experts, at, blocks, tower, alpha
        self.adapters: Adapters[TokenMixture] = Adapters()

    def grow(self, learner: Core, task: Task) -> None:
        """Experts and routers at the first task; later ones go on with them."""
        backbone, each, scale = learner.backbone, self.rank // self.experts, scale_of(self.alpha, self.rank)
        sites = backbone.sites(self.at, self.blocks, self.tower)
        self.adapters.place(backbone, sites, lambda site: TokenMixture(site, self.experts, each, scale), fold=False)
