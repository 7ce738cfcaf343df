"""A Gaussian for each class, in a form that says how many bytes its covariance may take."""

from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adapters.buffer_dict import BufferDict
from perdure.mechanisms.linear_algebra import exact, pack, unpack

Covariance = Literal["shared", "full", "diagonal", "lowrank"]
_ALL = "all"  # the key of what classes share
_JITTER = 1e-4  # of the mean variance: fewer examples than dimensions leave a covariance singular


class ClassStatistics(nn.Module):
    """Mean and covariance of each class's features; a class that comes again is merged as if it had come at once.

    Exact but for rounding to float32 and, with `lowrank`, for what its form cannot hold.

    Args:
        covariance: in d dimensions, `full` stores d(d+1)/2 numbers a class, `shared` as many for all classes together,
            `diagonal` d a class, `lowrank` (rank + 1)·d a class: leading directions and the variances that are left.
        rank: number of leading directions.
    """

    def __init__(self, covariance: Covariance, rank: int = 16) -> None:
        super().__init__()
        self.covariance, self.rank = covariance, rank
        self.means, self.counts = BufferDict(), BufferDict()  # class -> (d,), number of examples
        self.spreads = BufferDict()  # class (or "all") -> packed, (d,), or "class/directions" and "class/rest"

    @property
    def classes(self) -> list[int]:
        """Which classes have a Gaussian, in ascending order; that of a loaded dictionary is any."""
        return sorted(int(c) for c in self.counts)

    @property
    def freedom(self) -> int:
        """Number of examples less number of means."""
        return sum(int(n) - 1 for n in self.counts.values())

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add examples: (n, d) and their classes (n,)."""
        for c in torch.unique(labels).tolist():
            mine = exact(features[labels == c])
            mean, count = mine.mean(0), len(mine)
            scatter = (mine - mean).T @ (mine - mean)
            key = str(c)
            if key in self.counts:
                old = int(self.counts[key])
                way = mean - exact(self.means[key])
                mean = mean - way * old / (old + count)
                scatter += way.outer(way) * old * count / (old + count)
                if self.covariance != "shared":
                    scatter += self.spread(c) * (old - 1)
                count += old
            if self.covariance == "shared" and self.spreads:
                scatter += unpack(self.spreads[_ALL]) * self.freedom
            self.means[key] = mean.float().to(features.device)
            self.counts[key] = torch.tensor(count)
            freedom = self.freedom if self.covariance == "shared" else count - 1
            self._keep(key, scatter / max(freedom, 1), features.device)

    def mean(self, c: int) -> Tensor:
        """(d,)."""
        return self.means[str(c)]

    def spread(self, c: int) -> Tensor:
        """Covariance of a class, (d, d) float64."""
        if self.covariance in ("shared", "full"):
            return unpack(self.spreads[_ALL if self.covariance == "shared" else str(c)])
        if self.covariance == "diagonal":
            return torch.diag(exact(self.spreads[str(c)]))
        directions = exact(self.spreads[f"{c}/directions"])
        return directions @ directions.T + torch.diag(exact(self.spreads[f"{c}/rest"]))

    def pooled(self) -> Tensor:
        """Covariance within classes, (d, d) float64."""
        if self.covariance == "shared":
            return unpack(self.spreads[_ALL])
        scatters = (self.spread(c) * (int(self.counts[str(c)]) - 1) for c in self.classes)
        total = next(scatters)
        for scatter in scatters:
            total += scatter
        return total / max(self.freedom, 1)

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Random deviations from the mean, `size` of each class: (classes, size, d) float32."""
        shared = self._root(self.spread(0)) if self.covariance == "shared" else None
        return torch.stack([self._deviations(c, size, generator, shared) for c in self.classes])

    def _deviations(self, c: int, size: int, generator: torch.Generator, root: Tensor | None) -> Tensor:
        mean = self.mean(c)

        def noise(width: int) -> Tensor:
            return torch.randn(size, width, generator=generator, dtype=torch.float32).to(mean.device)

        if self.covariance == "diagonal":
            return noise(len(mean)) * self.spreads[str(c)].sqrt()
        if self.covariance == "lowrank":
            directions, rest = self.spreads[f"{c}/directions"], self.spreads[f"{c}/rest"]
            return noise(directions.shape[1]) @ directions.T + noise(len(mean)) * rest.sqrt()
        root = self._root(self.spread(c)) if root is None else root
        return noise(len(mean)) @ root.to(mean.device).T

    @staticmethod
    def _root(covariance: Tensor) -> Tensor:
        """L with L Lᵀ = `covariance`, made regular: float32 (d, d)."""
        jitter = _JITTER * covariance.diagonal().mean() + torch.finfo(torch.float32).eps
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        root: Tensor = torch.linalg.cholesky(covariance + jitter * eye)
        return root.float()

    def _keep(self, key: str, covariance: Tensor, device: torch.device) -> None:
        if self.covariance == "diagonal":
            self.spreads[key] = covariance.diagonal().float().to(device)
        elif self.covariance == "lowrank":
            values, vectors = torch.linalg.eigh(covariance)
            directions = vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()
            rest = (covariance.diagonal() - directions.square().sum(1)).clamp_min(0)
            # in the order of memory in which it would be loaded: another one rounds otherwise
            self.spreads[f"{key}/directions"] = directions.float().contiguous().to(device)
            self.spreads[f"{key}/rest"] = rest.float().to(device)
        else:
            self.spreads[_ALL if self.covariance == "shared" else key] = pack(covariance).to(device)
