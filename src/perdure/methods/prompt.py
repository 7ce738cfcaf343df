"""VPT: learnt prompt tokens beside an input's own (Jia et al., ECCV 2022, arXiv:2203.12119), by all tasks in sequence.

Shallow: the tokens enter before the first block and pass through all. Deep: each block has tokens of its own, which
are dropped when it is done.

Differs: tokens start from a normal distribution of deviation 0.02 and have no dropout (the paper: uniform, dropout
0.1). The paper learns one task, in a vision tower; going on with the next one, and tokens in a text tower, are ours.
"""

import torch

from perdure.adapters.prompt_tokens import PromptTokens
from perdure.backbones.base import Tower, named_towers
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.prompting import check_tokens
from perdure.options.ranges import Length, without_effect
from perdure.types import Task


class Prompt(Method, name="prompt"):
    """Prompt tokens, shared and trained by all tasks.

    Args:
        tokens: how many, in each block that has its own.
        deep: fresh tokens for every chosen block; otherwise one set passes through all blocks.
        blocks: which blocks have tokens, with `deep`; all by default.
        tower: which encoder.
    """

    changes_encoder, trains_shared, borderless = True, True, True

    def __init__(
        self, tokens: Length = 10, deep: bool = False, blocks: str | None = None, tower: Tower = "vision"
    ) -> None:
        super().__init__()
        if not deep:
            without_effect("with deep=False, where tokens pass through all blocks", blocks=blocks)
        self.tokens, self.deep, self.blocks, self.tower = tokens, deep, blocks, tower
        self.prompts = torch.nn.ModuleList()  # of PromptTokens

    def grow(self, learner: Core, task: Task) -> None:
        """Tokens at the first task; later ones go on with them."""
        if len(self.prompts):
            return
        backbone = learner.backbone
        for tower in named_towers(self.tower):
            for site in backbone.sites("q", self.blocks if self.deep else "0", tower):
                tokens = PromptTokens(self.tokens, site.fan_in)
                through = [site.key.rpartition(":")[0]] if self.deep else backbone.blocks(tower)
                tokens.attach([backbone.get_submodule(name) for name in through], tower)
                self.prompts.append(tokens)
            check_tokens(learner, tower)
