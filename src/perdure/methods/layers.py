"""Features of several layers side by side: LayUP (Ahrens et al., TMLR 2024, arXiv:2312.08888).

What separates classes is not all in a pre-trained encoder's last layer, least of all for data unlike its own. LayUP
takes the class token of the last blocks, and a ridge regression on them: `layers + ranpac(dim=0)`.

Differs: beside each block's first token (the class token where the model has one) stands the mean of the others, and
each of them is normalised to mean 0 and deviation 1, since blocks differ in scale by orders of magnitude.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.method import Method, predicts
from perdure.options.ranges import Count
from perdure.types import Batch, Task


class Layers(Method, name="layers"):
    """Hands on the tokens of the last blocks instead of the encoder's own features; trains nothing by itself.

    Args:
        last: number of blocks, counted from the top.
        means: with the mean of all tokens but the first; it doubles the features.
    """

    reads = True

    def __init__(self, last: Count = 2, means: bool = True) -> None:
        super().__init__()
        self.last, self.means = last, means

    def grow(self, learner: Core, task: Task) -> None:
        """Nothing to make room for; refuse what cannot be."""
        depth = len(learner.backbone.blocks())
        if self.last > depth:
            raise ValueError(f"layers(last={self.last}): expected 1 to {depth}, the blocks of {learner.backbone.spec}")
        if learner.objective.open_vocabulary and not predicts(learner.method):
            raise ValueError(
                "layers gives features that class names cannot be compared with: use --objective classify, or add ncm "
                "or ranpac"
            )

    def width(self, learner: Core) -> int:
        """Features: width of the blocks x tokens taken x blocks."""
        return learner.backbone.sites("q", "0")[0].fan_in * (1 + self.means) * self.last

    def encode(self, learner: Core, batch: Batch) -> Tensor:
        """Normalised tokens of the last blocks (B, width), the lowest block first."""
        taken: list[Tensor] = []

        def take(_block: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            taken.append(hidden[:, 0])
            if self.means:
                taken.append(hidden[:, 1:].mean(1))

        backbone = learner.backbone
        handles = [backbone.get_submodule(name).register_forward_hook(take) for name in backbone.blocks()[-self.last :]]
        try:
            backbone(batch)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([F.layer_norm(token.float(), token.shape[1:]) for token in taken], dim=1)
