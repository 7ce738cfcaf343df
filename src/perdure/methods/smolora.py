"""SMoLoRA: two mixtures of low-rank experts, for what is seen and for what is asked (Wang et al., ICCV 2025).

"Separable Mixture of Low-Rank Adaptation for Continual Visual Instruction Tuning", arXiv:2411.13949. In each layer half
of the experts are for visual understanding, half for following instructions; of each half an example takes the one that
its gate ranks first, y = W x + scale · (a · v + b · w), (a, b) the softmax of two learned scores of v and w for each
token (see `SeparateMixtures`). All tasks train the same experts and gates.

Differs: the published code writes a constant 1 where a gate's largest score is, so that gates get no gradient and
stay random, and is given the instruction gate's choice as an option of the whole run; here what an expert gives is
weighed by its share of the softmax, as in sparse mixtures, and both gates learn. The visual gate reads the mean of an
example's image tokens, and the instruction gate that of its words' embeddings, both as the untouched model is given
them: the same in every layer and for every token of an answer. Published are the mean of the layer's inputs, padding
included, which is another one for every token that is said, and a second model's embedding of the kind of instruction.
"""

from contextlib import AbstractContextManager

import torch

from perdure.adapters.injection import Adapters
from perdure.adapters.low_rank import scale_of
from perdure.adapters.low_rank_mixture import SeparateMixtures, keyed
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.prompting import QUERY, check_routes_once, conversation_query
from perdure.options.ranges import Count, Factor, Rank
from perdure.types import Batch, Site, Task


class SMoLoRA(Method, name="smolora"):
    """Experts for images and experts for instructions in a language model; each example takes one of each.

    Args:
        rank: inner dimension of an expert.
        experts: how many in each layer, half of each kind; an even number.
        at: which layers of the language tower, see `Backbone.sites`.
        blocks: which blocks, all by default.
        alpha: scale times rank; None means a scale of 1.
    """

    changes_encoder, trains_shared, sole_adapter = True, True, True
    needs = ("conversations",)
    treats = frozenset({"language"})

    def __init__(
        self,
        rank: Rank = 8,
        experts: Count = 8,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        alpha: Factor | None = None,
    ) -> None:
        super().__init__()
        if experts < 4 or experts % 2:
            raise ValueError(f"experts={experts}: expected an even number from 4 on, two or more of each kind")
        self.rank, self.experts, self.at, self.blocks, self.alpha = rank, experts, at, blocks, alpha
        self.adapters: Adapters[SeparateMixtures] = Adapters()

    def grow(self, learner: Core, task: Task) -> None:
        """Experts and gates at the first task; later ones go on with them."""
        check_routes_once(learner, self)
        backbone, scale = learner.backbone, scale_of(self.alpha, self.rank)

        def make(site: Site) -> SeparateMixtures:
            return SeparateMixtures(site, self.experts, self.rank, scale, backbone.dim)

        self.adapters.place(backbone, backbone.sites(self.at, self.blocks, "language"), make, fold=False)

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the gates read, in training too."""
        return {QUERY: conversation_query(learner, batch)}

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, each conversation takes the experts that its images and its words choose."""
        images_and_words = torch.stack(conversation_query(learner, batch).chunk(2, dim=1), dim=1)
        return keyed(list(self.adapters), images_and_words)
