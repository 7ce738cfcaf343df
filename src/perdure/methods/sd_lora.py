"""SD-LoRA: decoupled directions and magnitudes (Wu et al., ICLR 2025, arXiv:2501.13198).

h = (W + Σ_{k<t} α_k D_k + α_t A_t B_t) x: directions D_k of former tasks are frozen, all magnitudes α go on being
trained, one scalar per task for all layers (equation 3). Afterwards everything is one weight.

Differs: a direction is A_k B_k over its norm in all layers together, and α_k takes that norm over, so that a new task
starts exactly from the function of the last (`normalise="jointly"`). In the paper each layer is normalised by itself
and all α start at 1 again, in the official code by ‖A‖·‖B‖ and 0.8: both make the function jump at a task's start, and
only there, so that until then what was trained is what answers.
The residual of knowledge distillation is taken relative to the new update, in all layers together.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from perdure.adapters.injection import Adapters
from perdure.adapters.magnitude_direction import MagnitudeDirection
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Count, Factor, Range, Rank
from perdure.types import Task

Factors = Sequence[tuple[Tensor, Tensor]]  # (up, down) of each layer


class SDLoRA(Method, name="sd_lora"):
    """A direction per task and layer; magnitudes of all directions are trained in every task.

    What is kept, and the cost of a step, grow with the number of tasks.

    Args:
        rank: inner dimension of each direction; several for rank reduction (SD-LoRA-RR), as `(10, 8, 6)`.
        drops: numbers of tasks after which the next of several ranks is taken, as `(4, 8)`.
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        normalise: `jointly`, without a jump between tasks; `paper` and `code`, see the module.
        magnitude: what the α of a new task starts from (with `paper` and `code`, every α at every task).
        distil: a new direction that former ones explain up to this share of its squared norm is given up, and its part
            goes into their magnitudes (SD-LoRA-KD; 9e-4 in the paper), which `paper` and `code` would forget. None
            keeps all.
    """

    changes_encoder = True

    def __init__(
        self,
        rank: Rank | Sequence[Rank] = 10,
        drops: Sequence[Count] = (),
        at: str = "qv",
        blocks: str | None = None,
        tower: Tower = "vision",
        normalise: Literal["jointly", "paper", "code"] = "jointly",
        magnitude: Factor = 1.0,
        distil: Annotated[float, Range(0, 1, above=True, below=True)] | None = None,
    ) -> None:
        super().__init__()
        self.ranks = (rank,) if isinstance(rank, int) else tuple(rank)
        if len(drops) != len(self.ranks) - 1 or sorted(drops) != list(drops):
            raise ValueError(
                f"rank={rank}, drops={drops}: expected one number of tasks between any two ranks, rising, as in "
                "rank=(10, 8, 6), drops=(4, 8)"
            )
        if distil is not None and normalise != "jointly":
            raise ValueError(
                f"distil={distil} puts an update into old magnitudes, which normalise={normalise!r} sets anew at every "
                "task: leave normalise out"
            )
        self.drops, self.at, self.blocks, self.tower = tuple(drops), at, blocks, tower
        self.normalise, self.magnitude, self.distil = normalise, magnitude, distil
        self.adapters: Adapters[MagnitudeDirection] = Adapters()
        self.magnitudes = nn.Parameter(torch.empty(0, dtype=torch.float32))

    def grow(self, learner: Core, task: Task) -> None:
        """One more direction and magnitude; the published forms normalise the last direction only now."""
        self.adapters.place(
            learner.backbone, learner.backbone.sites(self.at, self.blocks, self.tower), MagnitudeDirection
        )
        old = self.magnitudes.detach()
        if self.normalise != "jointly":
            old = torch.full_like(old, self.magnitude)
            for adapter in self.adapters:
                adapter.normalise(task.index - 1, self._length)
        self.magnitudes = nn.Parameter(torch.cat([old, old.new_full((1,), self.magnitude)]))
        for adapter in self.adapters:
            adapter.open(self.ranks[sum(task.index >= drop for drop in self.drops)], self)

    @torch.no_grad()
    def end_task(self, learner: Core, task: Task) -> None:
        """The new branch becomes a direction, or is expressed by former ones; the function stays as it was trained."""
        new = [(a.up, a.down) for a in self.adapters if a.up is not None and a.down is not None]
        squares = torch.stack([_dot(pair, pair) for pair in new])
        shares = self._explained(new, squares.sum()) if self.distil is not None and task.index else None
        if shares is not None:
            self.magnitudes[:-1] += self.magnitudes[-1] * shares
            self.magnitudes[-1] = 0
        for adapter in self.adapters:
            adapter.close(shares is None)
        if shares is None and self.normalise == "jointly":  # here and not in `grow`, for it changes no function
            length = squares.sum().sqrt()
            self.magnitudes[-1] *= length
            for adapter in self.adapters:
                adapter.normalise(task.index, lambda up, down: length)

    def measures(self, learner: Core) -> dict[str, float]:
        """Magnitude of each task's direction, and the number of directions kept."""
        kept = next(iter(self.adapters)).owners()
        return {"directions": len(kept)} | {f"magnitude/{k}": self.magnitudes[k].item() for k in kept}

    def _length(self, up: Tensor, down: Tensor) -> Tensor:
        """What the published forms divide a layer's direction by, when the next task begins."""
        return up.norm() * down.norm() if self.normalise == "code" else _dot((up, down), (up, down)).sqrt()

    def _explained(self, new: Factors, square: Tensor) -> Tensor | None:
        """Coefficients (t - 1,) of the former directions that give the new update, or None when they do not."""
        former = {}
        for index in range(len(self.magnitudes) - 1):
            found = [adapter.direction(index) for adapter in self.adapters]
            if all(found):
                former[index] = [pair for pair in found if pair is not None]
        if not former:
            return None
        gram = torch.stack([torch.stack([_inner(a, b) for b in former.values()]) for a in former.values()])
        target = torch.stack([_inner(a, new) for a in former.values()])
        # not lstsq, which on a GPU takes the directions to be independent
        solution = torch.linalg.pinv(gram.double(), hermitian=True) @ target.double()
        residual = square.double() - solution @ target.double()
        if self.distil is None or residual > self.distil * square:
            return None
        coefficients = torch.zeros_like(self.magnitudes[:-1])
        coefficients[list(former)] = solution.to(coefficients.dtype)
        return coefficients


def _dot(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Inner product of two updates given by their factors."""
    return ((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum()


def _inner(a: Factors, b: Factors) -> Tensor:
    """The same over all layers."""
    return torch.stack([_dot(x, y) for x, y in zip(a, b, strict=True)]).sum()
