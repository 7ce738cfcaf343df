"""How well each task knows an image: Gaussians around its class means, and a limit that its own images keep to."""

import torch
from torch import Tensor, nn

from perdure.adapters.buffer_dict import BufferDict
from perdure.mechanisms.linear_algebra import exact

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

    def __init__(self, rank: int, known: float) -> None:
        super().__init__()
        self.rank, self.known = rank, known
        self.kept = (
            BufferDict()
        )  # "task/means" (c, d), "task/directions" (k, d), "task/variances" (k + 1,), "task/limit"

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        return sorted({int(key.partition("/")[0]) for key in self.kept})

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
            self.kept[f"{task}/{name}"] = value.float().contiguous().to(features.device)

    def route(self, features: Tensor) -> Tensor:
        """For each of `features` (n, d) the task under which it is most likely, as its place in `tasks`: int64 (n,).

        Only tasks within whose limit it is count; -1 where there is none.
        """
        likely = features.new_full((len(features), 1), -torch.inf)
        for task in self.tasks:
            means, directions, variances, limit = (
                self.kept[f"{task}/{name}"] for name in ("means", "directions", "variances", "limit")
            )
            distance = _distances(features, means, directions, variances)
            even = means.shape[1] - len(directions)
            volume = variances[:-1].log().sum() + even * variances[-1].log()
            known = (-(distance + volume) / 2).masked_fill(distance > limit, -torch.inf)
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


class ClassTable(nn.Module):
    """Which task each of a closed set of examples belongs to, such as class names: they are known, and none like them.

    An example that several tasks have belongs to the latest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = BufferDict()  # task: unit features (n, d)

    @property
    def tasks(self) -> list[int]:
        """Those that were added, in ascending order."""
        return sorted(int(key) for key in self.kept)

    def add(self, task: int, features: Tensor) -> None:
        """A task's examples, as unit features (n, d)."""
        self.kept[str(task)] = features.float().contiguous()

    def route(self, features: Tensor) -> Tensor:
        """For each of unit `features` (n, d) its task's place in `tasks`, int64 (n,); -1 for a stranger."""
        place = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
        for number, task in enumerate(self.tasks):
            ways = torch.cdist(features, self.kept[str(task)], compute_mode="donot_use_mm_for_euclid_dist")
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
