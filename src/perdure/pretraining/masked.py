"""Masked image modelling: SimMIM (Xie et al., CVPR 2022, arXiv:2111.09886).

Some patches of an image are hidden, and a linear layer on the last block's tokens predicts their pixels; the loss is
the mean absolute error on hidden patches alone. Pixels of a patch are normalised to mean 0 and deviation 1, as in MAE
(He et al., CVPR 2022, arXiv:2111.06377, "w/ norm").

Differs: hidden patches have the mean colour in place of a learnt token, so that any backbone reads them and nothing of
the encoder is new; what is hidden is a patch of the model's own, SimMIM hides squares of 32 pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.pretext import Pretext
from perdure.options.ranges import Share
from perdure.pretraining.patches import grid_of, hidden_patches, patches_of, tokens_of, without
from perdure.types import Batch, Task

_LEAST = 1e-6  # of a patch's variance, which is 0 where all is one colour


class Masked(Pretext, name="masked"):
    """Predicts the pixels of hidden patches.

    Args:
        ratio: share of an image's patches that a step hides, drawn anew in every step.
    """

    def __init__(self, ratio: Share = 0.6) -> None:
        super().__init__()
        if ratio == 1:
            raise ValueError(f"ratio={ratio}: expected less than 1, or nothing is left to predict from")
        self.ratio = ratio
        self.grid = 0

    def grow(self, learner: Core, task: Task) -> None:
        """A fresh linear decoder."""
        with torch.no_grad():
            self.grid = grid_of(learner.backbone)
            width = learner.backbone.before(0, learner.backbone.sample()).shape[2]
        pixels = 3 * (learner.backbone.preprocess.size // self.grid) ** 2
        self.decoder = nn.Linear(width, pixels, dtype=torch.float32)

    def loss(self, learner: Core, batch: Batch) -> Tensor:
        """Mean absolute error on the hidden patches."""
        image = batch["image"]
        hidden = hidden_patches(learner, len(image), self.grid, self.ratio)
        tokens = tokens_of(learner, batch | {"image": without(learner.backbone, image, hidden)}, self.grid)
        wanted = normalised(patches_of(image, self.grid)[hidden])
        return F.l1_loss(self.decoder(tokens[hidden]), wanted)


def normalised(patches: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1; of one colour alone 0."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + _LEAST).sqrt()
