"""The input space of past tasks, per layer: which directions are taken, which are free (DualGPM).

Liang & Li, CVPR 2024, arXiv:2404.00228; GPM: Saha et al., ICLR 2021, arXiv:2103.09762. Past inputs M and the free
complement M⊥ are two ways to store one thing; the smaller is kept, so a layer never stores more than d·d/2 numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perdure.mechanisms.linear_algebra import exact

Kind = Literal["taken", "free"]
Power = Literal[1, 2]
# Share of the energy, by power, below which a direction is rounding. Moments are products in float32: in a direction
# that a layer norm leaves without any input they had 4e-9 of it, of either sign. In R² the rounding is that of `eigh`.
_TOLERANCE: dict[Power, float] = {1: 1e-8, 2: 1e-14}


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis (d, k) float64 of the directions that are taken, or of those that are free.

    The paper's code calls these types `remove` and `retain`.
    """

    basis: Tensor
    kind: Kind = "taken"

    @classmethod
    def empty(cls, fan_in: int, device: torch.device | str = "cpu") -> "Subspace":
        """Nothing is taken yet; `device` is that of the moments to come."""
        return cls(torch.zeros(fan_in, 0, dtype=torch.float64, device=device))

    @property
    def free(self) -> int:
        """Number of free directions."""
        fan_in, k = self.basis.shape
        return fan_in - k if self.kind == "taken" else k

    def project(self, moments: Tensor) -> Tensor:
        """F R F for the projector F on the free directions: symmetric (d, d)."""
        basis = self.basis
        if self.kind == "free":
            return basis @ (basis.T @ moments @ basis) @ basis.T
        left = moments - basis @ (basis.T @ moments)
        return left - (left @ basis) @ basis.T

    def inside(self, rows: Tensor) -> Tensor:
        """The part of each row (n, d) that lies in the taken directions, float64."""
        rows = exact(rows).to(self.basis.device)
        part = rows @ self.basis @ self.basis.T
        return part if self.kind == "taken" else rows - part

    def design(self, moments: Tensor, rank: int, power: Power = 1) -> Tensor:
        """The `rank` leading free directions of the inputs, as orthonormal rows (rank, d); eq. for B_t, section 3.2.

        Of R they are the paper's, which catch the most of the inputs' energy; with `power` 2, of R², those of the
        official code, an SVD of F R: its left singular vectors are the eigenvectors of F R² F.
        Rows beyond the free space are zero: an eigenvector of the null space would point anywhere, into the past too.
        """
        moments = torch.linalg.matrix_power(moments, power)
        values, vectors = _eigh(self.project(moments))
        rows = vectors[:, :rank].T.clone()
        rows[values[:rank] <= _TOLERANCE[power] * torch.linalg.matrix_norm(moments)] = 0
        return rows

    def take(self, moments: Tensor, keep: float, power: Power = 1) -> "Subspace":
        """Take the fewest further directions with which `keep` of the inputs' energy lies in the taken space.

        Args:
            moments: R = E[x xᵀ] of the new task's inputs, (d, d) float64.
            keep: share of the energy in [0, 1].
            power: the energy is the trace of R, as in the papers, or with 2 that of R², with which the official code
                takes far fewer directions at the same `keep`.
        """
        moments, tolerance = torch.linalg.matrix_power(moments, power), _TOLERANCE[power]
        values, vectors = _eigh(self.project(moments))
        total = moments.trace()
        energy = values.clamp_min(0)
        # outside[j] = energy that stays free after taking j directions
        outside = energy.sum() - torch.cat([energy.new_zeros(1), energy.cumsum(0)])
        needed = int((outside > (1 - keep + tolerance) * total).sum())
        needed = min(needed, int((values > tolerance * values.max().clamp_min(0)).sum()), self.free)
        if self.free == len(moments):  # the first task always takes something
            needed = max(needed, 1)
        new = vectors[:, :needed]
        if self.kind == "free":
            return Subspace(_complement(self.basis.T @ new, self.basis), "free")
        basis = torch.linalg.qr(torch.cat([self.basis, new], dim=1)).Q
        if basis.shape[1] > len(moments) / 2:
            return Subspace(_complement(basis, torch.eye(len(moments), dtype=basis.dtype, device=basis.device)), "free")
        return Subspace(basis)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors as columns, of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def _complement(inside: Tensor, basis: Tensor) -> Tensor:
    """`basis` (d, n) without the directions whose coordinates in it are the columns of `inside` (n, k): (d, n - k)."""
    if not inside.shape[1]:
        return basis
    whole: Tensor = torch.linalg.qr(inside, mode="complete").Q
    return basis @ whole[:, inside.shape[1] :]


def keep_schedule(keep: float, task: int, total: int | None) -> float:
    """Share of energy to protect after task `task` (from 0): rises linearly from `keep` to 1; constant without `total`.

    Liang & Li: ε_t = (1 - ε)·t / T + ε.
    """
    return keep if total is None else keep + (1 - keep) * task / total
