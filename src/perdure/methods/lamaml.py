"""Look-ahead MAML (La-MAML; Gupta, Yadav & Paull, NeurIPS 2020, arXiv:2007.13904): learned rates, and old examples.

`batch` adds old examples R to the new ones X. `backward`, with a rate α of each number in each parameter:

    θ'_0 = θ,   θ'_{i+1} = θ'_i - α ∇L(θ'_i; X_i)      X_i the parts of X
    L_meta = mean over i >= 1 of L(θ'_i; X ∪ R)
    α ← α - η ∇_α L_meta                                first, as in algorithm 1
    gradient left to the optimizer: ∇_θ L_meta

`after_step`: the optimizer's step is multiplied by max(0, α) / α_0, number by number, with the new α.

Differs: the outer rate is not α itself but the run's times α / α_0: so the optimizer, its rate and its schedule keep
their meaning, and rates that stayed where they began change nothing. Memory and rehearsal are those of `replay`. All
seen classes compete. ∇_α is cut as the inner gradients are; in the official code the norms of the outer gradients are.
"""

import torch
from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.mechanisms.gradients import gradients_of
from perdure.mechanisms.meta_learning import (
    InnerSteps,
    Weights,
    check_second_order,
    inner_step,
    interleaved,
    loss_at,
    set_gradients,
    twice_differentiable,
)
from perdure.mechanisms.replay import ExemplarBuffer, Rehearsal
from perdure.options.ranges import Bytes, Count, Factor, Rate, Ratio, Strength
from perdure.types import Batch, Task, join, take


class LaMAML(InnerSteps, Rehearsal, name="lamaml"):
    """Small steps on new examples shall not harm new and old ones; how large they are, each parameter learns.

    The memory holds references into the tasks' training sets, which must stay at hand.

    Args:
        size: number of examples remembered in all; None is 2000, or what `bytes` allow.
        inner_steps: number of steps on the new examples of a batch, each on a part of them.
        inner_lr: the rate with which every parameter begins (α_0); of heads' weights in units of 10 / mean ‖feature‖².
        rate_lr: the rate at which rates are learnt (η); 0 leaves them as they begin (C-MAML).
        second_order: whether gradients flow through the inner steps' own gradients.
        clip: inner gradients, and those of rates, are cut to at most this, number by number.
        ratio: old examples per new one.
        bytes: of images, as a number or a text such as "50MB", in place of `size`.
    """

    rehearses = "some"
    borderless = True

    def __init__(
        self,
        size: Count | None = None,
        inner_steps: Count = 4,
        inner_lr: Rate = 0.1,
        rate_lr: Strength = 0.25,
        second_order: bool = True,
        clip: Factor = 1.0,
        ratio: Ratio = 1.0,
        bytes: Bytes | str | None = None,
    ) -> None:
        super().__init__(ExemplarBuffer(size, bytes))
        self.inner_steps, self.inner_lr, self.rate_lr = inner_steps, inner_lr, rate_lr
        self.second_order, self.clip, self.ratio = second_order, clip, ratio
        self.rates = BufferDict()  # name of a parameter -> its rates
        self._new = 0  # new examples of the current batch, which stand before the old ones
        self._before: dict[str, Tensor] = {}  # the parameters before the optimizer's step

    def grow(self, learner: Core, task: Task) -> None:
        """All seen classes compete: old ones are in the batch."""
        super().grow(learner, task)
        if task.index > 0:
            learner.objective.unmask()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect, or cannot be; known when all parts have grown."""
        super().check(learner, task)
        if self.second_order:
            check_second_order(learner, self, "lamaml(second_order=False)")

    def begin_task(self, learner: Core, task: Task) -> None:
        """Rates of what is trained no more are dropped; those of what is new begin."""
        super().begin_task(learner, task)
        known, now = dict(self.rates), learner.trainable()
        self.rates.clear()
        for name, parameter in now.items():
            old = known.get(name)
            if old is None or old.shape != parameter.shape:
                old = torch.full_like(parameter, self.inner_lr).detach()
            self.rates[name] = old

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Append old examples."""
        self._new = len(batch["label"])
        if not len(self.memory):
            return batch
        n = max(1, round(self.ratio * self._new))
        rows = self.memory.pick(n, learner.generator("lamaml", learner.step))
        return join([batch, self.memory.recall(learner, rows, batch)])

    def backward(self, learner: Core, loss: Tensor, batch: Batch) -> None:
        """Learn the rates, then leave the gradient of the parameters to the optimizer."""
        start = dict(learner.trainable())
        rates = {name: self.rates[name].clone().requires_grad_() for name in start}
        by_parameter, by_rate = self.meta_gradients(learner, start, rates, batch)
        for name, gradient in by_rate.items():
            if gradient is not None:
                self.rates[name] = (rates[name] - self.rate_lr * gradient.clamp(-self.clip, self.clip)).detach()
        set_gradients(learner, by_parameter)
        self._before = {name: parameter.detach().clone() for name, parameter in start.items()}

    def meta_gradients(
        self, learner: Core, start: Weights, rates: Weights, batch: Batch
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        """Of the meta-loss on `batch`, by the parameters and by their rates."""
        parts = interleaved(self._new, self.inner_steps)
        weights, outer, units = start, [], self.units(start)
        inner = {name: rate * units[name] for name, rate in rates.items()}
        for rows in parts:
            weights, _ = inner_step(
                learner, weights, take(batch, rows), inner, second_order=self.second_order, clip=self.clip
            )
            with twice_differentiable():
                outer.append(loss_at(learner, weights, batch, Core.loss))
        both = [*start.values(), *rates.values()]
        found = gradients_of(torch.stack(outer).mean(), both)
        return dict(zip(start, found[: len(start)], strict=True)), dict(zip(rates, found[len(start) :], strict=True))

    @torch.no_grad()
    def after_step(self, learner: Core, batch: Batch) -> None:
        """Each number goes as far as its rate has grown; without borders the new examples are offered to the memory."""
        for name, parameter in learner.trainable().items():
            if (before := self._before.get(name)) is not None:
                share = self.rates[name].clamp_min(0) / self.inner_lr
                parameter.copy_(before + share * (parameter - before))
        self._before = {}
        super().after_step(learner, batch)
