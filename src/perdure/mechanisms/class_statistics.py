"""What is remembered of classes without images: means, covariances, and which task an input seems to be of."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.state import BufferDict, numbers_in
from perdure.core.forgetting import Forgotten
from perdure.mechanisms.subspace import exact, pack_symmetric, unpack_symmetric

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
        self.covariances = BufferDict()  # class (or "all") -> packed, (d,), or "class/directions" and "class/rest"

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
                    scatter += self.covariance_of(c) * (old - 1)
                count += old
            if self.covariance == "shared" and self.covariances:
                scatter += unpack_symmetric(self.covariances[_ALL]) * self.freedom
            self.means[key] = mean.float().to(features.device)
            self.counts[key] = torch.tensor(count)
            freedom = self.freedom if self.covariance == "shared" else count - 1
            self._keep(key, scatter / max(freedom, 1), features.device)

    def forget(self, left: Forgotten) -> None:
        """Let go of classes; a covariance that all share stays the mean that it is, over fewer examples from now on."""
        for c in left.classes:
            for held in (self.means, self.counts, self.covariances):
                for key in (str(c), f"{c}/directions", f"{c}/rest"):
                    held.pop(key, None)

    def mean(self, c: int) -> Tensor:
        """(d,)."""
        return self.means[str(c)]

    def covariance_of(self, c: int) -> Tensor:
        """Covariance of a class, (d, d) float64."""
        if self.covariance in ("shared", "full"):
            return unpack_symmetric(self.covariances[_ALL if self.covariance == "shared" else str(c)])
        if self.covariance == "diagonal":
            return torch.diag(exact(self.covariances[str(c)]))
        directions = exact(self.covariances[f"{c}/directions"])
        return directions @ directions.T + torch.diag(exact(self.covariances[f"{c}/rest"]))

    def pooled(self) -> Tensor:
        """Covariance within classes, (d, d) float64."""
        if self.covariance == "shared":
            return unpack_symmetric(self.covariances[_ALL])
        scatters = (self.covariance_of(c) * (int(self.counts[str(c)]) - 1) for c in self.classes)
        total = next(scatters)
        for scatter in scatters:
            total += scatter
        return total / max(self.freedom, 1)

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Random deviations from the mean, `size` of each class: (classes, size, d) float32."""
        shared = self._root(self.covariance_of(0)) if self.covariance == "shared" else None
        return torch.stack([self._deviations(c, size, generator, shared) for c in self.classes])

    def _deviations(self, c: int, size: int, generator: torch.Generator, root: Tensor | None) -> Tensor:
        mean = self.mean(c)

        def noise(width: int) -> Tensor:
            return torch.randn(size, width, generator=generator, dtype=torch.float32).to(mean.device)

        if self.covariance == "diagonal":
            return noise(len(mean)) * self.covariances[str(c)].sqrt()
        if self.covariance == "lowrank":
            directions, rest = self.covariances[f"{c}/directions"], self.covariances[f"{c}/rest"]
            return noise(directions.shape[1]) @ directions.T + noise(len(mean)) * rest.sqrt()
        root = self._root(self.covariance_of(c)) if root is None else root
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
            self.covariances[key] = covariance.diagonal().float().to(device)
        elif self.covariance == "lowrank":
            values, vectors = torch.linalg.eigh(covariance)
            directions = vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()
            rest = (covariance.diagonal() - directions.square().sum(1)).clamp_min(0)
            # in the order of memory in which it would be loaded: another one rounds otherwise
            self.covariances[f"{key}/directions"] = directions.float().contiguous().to(device)
            self.covariances[f"{key}/rest"] = rest.float().to(device)
        else:
            self.covariances[_ALL if self.covariance == "shared" else key] = pack_symmetric(covariance).to(device)


_FOLDS = 5
_SAME = 1e-3  # largest squared distance of what padding and rounding make of one text
_FLOOR = 1e-6  # least variance, of features of unit length


