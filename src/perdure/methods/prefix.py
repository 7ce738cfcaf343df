"""Prefix tuning in sequence (Li & Liang, ACL 2021, arXiv:2101.00190): learnt keys and values in each block's attention.

Differs: the paper learns one task, in a language model, and lets a small network produce the prefixes while they are
trained. Here they are trained as they are, start from a normal distribution of deviation 0.02, and all tasks go on with
the same ones, as plain LoRA does with its branch.
"""

from perdure.adapters.prefix import Prefix, starting_prefix
from perdure.learner import Core
from perdure.method import Method
from perdure.prompting import attach_prefix
from perdure.types import Task


class PrefixTuning(Method, name="prefix"):
    """Keys and values that join those of every image, shared and trained by all tasks; the encoder stays as it is.

    Args:
        length: keys, and as many values, in each block.
        blocks: which blocks, all by default.
    """

    adapts, shares = True, True

    def __init__(self, length: int = 10, blocks: str | None = None) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length={length}: expected at least 1 key and value a block, such as 10")
        self.length, self.blocks = length, blocks
        self.prefix: Prefix | None = None

    def grow(self, learner: Core, task: Task) -> None:
        """Prefixes at the first task; later ones go on with them."""
        if self.prefix is not None:
            return
        keys = learner.backbone.sites("k", self.blocks)
        self.prefix = Prefix(starting_prefix(len(keys), self.length, 2 * keys[0].fan_out))
        attach_prefix(learner, self.prefix, self.blocks)
