"""Gradients of the step, of a loss that may reach nothing, and on old examples: what GEM and A-GEM compare."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from perdure.core.learner import Core
from perdure.types import Batch


def with_gradients(learner: Core) -> list[nn.Parameter]:
    """The parameters that the step is about to move: those with a gradient, always in the same order."""
    return [p for p in learner.trainable().values() if p.grad is not None]


def gradients_of(
    loss: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool | None = None, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients by each of `parameters`, None where the loss does not depend on it.

    It may depend on none: conversations without images do not reach a tower of images.

    Args:
        loss: a scalar.
        parameters: what it is differentiated by.
        retain_graph: see `torch.autograd.grad`.
        create_graph: so too.
    """
    if not (parameters and loss.requires_grad):
        return (None,) * len(parameters)
    return torch.autograd.grad(
        loss, parameters, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def or_zeros(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """`gradients` by `parameters`, zeros where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    return [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]


def gradients_on(learner: Core, batch: Batch, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the objective's loss on old examples, without penalties; zero where the loss does not reach.

    All seen classes compete, so what is learnt now may not outshout old classes either.
    """
    loss = learner.objective.losses(learner.encode(batch), batch, only_task=False).mean()

    def scaled(scale: float) -> list[Tensor]:
        with learner.undivided():  # what is encoded once more on the way back is all here
            found = gradients_of(loss * scale, parameters, retain_graph=scale > 1)
        return learner.processes.mean(or_zeros(found, parameters))

    return at_scale(learner.scaler.get_scale(), scaled)[0]


def at_scale(scale: float, gradients: Callable[[float], Sequence[Tensor]]) -> tuple[list[Tensor], float]:
    """Gradients of a loss that is multiplied, as float16 needs, at the first scale from `scale` down that they bear.

    Args:
        scale: to begin with; 1 where nothing is to be scaled.
        gradients: of the loss times a scale.

    Returns:
        The gradients of the loss, and the scale.
    """
    while scale > 1:
        found = gradients(scale)
        if all(bool(gradient.isfinite().all()) for gradient in found):
            return [gradient / scale for gradient in found], scale
        scale /= 16
    return list(gradients(1.0)), 1.0  # as they are: a copy of each example's would take their memory twice
