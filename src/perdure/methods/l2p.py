"""L2P: learning to prompt, from a pool (Wang et al., CVPR 2022, arXiv:2112.08654).

Each entry of the pool is a key and a few prompt tokens. An image takes the `top` entries whose keys are nearest to its
query q, the features of the pre-trained encoder without prompts. Loss: cross-entropy - strength · mean over images of
Σ cos(q, k) over the chosen keys. The choice itself has no gradient: keys learn from the pull only, tokens from the
cross-entropy only.

Differs: every image chooses for itself, in training and at test time; the published codes let the batch vote, which
`batchwise=True` reproduces. With `reads="prompts"` the mean of what the tokens became takes the class token's place
before the model's last norm; published is the mean after it. Keys and tokens start from a normal distribution of
deviation 0.02 (published: uniform), tokens have no position, gradients are not clipped.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.tokens import Given
from perdure.learner import Core
from perdure.method import Method, at_least_zero
from perdure.prompting import QUERY, check_tokens, nearest, output_of, query
from perdure.types import Batch, Task


class L2P(Method, name="l2p"):
    """A pool of keys and prompt tokens, shared and trained by all tasks; the encoder stays as it is.

    The pool never grows. Entries that no image chooses learn nothing.

    Args:
        pool: number of entries.
        length: tokens of an entry.
        top: entries that an image takes.
        strength: weight of the pull of keys to the queries that chose them; 0 leaves keys where they start.
        batchwise: all images of a batch take the entries that most of them chose, as in the published codes. Answers
            then depend on who else is asked about, and on test batches sorted by task it tells the task: for
            reproduction only.
        reads: what the classifier sees: the mean of what the `prompts` became, or the `class` token.
    """

    adapts, shares, guarantees = True, True, True
    records = (QUERY,)

    def __init__(
        self,
        pool: int = 10,
        length: int = 5,
        top: int = 5,
        strength: float = 0.1,
        batchwise: bool = False,
        reads: Literal["prompts", "class"] = "prompts",
    ) -> None:
        super().__init__()
        for name, value in (("pool", pool), ("length", length), ("top", top)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, such as 5")
        if top > pool:
            raise ValueError(f"top={top}: expected at most pool={pool}, the number of entries")
        if top == pool and strength:
            raise ValueError(
                f"top={top} takes all entries of pool={pool}, so that keys choose nothing: write strength=0, or fewer"
            )
        if batchwise and top == pool:
            raise ValueError(f"batchwise=True has no effect with top={top} of pool={pool} entries: leave it out")
        if reads not in ("prompts", "class"):
            raise ValueError(f"reads={reads!r}: expected 'prompts' or 'class'")
        at_least_zero(strength=strength)
        self.pool, self.length, self.top = pool, length, top
        self.strength, self.batchwise = strength, batchwise
        self.tokens = Given()
        self.tokens.reads = reads == "prompts"
        self.keys: nn.Parameter | None = None  # (pool, dim)
        self.prompts: nn.Parameter | None = None  # (pool, length, width)

    def grow(self, learner: Core, task: Task) -> None:
        """The pool at the first task; later ones go on with it."""
        if self.prompts is not None:
            return
        backbone = learner.backbone
        self.tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
        width = backbone.sites("q", "0")[0].fan_in
        with self.tokens.giving(torch.zeros(1, width, device=learner.device)):
            check_tokens(learner)
        if self.tokens.reads and not _reads_first_token(learner):
            raise ValueError(
                f"l2p(reads='prompts') puts what the prompts became in the class token's place, which {backbone.spec} "
                "does not read by itself: write reads='class'"
            )
        self.keys = nn.Parameter(torch.empty(self.pool, backbone.dim).normal_(std=0.02))
        self.keys.requires_grad_(self.strength > 0)
        self.prompts = nn.Parameter(torch.empty(self.pool, self.length, width).normal_(std=0.02))

    def record(self, learner: Core, batch: Batch) -> Batch:
        """The query of each image."""
        return {QUERY: query(learner, batch)}

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """-strength · mean over images of Σ cos(q, k) over the keys they chose."""
        if not self.strength:
            return 0.0
        cosines, chosen = self._choose(learner, batch)
        return -self.strength * cosines.gather(1, chosen).sum(1).mean()

    def encode(self, learner: Core, batch: Batch) -> Tensor:
        """Features (B, dim) with the prompts that each image chose."""
        assert self.prompts is not None
        _, chosen = self._choose(learner, batch)
        with self.tokens.giving(self.prompts[chosen].flatten(1, 2)):
            return super().encode(learner, batch)

    def measures(self, learner: Core) -> dict[str, float]:
        """`batchwise` where the batch votes: such scores are not comparable."""
        return {"batchwise": 1.0} if self.batchwise else {}

    def _choose(self, learner: Core, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cosines of queries and keys (B, pool), and the entries chosen (B, top)."""
        assert self.keys is not None
        cosines = query(learner, batch) @ F.normalize(self.keys, dim=1).T
        return cosines, nearest(cosines.detach(), self.top, self.batchwise)


@torch.no_grad()
def _reads_first_token(learner: Core) -> bool:
    """Whether features depend on the first of the tokens that leave the last block and on no other."""
    backbone = learner.backbone

    def only_the_first(_block: nn.Module, _args: Any, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :1], torch.zeros_like(hidden[:, 1:])], dim=1)

    plain = output_of(learner)
    handle = backbone.get_submodule(backbone.blocks()[-1]).register_forward_hook(only_the_first)
    try:
        return torch.allclose(output_of(learner), plain, rtol=1e-3, atol=1e-5)
    finally:
        handle.remove()
