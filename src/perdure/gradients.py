"""Gradients on remembered examples, beside the one that training takes: what GEM and A-GEM compare.

Both protect what the learner answers, not parameters: a new task's branch or head that old examples reach counts as
much as weights that tasks share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perdure.learner import Core
from perdure.memory.examples import read
from perdure.types import Batch


def moved(learner: Core) -> list[nn.Parameter]:
    """The parameters that the step is about to move: those with a gradient, always in the same order."""
    return [p for p in learner.trainable().values() if p.grad is not None]


def remembered(learner: Core, refs: Tensor, like: Batch, purpose: str) -> Batch:
    """The old examples `refs` (n, 3) as training sees new ones: augmented, encoded as far as `like` is.

    Args:
        learner: whose tasks they belong to.
        refs: see `perdure.memory.examples`.
        like: the batch of new examples.
        purpose: of the augmentation's randomness.
    """
    old = {key: value.to(learner.device) for key, value in read(learner.tasks, refs).items()}
    old = learner.completed(old, like)
    if "image" in old:
        old = learner.augment(old, learner.generator(f"augment {purpose}", learner.step))
    return learner.noted(old)


def on(learner: Core, batch: Batch, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the objective's loss on old examples, without penalties; zero where the loss does not reach.

    All seen classes compete, so what is learnt now may not outshout old classes either.
    """
    loss = learner.objective.losses(learner.encode(batch), batch, local=False).mean()
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))
