"""Clusters of images that look alike to a pre-trained model: the topics of a stream that has none of its own."""

from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones import Backbone
from perdure.streams.image_set import ImageSet

_BATCH = 128
_RESTARTS = 5
_LLOYD = 100  # passes; tens are enough
_REMEMBERED = 512  # batches, some 60 MB

# Runs of one grid cluster the same images: keyed by the pixels themselves, features cannot be stale.
_known: dict[tuple[str, str], Tensor] = {}

_Points = np.ndarray[Any, np.dtype[np.float64]]


def clusters(backbone: Backbone, train: ImageSet, test: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Cluster of every train and of every test image, int64 (n,) each: k-means on normalised features.

    The centres are those of the train images alone, found from always the same starting points; a test image belongs
    to the nearest centre. Clusters are numbered by their train images, the largest is 0.

    Args:
        backbone: of the features.
        train: images preprocessed for `backbone`.
        test: the same for the test part.
        count: how many clusters.

    Raises:
        ValueError: when the train images are too few, or too alike, for `count` clusters.
    """
    points, others = _features(backbone, train), _features(backbone, test)
    if (different := len({point.tobytes() for point in points})) < count:
        raise ValueError(f"tasks={count}: the model tells only {different} train images apart; use fewer tasks")
    centres = _centres(points, count)
    nearest = _nearest(points, centres)
    largest = np.argsort(-np.bincount(nearest, minlength=count), kind="stable")
    number = np.argsort(largest)
    return torch.from_numpy(number[nearest]), torch.from_numpy(number[_nearest(others, centres)])


@torch.no_grad()
def _features(backbone: Backbone, data: ImageSet) -> _Points:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    pieces = [torch.zeros(0, backbone.dim, dtype=torch.float32)]
    for first in range(0, len(data), _BATCH):
        batch = data.__getitems__(range(first, min(first + _BATCH, len(data))))
        key = (backbone.spec, sha256(batch["image"].numpy().data).hexdigest())
        if key not in _known:
            if len(_known) >= _REMEMBERED:
                del _known[next(iter(_known))]
            _known[key] = F.normalize(backbone({"image": batch["image"].to(device)}).float(), dim=1).cpu()
        pieces.append(_known[key])
    points: _Points = torch.cat(pieces).double().numpy()
    return points


def _centres(points: _Points, count: int) -> _Points:
    from scipy.cluster.vq import ClusterError, kmeans2  # type: ignore[import-untyped]  # here: slow to import

    best: _Points | None = None
    least = np.inf
    # Twice as often when clusters stay empty: starting points of other seeds do better.
    for seed in range(2 * _RESTARTS):
        if best is not None and seed >= _RESTARTS:
            break
        try:
            centres, nearest = kmeans2(
                points, count, iter=_LLOYD, minit="++", rng=np.random.default_rng(seed), missing="raise"
            )
        except ClusterError:
            continue
        spread = float(((points - centres[nearest]) ** 2).sum())
        if spread < least:
            best, least = centres, spread
    if best is None:
        raise ValueError(f"tasks={count}: the images do not fall into so many clusters; use fewer tasks")
    return best


def _nearest(points: _Points, centres: _Points) -> np.ndarray[Any, np.dtype[np.int64]]:
    # |x - c|² less the |x|² that all centres share
    distances = (centres**2).sum(1) - 2 * points @ centres.T
    nearest: np.ndarray[Any, np.dtype[np.int64]] = distances.argmin(1)
    return nearest
