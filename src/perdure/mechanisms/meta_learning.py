"""Meta-learning: inner steps of gradient descent on what is trained, which the gradient may be taken through."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.core.learner import Core
from perdure.core.method import Method, check_trained
from perdure.mechanisms.gradients import gradients_of, or_zeros
from perdure.types import AnyLearner, Batch, Task, take

Weights = Mapping[str, Tensor]
"""Values of trainable parameters, by their names."""
_HEADS_FASTER = 10.0  # than what makes features, where these are of length 1
_LEAST = 1e-12  # of mean ‖feature‖²: features may all be zero
Loss = Callable[[Core, Batch], Tensor]
"""`Core.plain_loss`, the objective's alone; or `Core.loss`, with the penalties of all parts."""


class _Asked(nn.Module):
    """A loss as a module, for `functional_call`."""

    def __init__(self, learner: Core, loss: Loss) -> None:
        super().__init__()
        self.learner, self.loss = learner, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.learner, batch)


def loss_at(learner: Core, weights: Weights, batch: Batch, loss: Loss) -> Tensor:
    """`loss` of `batch` with `weights` in place of the parameters of their names; gradients flow into them."""
    named = {f"learner.{name}": value for name, value in weights.items()}
    found: Tensor = functional_call(_Asked(learner, loss), named, (batch,))
    return found


def inner_step(
    learner: Core,
    weights: Weights,
    batch: Batch,
    rates: Mapping[str, Tensor | float],
    loss: Loss = Core.plain_loss,
    second_order: bool = False,
    clip: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of gradient descent: the new weights, and the gradients that led to them.

    Args:
        learner: whose loss.
        weights: where the step starts; each needs a gradient.
        batch: what it descends on.
        rates: of each weight, or of each number in it.
        loss: see `Loss`.
        second_order: whether gradients flow through the step's own gradients, or take these for constant.
        clip: gradients are cut to at most this, number by number.
    """
    with twice_differentiable() if second_order else nullcontext():
        value = loss_at(learner, weights, batch, loss)
        found = gradients_of(value, list(weights.values()), create_graph=second_order)
    gradients = {
        name: g if clip is None else g.clamp(-clip, clip)
        for name, g in zip(weights, found, strict=True)
        if g is not None
    }
    return {n: w - rates[n] * gradients[n] if n in gradients else w for n, w in weights.items()}, gradients


def turns_features(name: str) -> bool:
    """Whether the parameter called `name` is multiplied by features: the weight of a head."""
    return name.startswith("objective.heads.") and name.endswith(".weight")


def twice_differentiable() -> AbstractContextManager[None]:
    """Within, attention is computed in a way whose gradient has a gradient: that of the fused kernels has none."""
    return sdpa_kernel(SDPBackend.MATH)


def set_gradients(learner: Core, gradients: Mapping[str, Tensor | None]) -> None:
    """What the optimizer will find; None where nothing depends on a parameter, which the loop notices."""
    for name, parameter in learner.trainable().items():
        found = gradients.get(name)
        parameter.grad = None if found is None else found.detach()


def interleaved(examples: int, parts: int) -> list[Tensor]:
    """Positions of so many examples in `parts` that are not empty: each part has every so-manieth one.

    Old examples that stand behind the new ones are so in every part.
    """
    return [torch.arange(start, examples, parts) for start in range(min(parts, examples))]


def halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two disjoint halves, support and query: of each class as many examples in the one as in the other.

    A class that has a single example is in one of the two. Of an odd number the query has one more.
    """
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]
    return order[1::2], order[0::2]


def check_taught(learner: Core, part: Method, task: Task) -> None:
    """Raise `ValueError` where already in the first task nothing is trained that answers depend on."""
    if task.index == 0:
        check_trained(learner, part, "nothing to teach")


def check_second_order(learner: AnyLearner, part: Method, remedy: str) -> None:
    """Raise `ValueError` where gradients of gradients would be taken of the pre-trained weights themselves."""
    if learner.tunes_backbone:
        raise ValueError(
            f"{part.name} takes gradients through gradients, of adapters and heads only: here pre-trained weights are "
            f"trained. Write {remedy}, or put an adapter such as lora in place of what trains them"
        )


class InnerSteps(Method):
    """Base of what takes steps of gradient descent within a step.

    Of the weights of heads their rate counts in units of 10 / mean ‖feature‖²: so it means the same whatever the length
    of an encoder's features, which is 1 in one and 20 in another. At 0.1 a step on an example corrects its scores by
    their error.
    """

    derived = ("_length",)
    inner_lr: float
    _length: Tensor | float = 1.0

    def penalty(self, learner: AnyLearner, batch: Batch, features: Tensor) -> Tensor | float:
        """Nothing of its own; it is noted how long the step's features are."""
        self._length = features.detach().square().sum(1).mean().clamp_min(_LEAST)
        return super().penalty(learner, batch, features)

    def units(self, weights: Weights) -> dict[str, Tensor | float]:
        """Of the rate of each of `weights`."""
        return {name: _HEADS_FASTER / self._length if turns_features(name) else 1.0 for name in weights}

    def inner_rates(self, weights: Weights) -> dict[str, Tensor | float]:
        """Of each of `weights`."""
        return {name: self.inner_lr * unit for name, unit in self.units(weights).items()}


class ModelAgnostic(InnerSteps):
    """Base of MAML and FOMAML: the gradient of the loss on a query after `inner_steps` steps on a support.

    Both are halves of the batch, without a common example. The steps descend on the objective's loss; what is asked of
    the adapted weights is that and the penalties of all parts, so a pull or a teacher beside it is a term of the outer
    loss. A batch of one example, which has no halves, is learnt plainly.
    """

    second_order: bool
    borderless, divides = True, True

    def __init__(self, inner_steps: int, inner_lr: float) -> None:
        super().__init__()
        self.inner_steps, self.inner_lr = inner_steps, inner_lr

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        check_taught(learner, self, task)

    def backward(self, learner: Core, loss: Tensor, batch: Batch) -> None:
        """The gradient of the outer loss."""
        if len(batch["label"]) < 2:
            return super().backward(learner, loss, batch)
        support, query = (
            take(batch, rows) for rows in halves(batch["label"], learner.generator(self.name, learner.step))
        )
        set_gradients(learner, self.meta_gradients(learner, support, query))
        return None

    def meta_gradients(self, learner: Core, support: Batch, query: Batch) -> dict[str, Tensor | None]:
        """Of the outer loss on `query`, by the weights before the inner steps on `support`."""
        weights: Weights = dict(learner.trainable())
        start, rates = list(weights.values()), self.inner_rates(weights)
        for _ in range(self.inner_steps):
            weights, _ = inner_step(learner, weights, support, rates, second_order=self.second_order)
        with twice_differentiable() if self.second_order else nullcontext():
            outer = loss_at(learner, weights, query, Core.loss)
            found: Sequence[Tensor | None] = gradients_of(outer, start)
        if not outer.requires_grad:  # the support shows images, the query texts alone, which move nothing here
            found = or_zeros(found, start)
        return dict(zip(weights, found, strict=True))
