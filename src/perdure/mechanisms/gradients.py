"""Gradients of the step, and on old examples: what GEM and A-GEM compare."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perdure.core.learner import Core
from perdure.types import Batch


def with_gradients(learner: Core) -> list[nn.Parameter]:
    """The parameters that the step is about to move: those with a gradient, always in the same order."""
    return [p for p in learner.trainable().values() if p.grad is not None]


def gradients_on(learner: Core, batch: Batch, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the objective's loss on old examples, without penalties; zero where the loss does not reach.

    All seen classes compete, so what is learnt now may not outshout old classes either.
    """
    loss = learner.objective.losses(learner.encode(batch), batch, only_task=False).mean()
    with learner.undivided():  # what is encoded once more on the way back is all here
        found = torch.autograd.grad(learner.scaler.scale(loss), parameters, materialize_grads=True)
    return learner.processes.mean([gradient / learner.scaler.get_scale() for gradient in found])
