"""VPT: learnt prompt tokens beside an image's own (Jia et al., ECCV 2022, arXiv:2203.12119), by all tasks in sequence.

Shallow: the tokens enter before the first block and pass through all. Deep: each block has tokens of its own, which
are dropped when it is done.

Differs: tokens start from a normal distribution of deviation 0.02 and have no dropout (the paper: uniform, dropout
0.1). The paper learns one task; going on with the next one is ours.
"""

import torch

from perdure.adapters.tokens import Tokens
from perdure.learner import Core
from perdure.method import Method, without_effect
from perdure.prompting import check_tokens
from perdure.types import Task


class Prompt(Method, name="prompt"):
    """Prompt tokens in the vision tower, shared and trained by all tasks.

    Args:
        tokens: how many, in each block that has its own.
        deep: fresh tokens for every chosen block; otherwise one set passes through all blocks.
        blocks: which blocks have tokens, with `deep`; all by default.
    """

    adapts, shares = True, True

    def __init__(self, tokens: int = 10, deep: bool = False, blocks: str | None = None) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: expected 1 or more, such as 10")
        if not deep:
            without_effect("with deep=False, where tokens pass through all blocks", blocks=blocks)
        self.tokens, self.deep, self.blocks = tokens, deep, blocks
        self.prompts = torch.nn.ModuleList()  # of Tokens

    def grow(self, learner: Core, task: Task) -> None:
        """Tokens at the first task; later ones go on with them."""
        if len(self.prompts):
            return
        backbone = learner.backbone
        chosen = backbone.sites("q", self.blocks if self.deep else "0")
        for site in chosen:
            tokens = Tokens(self.tokens, site.fan_in)
            through = [site.key.rpartition(":")[0]] if self.deep else backbone.blocks()
            tokens.attach([backbone.get_submodule(name) for name in through])
            self.prompts.append(tokens)
        check_tokens(learner)
