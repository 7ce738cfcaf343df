"""Draws that depend on names and a seed only: the same on every machine, whatever else is drawn."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

SHARE = 0.2
"""Of each class's images, how many become test images when a data set has no test part."""


def shuffled(names: Sequence[str], purpose: str) -> list[int]:
    """Positions of `names` in a random order that `purpose` determines."""
    # Hashes rather than a generator: one name more or less leaves the order of the others as it was, and the
    # order cannot change with the version of a library.
    return sorted(range(len(names)), key=lambda i: (digest((purpose, names[i])), i))


def first_of_each(groups: Sequence[Hashable], names: Sequence[str], size: int, purpose: str) -> list[int]:
    """Positions of at most `size` random members of each group, in increasing order."""
    chosen: dict[Hashable, int] = {}
    kept = []
    for i in shuffled(names, purpose):
        if chosen.setdefault(groups[i], 0) < size:
            chosen[groups[i]] += 1
            kept.append(i)
    return sorted(kept)


def held_out(groups: Sequence[Hashable], names: Sequence[str], share: float, purpose: str) -> list[int]:
    """Positions of a random `share` of each group, at least one of every group with two members or more."""
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    quota = {g: min(max(1, round(n * share)), n - 1) for g, n in sizes.items()}
    held = []
    for i in shuffled(names, purpose):
        if quota[groups[i]]:
            quota[groups[i]] -= 1
            held.append(i)
    return sorted(held)


def digest(parts: Iterable[object]) -> str:
    """sha256 of the texts of `parts`."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
