"""Averaged gradient episodic memory (Chaudhry et al., ICLR 2019, arXiv:1812.00420): no step against old examples.

`after_backward` compares the gradient g with g_ref, the one on a random batch of old examples of all tasks: where g ·
g_ref < 0, g becomes g - (g · g_ref / g_ref · g_ref) g_ref, else it stays as it is, bit for bit.

Differs: the loss on old examples lets all seen classes compete (in the official code, whose tasks are told, each among
its own task's); the memory is a uniform sample of everything seen. Only
parameters that the new examples move are compared and projected, so a frozen old head stays frozen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.core.method import check_mask
from perdure.mechanisms.gradients import gradients_on, with_gradients
from perdure.mechanisms.replay import ExemplarBuffer, Rehearsal
from perdure.options.ranges import BatchSize, Count
from perdure.types import Batch, Task


class AGEM(Rehearsal, name="agem"):
    """Takes out of each step what would raise the loss on a random batch of old examples.

    The memory holds references into the tasks' training sets, which must stay at hand.

    Args:
        size: number of examples remembered in all.
        batch_size: old examples that a step is compared with.
        mask: whether new examples compete among their task's own classes only, as in the official code; old ones always
            compete among all.
    """

    gradient_projection = True
    lacks = "no gradient to project"

    def __init__(self, size: Count = 2000, batch_size: BatchSize = 64, mask: bool = True) -> None:
        super().__init__(ExemplarBuffer(size))
        self.batch_size, self.mask = batch_size, mask
        self._old: Batch | None = None  # of the current step

    def grow(self, learner: Core, task: Task) -> None:
        """Without the mask all heads learn from new examples too."""
        if not self.mask:
            learner.objective.unmask()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        super().check(learner, task)
        check_mask(learner, None if self.mask else False)

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Draw the old examples that the step is compared with; the batch itself stays as it is."""
        if len(self.memory):
            drawn = self.memory.pick(self.batch_size, learner.generator("agem", learner.step))
            self._old = self.memory.seen(learner, drawn, batch)
        return batch

    def after_backward(self, learner: Core) -> None:
        """Project the gradient where it points against the old examples'."""
        parameters, old = with_gradients(learner), self._old
        self._old = None
        if old is None or not parameters:
            return
        reference = gradients_on(learner, old, parameters)
        with torch.no_grad():
            gradient = [p.grad for p in parameters if p.grad is not None]
            square = _inner(reference, reference).clamp_min(torch.finfo(torch.float32).tiny)
            # no branch, which would wait for the device: with a share of 0, nothing is taken away exactly
            share = (_inner(gradient, reference) / square).clamp_max(0)
            for g, r in zip(gradient, reference, strict=True):
                g.sub_(share * r)


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
