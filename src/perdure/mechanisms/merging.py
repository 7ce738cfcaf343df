"""Several updates of one model become one: the average, task arithmetic, TIES, DARE.

A task vector τ = θ - θ₀ is given by layer, and dense: of a low-rank update the product, for neither factor can be
averaged by itself. Task arithmetic (Ilharco et al., ICLR 2023, arXiv:2212.04089): λ Σ τ. TIES (Yadav et al., NeurIPS
2023, arXiv:2306.01708) trims each τ to its largest entries, elects a sign an entry by total mass, and averages those
that agree. DARE (Yu et al., ICML 2024, arXiv:2311.03099) drops random entries, raises the others by 1 / (1 - p), then
averages.

Differs: who has weight 0 is left out, so TIES with density=1 and weights (1, 0) gives the first update; PEFT counts it.
Entries that cancel exactly are 0 in TIES, where the published codes take the sign that most have, or plus.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from perdure.options.ranges import Factor, Range, checked

Vector = dict[str, Tensor]
"""Layer -> dense update; a layer that is missing has none."""
Merge = Callable[[Sequence[Vector], Sequence[float], torch.Generator], Vector]
"""Task vectors and their weights to one; what is random is drawn from the generator."""
_Share = Annotated[float, Range(0, 1, above=True)]


@checked
def average_updates(scale: Factor = 1.0) -> Merge:
    """scale · Σ w τ / Σ w."""
    return lambda vectors, weights, _: _combined(vectors, [scale * w / sum(weights) for w in weights])


@checked
def arithmetic(scale: Factor = 0.4) -> Merge:
    """scale · Σ w τ; the paper finds 0.3 to 0.5 best for sums of several."""
    return lambda vectors, weights, _: _combined(vectors, [scale * w for w in weights])


@checked
def ties(density: _Share = 0.2, scale: Factor = 1.0) -> Merge:
    """Trim, elect a sign, average those of that sign.

    Args:
        density: share of the entries of a task vector, of all layers together, that is kept.
        scale: factor of the result.
    """

    def merge(vectors: Sequence[Vector], weights: Sequence[float], _: torch.Generator) -> Vector:
        trimmed = [_trimmed(vector, density) for vector in vectors]
        merged = {}
        for layer in _layers(vectors):
            found = [(w, each[layer]) for each, w in zip(trimmed, weights, strict=True) if layer in each]
            mass = sum((w * update for w, update in found), torch.zeros_like(found[0][1]))
            agree = [(w, update, (update.sign() == mass.sign()) & (update != 0)) for w, update in found]
            total = sum((w * update * same for w, update, same in agree), torch.zeros_like(mass))
            share = sum((w * same for w, _, same in agree), torch.zeros_like(mass))
            merged[layer] = scale * total / share.where(share > 0, torch.ones_like(share))
        return merged

    return merge


@checked
def dare(drop: Annotated[float, Range(0, 1, below=True)] = 0.5, scale: Factor = 1.0) -> Merge:
    """Entries dropped at random, the others raised, then the average.

    Args:
        drop: p, the share that is dropped.
        scale: factor of the result.
    """

    def merge(vectors: Sequence[Vector], weights: Sequence[float], generator: torch.Generator) -> Vector:
        thinned = []
        for vector in vectors:
            kept = {k: (torch.rand(v.shape, generator=generator) >= drop).to(v) for k, v in sorted(vector.items())}
            thinned.append({k: v * kept[k] / (1 - drop) for k, v in vector.items()})
        return _combined(thinned, [scale * w / sum(weights) for w in weights])

    return merge


MERGES: dict[str, Callable[..., Merge]] = {
    "average": average_updates,
    "arithmetic": arithmetic,
    "ties": ties,
    "dare": dare,
}
"""Every way by name, as it is written: `ties(density=0.3)`."""


def merged_vectors(merge: Merge, vectors: Sequence[Vector], weights: Sequence[float], seed: int = 0) -> Vector:
    """One task vector from several, of which those of weight 0 are left out.

    Raises:
        ValueError: when no weight is above 0, one is below it, or numbers differ.
    """
    if len(vectors) != len(weights):
        raise ValueError(f"weights: got {len(weights)} for {len(vectors)} members, expected one each")
    if not all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights) or max(weights) == 0:
        raise ValueError(f"weights {tuple(weights)}: expected numbers of 0 or more, and one above 0")
    counted = [(vector, w) for vector, w in zip(vectors, weights, strict=True) if w]
    return merge([v for v, _ in counted], [w for _, w in counted], torch.Generator().manual_seed(seed))


def _layers(vectors: Sequence[Vector]) -> list[str]:
    return sorted({layer for vector in vectors for layer in vector})


def _combined(vectors: Sequence[Vector], factors: Sequence[float]) -> Vector:
    pairs = list(zip(vectors, factors, strict=True))
    found = {layer: [f * v[layer] for v, f in pairs if layer in v] for layer in _layers(vectors)}
    return {layer: torch.stack(updates).sum(0) for layer, updates in found.items()}


def _trimmed(vector: Vector, density: float) -> Vector:
    if not vector:  # a head alone was taught
        return {}
    sizes = torch.cat([update.abs().flatten() for update in vector.values()])
    kept = max(1, round(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - kept + 1).values
    return {layer: update * (update.abs() >= least) for layer, update in vector.items()}
