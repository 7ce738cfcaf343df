"""How well each task knows an image: Gaussians around its class means, and a limit that its own images keep to."""

import torch
from torch import Tensor, nn

from perdure.memory.symmetric import exact
from perdure.memory.tensors import Tensors

_FOLDS = 5
_FLOOR = 1e-6  # least variance, of features of unit length
_SAME = 1e-3  # largest squared distance between what two precisions make of one example
_KEPT = ("means", "directions", "variances", "limit")


class Familiarity(nn.Module):
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
            Tensors()
        )  # for each of `_KEPT`: "task/means" (c, d), "task/directions" (k, d), "task/variances" (k + 1,), "task/limit"

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
        self._keep(task, *self._fit(features, labels), limit.to(features.device))

    def know(self, task: int, features: Tensor) -> None:
        """Let a task know these unit features (n, d) and none but them, up to rounding."""
        nothing = features.new_zeros(0, features.shape[1])
        even, limit = features.new_full((1,), _FLOOR), features.new_tensor(_SAME / _FLOOR)
        self._keep(task, features, nothing, even, limit)

    def route(self, features: Tensor) -> Tensor:
        """For each of `features` (n, d) the task under which it is most likely, as its place in `tasks`: int64 (n,).

        Only tasks within whose limit it is count, of equals the latest; -1 where there is none.
        """
        likely = features.new_full((len(features), 1), -torch.inf)
        for task in self.tasks:
            means, directions, variances, limit = (self.kept[f"{task}/{name}"] for name in _KEPT)
            distance = _distances(features, means, directions, variances)
            even = means.shape[1] - len(directions)
            volume = variances[:-1].log().sum() + even * variances[-1].log()
            known = (-(distance + volume) / 2).masked_fill(distance > limit, -torch.inf)
            likely = torch.cat([likely, known.unsqueeze(1)], dim=1)
        best = likely.flip(1).max(1)  # class names that two tasks share are equally likely under both
        return torch.where(best.values > -torch.inf, likely.shape[1] - 2 - best.indices, -1)

    def _keep(self, task: int, means: Tensor, directions: Tensor, variances: Tensor, limit: Tensor) -> None:
        for name, value in zip(_KEPT, (means, directions, variances, limit), strict=True):
            self.kept[f"{task}/{name}"] = value.float().contiguous()

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
