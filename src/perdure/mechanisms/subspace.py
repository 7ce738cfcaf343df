"""The input space of past tasks, per layer: which directions are taken, which are free (DualGPM).

Liang & Li, CVPR 2024, arXiv:2404.00228; GPM: Saha et al., ICLR 2021, arXiv:2103.09762. Past inputs M and the free
complement M⊥ are two ways to store one thing; the smaller is kept, so a layer never stores more than d·d/2 numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.mechanisms.moments import Moments, Sketch
from perdure.mechanisms.moments import exact as exact

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

    def _without(self, rows: Tensor) -> Tensor:
        """The part of each row (n, d) that lies in the free directions."""
        part = rows @ self.basis @ self.basis.T
        return rows - part if self.kind == "taken" else part

    def _spectrum(self, moments: Moments, power: Power) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of F R^power F: eigenvalues, largest first, vectors as columns; of R^power, its trace and its length."""
        if not isinstance(moments, Sketch):
            whole = torch.linalg.matrix_power(moments, power)
            return (*_eigh(self.project(whole)), whole.trace(), torch.linalg.matrix_norm(whole))
        _, own, right = torch.linalg.svd(moments.rows, full_matrices=False)
        rows = own.pow(power).unsqueeze(1) * right  # rowsᵀ rows = R^power
        _, found, vectors = torch.linalg.svd(self._without(rows), full_matrices=False)
        energy = own.pow(2 * power)
        return found.square(), vectors.T, moments.trace if power == 1 else energy.sum(), energy.norm()

    def design(self, moments: Moments, rank: int, power: Power = 1) -> Tensor:
        """The `rank` leading free directions of the inputs, as orthonormal rows (rank, d); eq. for B_t, section 3.2.

        Of R they are the paper's, which catch the most of the inputs' energy; with `power` 2, of R², those of the
        official code, an SVD of F R: its left singular vectors are the eigenvectors of F R² F.
        Rows beyond the free space are zero: an eigenvector of the null space would point anywhere, into the past too.
        """
        values, vectors, _, length = self._spectrum(moments, power)
        rows = vectors[:, :rank].T.clone()
        rows[values[:rank] <= _TOLERANCE[power] * length] = 0
        return F.pad(rows, (0, 0, 0, rank - len(rows)))

    def take(self, moments: Moments, keep: float, power: Power = 1) -> "Subspace":
        """Take the fewest further directions with which `keep` of the inputs' energy lies in the taken space.

        Args:
            moments: R = E[x xᵀ] of the new task's inputs, (d, d) float64, or its sketch: what that lost counts as free.
            keep: share of the energy in [0, 1].
            power: the energy is the trace of R, as in the papers, or with 2 that of R², with which the official code
                takes far fewer directions at the same `keep`.
        """
        tolerance = _TOLERANCE[power]
        values, vectors, total, _ = self._spectrum(moments, power)
        energy = values.clamp_min(0)
        # outside[j] = energy that stays free after taking j directions
        outside = energy.sum() - torch.cat([energy.new_zeros(1), energy.cumsum(0)])
        if isinstance(moments, Sketch) and power == 1:
            outside += (total - moments.rows.square().sum()).clamp_min(0)
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


def check_balance(name: str, balance: float | None, tower: str) -> None:
    """Raise `ValueError` where a share of image tokens has no effect: beside the words of which there are none."""
    if balance is not None and "language" not in tower:
        raise ValueError(
            f"{name}(balance={balance}): the {tower} tower has tokens of one kind only: write tower='language', or "
            "leave balance out"
        )


def keep_schedule(keep: float, task: int, total: int | None) -> float:
    """Share of energy to protect after task `task` (from 0): rises linearly from `keep` to 1; constant without `total`.

    Liang & Li: ε_t = (1 - ε)·t / T + ε.
    """
    return keep if total is None else keep + (1 - keep) * task / total


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric (d, d), row by row: float32 (d·(d+1)/2,)."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns].float()


def unpack_symmetric(packed: Tensor) -> Tensor:
    """The symmetric matrix that `pack_symmetric` stored, (d, d) float64."""
    packed = exact(packed)
    d = round((2 * len(packed) + 0.25) ** 0.5 - 0.5)
    rows, columns = torch.triu_indices(d, d, device=packed.device)
    matrix = packed.new_zeros(d, d)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix


def shrunk(covariance: Tensor, freedom: int) -> Tensor:
    """Oracle approximating shrinkage (Chen et al., IEEE TSP 2010, arXiv:0907.4698) towards a multiple of the identity.

    A covariance of fewer examples than dimensions can be inverted afterwards, one of very many is left as it is.

    Args:
        covariance: (d, d).
        freedom: number of examples it was taken from, less the number of means; 0 or no spread give the identity.
    """
    d = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    if freedom < 1 or trace <= 0:
        return identity
    excess = (freedom + 1 - 2 / d) * (square - trace**2 / d)
    share = ((1 - 2 / d) * square + trace**2) / excess.clamp_min(torch.finfo(excess.dtype).tiny)
    share = share.clamp_max(1)
    return (1 - share) * covariance + share * trace / d * identity


class SubspaceMemory(BufferDict):
    """`<input>/taken` or `<input>/free` -> basis (fan_in, k) in float32, the smaller of the two."""

    def of(self, key: str, fan_in: int, device: torch.device | str = "cpu") -> Subspace:
        """What is taken, or free, in float64 on `device`; an input that was never kept is free as a whole."""
        if f"{key}/free" in self:
            return Subspace(exact(self[f"{key}/free"]).to(device), "free")
        if f"{key}/taken" in self:
            return Subspace(exact(self[f"{key}/taken"]).to(device))
        return Subspace.empty(fan_in, device)

    def keep(self, key: str, space: Subspace) -> None:
        """Put `space` in the place of what was kept of this input."""
        for kind in ("taken", "free"):
            self.pop(f"{key}/{kind}", None)
        # in the order of memory in which it would be loaded: another one rounds otherwise
        self[f"{key}/{space.kind}"] = space.basis.float().contiguous()

    def outside(self, key: str, rows: Tensor) -> Tensor:
        """The part of each row (n, fan_in) that lies in the free directions, in the precision of `rows`."""
        if f"{key}/free" in self:
            basis = self[f"{key}/free"]
            return rows @ basis @ basis.T
        if f"{key}/taken" in self:
            basis = self[f"{key}/taken"]
            return rows - rows @ basis @ basis.T
        return rows
