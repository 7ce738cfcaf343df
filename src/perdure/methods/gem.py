"""Gradient episodic memory (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840): no step against any old task.

`after_backward` compares the gradient g with that on old examples of each past task, g_k. Where some g · g_k < 0, the
closest g~ with all g~ · g_k >= 0 is g + Gᵀv, G the matrix of the g_k, and v solves the dual (section 3)

    min_v  1/2 vᵀ G Gᵀ v + (G g)ᵀ v    so that  v >= margin,

a problem of one unknown a task. Shifted to u = v - margin >= 0 it is a non-negative least-squares problem of a Cholesky
factor of G Gᵀ, which SciPy solves (quadprog, which the official code uses, is under the GPL).

Differs: gradients are compared by their cosines, so that what keeps G Gᵀ regular (1e-10; official code: 1e-3 on raw
products) means the same for every model; that no constraint is broken is checked. Old examples are `batch_size` random
ones of each task's share of one memory, not all of them. All seen classes compete for old examples, and for new ones
too unless the task is told at test time; in the official code, whose tasks are told, each example has its own task's.
Only parameters that the new examples move are compared and projected, so a frozen old head stays frozen.
"""

import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.core.method import check_mask
from perdure.mechanisms.gradients import gradients_on, with_gradients
from perdure.mechanisms.replay import ExemplarBuffer, Rehearsal
from perdure.mechanisms.subspace import exact
from perdure.options.ranges import BatchSize, Count, Strength
from perdure.types import Batch, Task

_RIDGE = 1e-10  # on the diagonal of cosines
_TOLERANCE = 1e-5  # of a cosine: what float32 gradients leave of an exact solution


class Unsolved(ValueError):
    """The projected gradient still points against an old task."""


class GEM(Rehearsal, name="gem"):
    """Turns each step so far that it raises the loss on no past task's examples.

    The memory holds references into the tasks' training sets, which must stay at hand.

    Args:
        size: number of examples remembered in all, the same number of each class.
        batch_size: old examples of each past task that a step is compared with.
        margin: least weight of each past task's gradient in a projected step (the paper's γ); above 0, old tasks are
            not only kept but improved.
        mask: whether new examples compete among their task's own classes only, old ones always among all; None is False
            where all seen classes may be answered, and True where the task is told.
    """

    gradient_projection = True
    lacks = "no gradient to project"

    def __init__(
        self, size: Count = 2000, batch_size: BatchSize = 32, margin: Strength = 0.5, mask: bool | None = None
    ) -> None:
        super().__init__(ExemplarBuffer(size, selection="class_balanced"))
        self.batch_size, self.margin, self.mask = batch_size, margin, mask
        self._old: list[Batch] = []  # of the current step, one batch a past task

    def grow(self, learner: Core, task: Task) -> None:
        """Without the mask all heads learn from new examples too."""
        if not (learner.scenario == "task" if self.mask is None else self.mask):
            learner.objective.unmask()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        super().check(learner, task)
        check_mask(learner, self.mask)

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Draw old examples of each past task; the batch itself stays as it is."""
        tasks, generator = self.memory.refs[:, 0].cpu(), learner.generator("gem", learner.step)
        self._old = []
        for index in torch.unique(tasks).tolist():
            mine = (tasks == index).nonzero().flatten()
            drawn = mine[torch.randperm(len(mine), generator=generator)[: self.batch_size]]
            self._old.append(self.memory.seen(learner, drawn, batch))
        return batch

    def after_backward(self, learner: Core) -> None:
        """Project the gradient where it points against a past task's."""
        parameters = with_gradients(learner)
        old = [gradients_on(learner, batch, parameters) for batch in self._old] if parameters else []
        self._old = []
        if not old:
            return
        with torch.no_grad():
            # a parameter's gradients, new one last: (tasks + 1, numbers), never all parameters' in one matrix
            rows = [
                torch.stack([g.flatten() for g in (*each, p.grad)]) for p, *each in zip(parameters, *old, strict=True)
            ]
            products = _products(rows, rows)
            weights = solve_dual(products, self.margin)
            if weights is None:
                return
            share = torch.cat([weights, weights.new_ones(1)]).to(rows[0])
            projected = [share @ row for row in rows]
            check_projection(_products(rows, [row.unsqueeze(0) for row in projected])[:-1, 0], products, weights)
            for p, row in zip(parameters, projected, strict=True):
                p.grad = row.view_as(p)


def solve_dual(products: Tensor, margin: float) -> Tensor | None:
    """The weights v (tasks,) >= `margin` of old gradients in the projected one; None when it stays as it is.

    An old gradient of length 0 constrains nothing and weighs nothing.

    Args:
        products: inner products of the gradients, the new one last: float64 (tasks + 1, tasks + 1).
        margin: see `GEM`.
    """
    against = products[:-1, -1]
    # what is not finite is left alone: the loop notices and says so
    if not torch.isfinite(products).all() or (against >= 0).all():
        return None
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # here: it takes longer to import than the package

    length = products.diagonal().sqrt()
    live = length[:-1] > 0
    own, new = length[:-1][live], length[-1]
    cosines = products[:-1, :-1][live][:, live] / own.outer(own)
    cosines.diagonal().fill_(1 + _RIDGE)
    least = margin * own / new
    root = torch.linalg.cholesky(cosines)
    target = torch.linalg.solve_triangular(root, -(against[live] / (own * new) + cosines @ least)[:, None], upper=False)
    shifted, _ = nnls(root.T.numpy(), target[:, 0].numpy())
    weights = torch.zeros_like(against)
    weights[live] = (torch.from_numpy(shifted) + least) * new / own
    return weights


def check_projection(after: Tensor, products: Tensor, weights: Tensor) -> None:
    """Raise `Unsolved` when the projected gradient points against an old one.

    Args:
        after: inner products of the old gradients and the projected one, (tasks,).
        products: see `solve_dual`.
        weights: what `solve_dual` gave.
    """
    length = products.diagonal().sqrt()
    scale = length[:-1] * (length[-1] + weights @ length[:-1])
    worst = (after / scale.clamp_min(torch.finfo(scale.dtype).tiny)).min()
    if not worst >= -_TOLERANCE:
        raise Unsolved(
            f"gem: the projected gradient points against an old task's (cosine {float(worst):.1e}, expected at least "
            f"-{_TOLERANCE:g}): the gradients are too uneven for float32; give a lower lr or a smaller margin"
        )


def _products(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Σ over parameters of A Bᵀ, in float64 on the CPU."""
    return torch.stack([exact(a) @ exact(b).T for a, b in zip(one, other, strict=True)]).sum(0).cpu()
