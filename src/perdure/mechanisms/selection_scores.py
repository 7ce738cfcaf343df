"""Which examples of a class are worth keeping: orders, best first, from features and errors of the last layer.

A smaller memory keeps the beginning of an order, so every order here is made to be cut anywhere.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.mechanisms.subspace import exact
from perdure.types import Data

Position = Literal["top", "mid", "bottom", "offset"]

_NOISY = 0.1  # share of a class with the highest scores, where wrong labels gather
_LLOYD = 50  # passes; k-means on a class's features settles in 10 to 30


def herding(features: Tensor, count: int) -> Tensor:
    """Positions (count,) whose means follow the class mean (Welling, ICML 2009; iCaRL's Algorithm 4).

    Each next example brings the mean of all chosen as near as possible to the mean of all, on normalised features.

    Args:
        features: (n, dim) of one class.
        count: how many; all when there are fewer.
    """
    points = exact(F.normalize(features, dim=1))
    alike = points @ points.T
    # |μ - (S + φ)/k|² of unit vectors φ is least where <kμ - S, φ> is greatest.
    towards, left = alike.mean(0), torch.zeros(len(points), dtype=points.dtype, device=points.device)
    chosen: list[Tensor] = []
    for _ in range(min(count, len(points))):
        left = left + towards
        pick = left.argmax()
        left = left - alike[pick]
        left[pick] = -torch.inf
        chosen.append(pick)
    return torch.stack(chosen).cpu()


def kmeans(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions (count,) of the examples nearest to the centroids of `count` clusters of normalised features.

    First comes the one that stands best for the whole class, then what lowers the class's squared distances to the
    nearest chosen most.

    Args:
        features: (n, dim) of one class.
        count: how many; all when there are fewer.
        generator: of the starting centroids (k-means++).
    """
    points = exact(F.normalize(features, dim=1)).cpu()
    count = min(count, len(points))
    if count == len(points):
        return _covering(points, torch.arange(count))
    nearest, distance = _clusters(points, count, generator)
    # Distances of unit vectors are at most 2: members of a cluster stand together, its nearest first.
    ranked = (4 * nearest + distance).argsort(stable=True)
    first = torch.diff(nearest[ranked], prepend=torch.tensor([-1])) != 0
    rest = ranked[~first]
    # Equal images leave clusters empty: the memory is filled up all the same.
    rest = rest[distance[rest].argsort(stable=True)]
    return torch.cat([_covering(points, ranked[first]), rest])[:count]


def el2n(residuals: Tensor) -> Tensor:
    """Scores (n,): the length of the error, ‖softmax(f(x)) - onehot(y)‖₂ (Paul et al., NeurIPS 2021).

    Args:
        residuals: softmax(f(x)) - onehot(y), (n, classes).
    """
    length: Tensor = residuals.norm(dim=1)
    return length


def grand(residuals: Tensor, inputs: Tensor) -> Tensor:
    """Scores (n,): the length of the loss's gradient in the last layer's weights, (p - y) hᵀ.

    Args:
        residuals: softmax(f(x)) - onehot(y), (n, classes).
        inputs: of the last layer, with a 1 where it has a bias: (n, dim).
    """
    length: Tensor = el2n(residuals) * inputs.norm(dim=1)
    return length


def influence(residuals: Tensor, inputs: Tensor) -> Tensor:
    """Scores (n,): Σ over these examples z' of <∇l(z), ∇l(z')>, the gradients of the last layer's weights (TracIn).

    Args:
        residuals: softmax(f(x)) - onehot(y), (n, classes), of examples of one class.
        inputs: of the last layer, with a 1 where it has a bias: (n, dim).
    """
    total = exact(residuals).T @ exact(inputs)
    return ((exact(residuals) @ total) * exact(inputs)).sum(1)


def by_score(scores: Tensor, position: Position) -> Tensor:
    """Positions (n,), best first.

    Args:
        scores: (n,) of one class.
        position: `top`: the highest first; `bottom`: the lowest; `mid`: from the median outwards; `offset`: as `top`,
            but the tenth with the highest scores comes last.
    """
    order = scores.cpu().argsort(descending=True, stable=True)
    count = len(order)
    if position == "bottom":
        return order.flip(0)
    if position == "mid":
        return order[(torch.arange(count) - (count - 1) / 2).abs().argsort(stable=True)]
    noisy = round(_NOISY * count) if position == "offset" else 0
    return torch.cat([order[noisy:], order[:noisy]])


def _clusters(points: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each point's cluster and its distance to the centroid, both (n,)."""
    centres = _scattered(points, count, generator)
    nearest = torch.cdist(points, centres).argmin(1)
    for _ in range(_LLOYD):
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        before, nearest = nearest, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, nearest):
            break
    return nearest, (points - centres[nearest]).norm(dim=1)


def _scattered(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting centroids (count, dim): each next a point drawn by its squared distance to those before (k-means++)."""
    chosen = [torch.randint(len(points), (1,), generator=generator)]
    gap = torch.full((len(points),), torch.inf, dtype=points.dtype)
    while len(chosen) < count:
        gap = gap.minimum((points - points[chosen[-1]]).square().sum(1))
        # an equal distance for all when nothing but copies is left
        chosen.append(torch.multinomial(gap if gap.any() else torch.ones_like(gap), 1, generator=generator))
    return points[torch.cat(chosen)]


def _covering(points: Tensor, candidates: Tensor) -> Tensor:
    """`candidates` (k,) in the order in which they lower the squared distances of all points to the nearest most."""
    distances = torch.cdist(points, points[candidates]).square()
    gap = torch.full((len(points), 1), 4.0, dtype=points.dtype)  # the most there is between unit vectors
    order: list[int] = []
    for _ in range(len(candidates)):
        gain = (gap - distances).clamp_min(0).sum(0)
        gain[order] = -1
        order.append(int(gain.argmax()))
        gap = gap.minimum(distances[:, order[-1:]])
    return candidates[order]


def last_layer(learner: Core, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(f(x)) - onehot(y) over all seen classes, (n, classes), and what the last layer reads, (n, dim).

    The gradient of an example's loss in the last layer's weights is the outer product of the two. A linear head also
    reads a 1 for its bias; where classes are compared by direction (cosine heads, class names) it is the gradient in
    their unit vectors, up to a factor.
    """
    with learner.inference():
        residuals = F.softmax(learner.objective.scores(features), dim=1)
        residuals[torch.arange(len(labels)), learner.objective.columns(labels)] -= 1
    if learner.objective.linear:
        return residuals.clone(), F.pad(features, (0, 1), value=1.0)
    return residuals.clone(), F.normalize(features, dim=1)


def of_answers(learner: Core, data: Data) -> tuple[Tensor, Tensor]:
    """Of each conversation means over its answer's tokens: of features (n, dim), and of the error's length (n, 1)."""
    features: list[Tensor] = []
    lengths: list[Tensor] = []
    with learner.inference():
        for batch in learner.batches(data, 64):
            rows, owners = learner.encode(batch), learner.objective.owners(batch)
            errors = F.softmax(learner.objective.scores(rows), dim=1)
            errors[torch.arange(len(rows)), learner.objective.targets(batch)] -= 1
            count = torch.bincount(owners, minlength=len(batch["label"])).unsqueeze(1)
            for found, each in ((features, rows), (lengths, errors.norm(dim=1, keepdim=True))):
                found.append(each.new_zeros(len(count), each.shape[1]).index_add(0, owners, each) / count)
    return torch.cat(features).clone(), torch.cat(lengths).clone()
