"""Prefix tuning in sequence (Li & Liang, ACL 2021, arXiv:2101.00190): learnt keys and values in each block's attention.

Differs: the paper learns one task, in a language model, and lets a small network produce the prefixes while they are
trained. Here they are trained as they are, start from a normal distribution of deviation 0.02, and all tasks go on with
the same ones, as plain LoRA does with its branch.
"""

import torch

from perdure.adapters.prefix import Prefix, starting_prefix
from perdure.backbones.base import Tower, named_towers
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.prompting import attach_prefix
from perdure.options.ranges import Length
from perdure.types import Task


class PrefixTuning(Method, name="prefix"):
    """Keys and values that join those of every input, shared and trained by all tasks; the encoder stays as it is.

    Args:
        length: keys, and as many values, in each block.
        blocks: which blocks, all by default.
        tower: which encoder.
    """

    changes_encoder, trains_shared, borderless = True, True, True

    def __init__(self, length: Length = 10, blocks: str | None = None, tower: Tower = "vision") -> None:
        super().__init__()
        self.length, self.blocks, self.tower = length, blocks, tower
        self.prefixes = torch.nn.ModuleList()  # a Prefix for each tower

    def grow(self, learner: Core, task: Task) -> None:
        """Prefixes at the first task; later ones go on with them."""
        if len(self.prefixes):
            return
        for tower in named_towers(self.tower):
            keys = learner.backbone.sites("k", self.blocks, tower)
            prefix = Prefix(starting_prefix(len(keys), self.length, 2 * keys[0].fan_out))
            attach_prefix(learner, prefix, self.blocks, tower)
            self.prefixes.append(prefix)
