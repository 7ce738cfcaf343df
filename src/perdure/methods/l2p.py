"""L2P: learning to prompt, from a pool (Wang et al., CVPR 2022, arXiv:2112.08654).

Each entry of the pool is a key and a few prompt tokens. An image takes the `top` entries whose keys are nearest to its
query q, the features of the pre-trained encoder without prompts. Loss: cross-entropy - strength · mean over images of
Σ cos(q, k) over the chosen keys. The choice itself has no gradient: keys learn from the pull only, tokens from the
cross-entropy only.

Differs: every image chooses for itself, in training and at test time; the published codes let the batch vote, which
`batchwise=True` reproduces. With `reads="prompts"` the mean of what the tokens became takes the class token's place
before the model's last norm; published is the mean after it. Keys and tokens start from a normal distribution of
deviation 0.02 (published: uniform), tokens have no position, gradients are not clipped. A pool of a text tower, from
which each text chooses by what the pre-trained tower makes of it, is ours.
"""

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.prompt_tokens import RoutedPrompts
from perdure.backbones.base import OneTower, Tower, named_towers
from perdure.core.learner import Core
from perdure.mechanisms.prompting import PromptPool, QueriedPrompts, check_tokens, nearest, output_of
from perdure.options.ranges import Length, Range, Strength, without_effect
from perdure.types import Batch, Task


class Pool(PromptPool):
    """Keys and prompt tokens of one tower.

    Args:
        keys: (pool, dim).
        prompts: (pool, length, width).
        top: entries that an input takes.
        batchwise: all inputs take the same.
        tokens: how what is chosen passes through the tower.
    """

    def __init__(self, keys: Tensor, prompts: Tensor, top: int, batchwise: bool, tokens: RoutedPrompts) -> None:
        super().__init__()
        self.keys, self.prompts = nn.Parameter(keys), nn.Parameter(prompts)
        self.top, self.batchwise, self.tokens = top, batchwise, tokens

    def joining(self, asked: Tensor, labels: Tensor | None) -> AbstractContextManager[None]:
        """See `PromptPool.joining`."""
        _, chosen = self._choose(asked)
        return self.tokens.using(self.prompts[chosen].flatten(1, 2))

    def nearness(self, asked: Tensor) -> Tensor:
        """Mean over inputs of Σ cos(q, k) over the keys they chose."""
        cosines, chosen = self._choose(asked)
        return cosines.gather(1, chosen).sum(1).mean()

    def _choose(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of queries and keys (B, pool), and the entries chosen (B, top)."""
        cosines = asked @ F.normalize(self.keys, dim=1).T
        return cosines, nearest(cosines.detach(), self.top, self.batchwise)


class L2P(QueriedPrompts[Pool], name="l2p"):
    """A pool of keys and prompt tokens, shared and trained by all tasks; the encoder stays as it is.

    The pool never grows. Entries that no image or text chooses learn nothing.

    Args:
        pool: number of entries.
        length: tokens of an entry.
        top: entries that an image or text takes.
        strength: weight of the pull of keys to the queries that chose them; 0 leaves keys where they start.
        batchwise: all images of a batch take the entries that most of them chose, as in the published codes. Answers
            then depend on who else is asked about, and on test batches sorted by task it tells the task: for
            reproduction only, and of the vision tower only.
        reads: what the vision tower gives: the mean of what the `prompts` became, or the `class` token; None is
            `prompts`. A text tower reads where it always does.
        tower: which encoder; each has a pool of its own.
    """

    trains_shared, borderless = True, True

    def __init__(
        self,
        pool: Annotated[int, Range(1, 1024)] = 10,
        length: Length = 5,
        top: Annotated[int, Range(1, 1024)] = 5,
        strength: Strength = 0.1,
        batchwise: bool = False,
        reads: Literal["prompts", "class"] | None = None,
        tower: Tower = "vision",
    ) -> None:
        super().__init__(tower)
        if top > pool:
            raise ValueError(f"top={top}: expected at most pool={pool}, the number of entries")
        if top == pool and strength:
            raise ValueError(
                f"top={top} takes all entries of pool={pool}, so that keys choose nothing: write strength=0, or fewer"
            )
        if batchwise and top == pool:
            raise ValueError(f"batchwise=True has no effect with top={top} of pool={pool} entries: leave it out")
        if tower == "text":
            without_effect("with tower='text'", batchwise=batchwise or None, reads=reads)
        self.pool, self.length, self.top = pool, length, top
        self.strength, self.batchwise = strength, batchwise
        self.from_prompts = reads != "class"

    def grow(self, learner: Core, task: Task) -> None:
        """The pools at the first task; later ones go on with them."""
        for tower in named_towers(self.tower):
            if tower not in self.towers:
                self.towers[tower] = self._pool(learner, tower)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """-strength · mean over inputs of Σ cos(q, k) over the keys they chose, added over towers."""
        if not self.strength:
            return 0.0
        return -self.strength * sum(pool.nearness(asked) for pool, asked, _ in self.asked(learner, batch))

    def _pool(self, learner: Core, tower: OneTower) -> Pool:
        backbone, tokens = learner.backbone, RoutedPrompts()
        tokens.reads = tower == "vision" and self.from_prompts
        tokens.attach([backbone.get_submodule(name) for name in backbone.blocks(tower)], tower)
        width = backbone.sites("q", "0", tower)[0].fan_in
        with tokens.using(torch.zeros(1, width, dtype=torch.float32, device=learner.device)):
            check_tokens(learner, tower)
        if tokens.reads and not _reads_first_token(learner):
            raise ValueError(
                f"l2p(reads='prompts') puts what the prompts became in the class token's place, which {backbone.spec} "
                "does not read by itself: write reads='class'"
            )
        keys = torch.empty(self.pool, backbone.dim, dtype=torch.float32).normal_(std=0.02)
        prompts = torch.empty(self.pool, self.length, width, dtype=torch.float32).normal_(std=0.02)
        made = Pool(keys, prompts, self.top, self.batchwise and tower == "vision", tokens)
        made.keys.requires_grad_(self.strength > 0)
        return made


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
