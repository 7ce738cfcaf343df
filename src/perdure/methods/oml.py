"""Online-aware meta-learning (OML; Javed & White, NeurIPS 2019, arXiv:1905.12588): a representation to learn heads on.

The encoder's trained parameters are the representation, the heads the prediction part. `backward`: a head that begins
anew learns one half of the batch, one example after another; the loss of that head on the whole batch, through all its
steps, is what the representation descends on (algorithm 2). The learner's own heads descend on their plain loss.

Differs: trajectory and remembered examples are halves of the batch, drawn anew in each step, old examples among them
where a part rehearses. The rate of the inner steps counts in units of 10 / mean ‖feature‖², so that it means the same
for every encoder, and so do the values with which a head begins. The learner's own heads, which answer, are no part of
the meta-loss: the published prediction part is kept from one trajectory to the next but for the rows of its classes.
"""

import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.mechanisms.gradients import gradients_of
from perdure.mechanisms.meta_learning import InnerSteps, Loss, Weights, halves, inner_step, loss_at, set_gradients
from perdure.options.ranges import Rate
from perdure.types import Batch, Task, take


class OML(InnerSteps, name="oml"):
    """Trains the encoder so that a new head, learnt one example at a time, interferes little with itself.

    Args:
        inner_lr: rate of the inner steps; of weights in units of 10 / mean ‖feature‖².
    """

    protects = "encoder"
    needs = ("classes",)
    borderless, divides = True, True

    def __init__(self, inner_lr: Rate = 0.1) -> None:
        super().__init__()
        self.inner_lr = inner_lr

    def check(self, learner: Core, task: Task) -> None:
        """Refuse where one of the two parts is missing; known when all parts have grown."""
        if not any(p.requires_grad for p in learner.objective.parameters()):
            raise ValueError(
                f"oml learns heads within each step, and {learner.objective.name} trains none here: use --objective "
                "classify, without a part that answers in place of the heads"
            )

    def backward(self, learner: Core, loss: Tensor, batch: Batch) -> None:
        """The meta-gradient of the representation, the plain one of the heads; one example is learnt plainly."""
        if len(batch["label"]) < 2:
            return super().backward(learner, loss, batch)
        trained = learner.trainable()
        heads = {name: p for name, p in trained.items() if name.startswith("objective.")}
        representation = {name: p for name, p in trained.items() if name not in heads}
        features = learner.encode(batch)
        generator = learner.generator("oml", learner.step)
        outer = self.meta_loss(learner, batch, features, generator) + learner.method.penalty(learner, batch, features)
        both = [*zip((loss, outer), (heads, representation), strict=True)]
        found = {
            name: gradient
            for of, by in both
            for name, gradient in zip(by, gradients_of(of, list(by.values())), strict=True)
        }
        set_gradients(learner, found)
        return None

    def meta_loss(self, learner: Core, batch: Batch, features: Tensor, generator: torch.Generator) -> Tensor:
        """Loss on the batch of a head that has just learnt one half of it from `features` (B, dim)."""
        trajectory, _ = halves(batch["label"], generator)
        heads = {name: p for name, p in learner.trainable().items() if name.startswith("objective.")}
        units = self.units(heads)
        head: Weights = {name: fresh(p, features.shape[1], units[name], generator) for name, p in heads.items()}
        rates = self.inner_rates(heads)
        for row in torch.split(trajectory, 1):
            one = _from(features[row.to(features.device)])
            head, _ = inner_step(learner, head, take(batch, row), rates, one, second_order=True)
        return loss_at(learner, head, batch, _from(features))


def fresh(like: Tensor, dim: int, unit: Tensor | float, generator: torch.Generator) -> Tensor:
    """A head's parameter as it begins, of the form of `like`, for features (dim,); its rate counts in such units."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float32) * 2 - 1
    return (drawn.to(like) * (unit / dim) ** 0.5).requires_grad_()


def _from(features: Tensor) -> Loss:
    """The objective's loss on features that are known."""
    return lambda learner, batch: learner.objective.loss(features, batch)