class TaskGaussians(nn.Module):
    """For each task: class means, and one covariance within classes, of a few directions and an even rest.

    Closed form; nothing that was stored for a task changes afterwards, and every example is judged by itself.

    Args:
        rank: number of directions; of few examples, a quarter as many as there are.
        known: share of a task's own training examples that are within its limit. Their distances are taken from
            Gaussians that were fitted without them, or else they would seem nearer than new examples are.
    """

    def __init__(self, rank: int = 16, known: float = 0.99) -> None:
        super().__init__()
        self.rank, self.known = rank, known
        # "task/means" (c, d), "task/directions" (k, d), "task/variances" (k + 1,), "task/limit"
        self.gaussians = BufferDict()

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        return numbers_in(self.gaussians)

    def add(self, task: int, features: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Fit a task from features (n, d) and labels (n,)."""
        if len(torch.unique(labels)) == len(labels):  # no class shows how it varies
            labels = torch.zeros_like(labels)
        fold = _folds(labels, generator)
        found = []
        for left_out in torch.unique(fold).tolist():
            rest, mine = fold != left_out, fold == left_out
            if rest.any():
                found.append(_distances(features[mine], *self._fit(features[rest], labels[rest])))
        limit = torch.quantile(torch.cat(found), self.known) if found else features.new_zeros(())
        fitted = self._fit(features, labels)
        for name, value in zip(("means", "directions", "variances", "limit"), (*fitted, limit), strict=True):
            self.gaussians[f"{task}/{name}"] = value.float().contiguous().to(features.device)

    def forget(self, left: Forgotten) -> None:
        """Let go of classes' means; directions and variances are those of a whole task, and go with its last class."""
        for task in left.tasks:
            means, classes = self.gaussians.get(f"{task.index}/means"), torch.tensor(sorted(task.classes))
            stays = left.stays(classes)
            if means is None or bool(stays.all()):
                continue
            if not bool(stays.any()):
                for name in ("means", "directions", "variances", "limit"):
                    del self.gaussians[f"{task.index}/{name}"]
            elif len(means) == len(classes):  # else there is one mean of them all
                self.gaussians[f"{task.index}/means"] = means[stays.to(means.device)]

    def route(self, features: Tensor, bounded: bool = True) -> Tensor:
        """For each of `features` (n, d) the task under which it is most likely, as its place in `tasks`: int64 (n,).

        Only tasks within whose limit it is count, where it is `bounded`; -1 where there is none.
        """
        likely = features.new_full((len(features), 1), -torch.inf)
        for task in self.tasks:
            means, directions, variances, limit = (
                self.gaussians[f"{task}/{name}"] for name in ("means", "directions", "variances", "limit")
            )
            distance = _distances(features, means, directions, variances)
            even = means.shape[1] - len(directions)
            volume = variances[:-1].log().sum() + even * variances[-1].log()
            known = -(distance + volume) / 2
            if bounded:
                known = known.masked_fill(distance > limit, -torch.inf)
            likely = torch.cat([likely, known.unsqueeze(1)], dim=1)
        best = likely.max(1)
        return torch.where(best.values > -torch.inf, best.indices - 1, -1)

    def _fit(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes, places = torch.unique(labels, return_inverse=True)
        x = exact(features)
        places = places.to(x.device)
        sums = x.new_zeros(len(classes), x.shape[1]).index_add_(0, places, x)
        means = sums / torch.bincount(places).unsqueeze(1)
        centred = x - means[places]
        freedom, width = max(len(x) - len(classes), 1), x.shape[1]
        rank = min(self.rank, freedom // 4, width - 1)  # few examples show few directions
        values, vectors = torch.linalg.eigh(centred.T @ centred / freedom)
        leading = values[width - rank :]
        even = (values.sum() - leading.sum()) / (width - rank)
        variances = torch.cat([leading, even.reshape(1)]).clamp_min(_FLOOR)
        like = features.float()
        return means.to(like), vectors[:, width - rank :].T.to(like), variances.to(like)


class TaskMeans(nn.Module):
    """For each task the mean of its examples' features, by cosines to which an example is more or less like it.

    Args:
        temperature: of shares: near 0 all of an example belongs to one task.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.kinds = 1  # of features that stand side by side, each of unit length, or zero where there is none
        self.means = BufferDict()  # task -> (d,)

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        return sorted(map(int, self.means))

    def add(self, task: int, features: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """A task's features (n, d); neither classes nor chance have a part in their mean."""
        self.means[str(task)] = features.float().mean(0)

    def forget(self, left: Forgotten) -> None:
        """Let go of tasks of which no class is left; the mean of another stays that of all of its examples."""
        for task in left.tasks:
            stays = left.stays(torch.tensor(task.classes))
            if len(stays) and not bool(stays.any()):
                self.means.pop(str(task.index), None)

    def cosines(self, features: Tensor) -> Tensor:
        """Of each of `features` (n, d) to each task, (n, tasks): the mean over kinds, 0 where one is missing."""
        means = torch.stack([self.means[str(task)] for task in self.tasks])
        pairs = zip(features.float().chunk(self.kinds, dim=1), means.chunk(self.kinds, dim=1), strict=True)
        # sums, not products of matrices: their rounding would depend on who else is asked about
        found = [(own.unsqueeze(1) * F.normalize(mean, dim=1)).sum(-1) for own, mean in pairs]
        return torch.stack(found).mean(0)

    def shares(self, features: Tensor) -> Tensor:
        """How much of each of `features` (n, d) belongs to each task, (n, tasks): softmax of the cosines."""
        return (self.cosines(features) / self.temperature).softmax(1)

    def route(self, features: Tensor, bounded: bool = False) -> Tensor:
        """For each of `features` (n, d) the place in `tasks` of the one that it is most like, int64 (n,)."""
        return self.cosines(features).argmax(1)


class ClassTable(nn.Module):
    """Which task each of a closed set of examples belongs to, such as class names: they are known, and none like them.

    An example that several tasks have belongs to the latest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = BufferDict()  # task: unit features (n, d)

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        return sorted(int(key) for key in self.features)

    def forget(self, left: Forgotten) -> None:
        """Let go of classes' names, of which each sentence has all, one after the other."""
        for task in left.tasks:
            known, stays = self.features.get(str(task.index)), left.stays(torch.tensor(task.classes))
            if known is None or bool(stays.all()) or len(known) % len(stays):
                continue
            if bool(stays.any()):
                self.features[str(task.index)] = known[stays.repeat(len(known) // len(stays)).to(known.device)]
            else:
                del self.features[str(task.index)]

    def add(self, task: int, features: Tensor) -> None:
        """A task's examples, as unit features (n, d)."""
        self.features[str(task)] = features.float().contiguous()

    def route(self, features: Tensor) -> Tensor:
        """For each of unit `features` (n, d) its task's place in `tasks`, int64 (n,); -1 for a stranger."""
        place = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        for number, task in enumerate(self.tasks):
            ways = torch.cdist(features, self.features[str(task)], compute_mode="donot_use_mm_for_euclid_dist")
            place[ways.amin(1).square() <= _SAME] = number
        return place


def _distances(features: Tensor, means: Tensor, directions: Tensor, variances: Tensor) -> Tensor:
    """Squared Mahalanobis distance (n,) to the nearest of `means`."""

    def whitened(x: Tensor) -> Tensor:
        stretch = variances[:-1].rsqrt() - variances[-1].rsqrt()
        return x * variances[-1].rsqrt() + (x @ directions.T * stretch) @ directions

    # not by products of matrices: their rounding would depend on who else is asked about
    ways = torch.cdist(whitened(features), whitened(means), compute_mode="donot_use_mm_for_euclid_dist")
    return ways.amin(1).square()


def _folds(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Which part of `_FOLDS` each example belongs to, (n,); those of a class are spread over all parts."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    fold = torch.empty_like(labels)
    for c in torch.unique(labels).tolist():
        mine = order[labels[order] == c]
        fold[mine] = torch.arange(len(mine), device=labels.device) % _FOLDS
    return fold
