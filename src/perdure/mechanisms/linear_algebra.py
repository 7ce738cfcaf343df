"""Symmetric matrices: summed and solved in float64, stored as one triangle in float32, shrunk when data are few."""

import torch
from torch import Tensor


def exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (MPS)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric (d, d), row by row: float32 (d·(d+1)/2,)."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns].float()


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrix that `pack` stored, (d, d) float64."""
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
