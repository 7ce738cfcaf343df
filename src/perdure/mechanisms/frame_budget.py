"""Which sequences of frames fit a budget: each costs as many images as it has frames.

Algorithm R knows one size. Here every sequence has a random place that follows from its identity, and in that order
each is kept that still fits: of one length all have one chance, whenever they come, and short ones fill what is left.
"""

import torch
from torch import Tensor

from perdure.core.learner import derived_seed
from perdure.types import Data


def frames_of(data: Data) -> Tensor:
    """How many images each example shows, int64 (n,); 1 where it is one, or none but a text."""
    frames: Tensor | None = getattr(data, "frames", None)
    return torch.ones(len(data), dtype=torch.int64) if frames is None else frames.cpu()


def in_random_order(identities: Tensor, salt: int) -> Tensor:
    """Positions (n,) of `identities` in an order that depends on each of them and `salt` alone."""
    places = [derived_seed(salt, 0, f"memory of {each}") for each in identities.tolist()]
    return torch.tensor(places, dtype=torch.int64).argsort(stable=True)


def by_turns(classes: Tensor) -> Tensor:
    """Positions (n,) of examples, those of each of the `classes` in turn; within a class as they stand."""
    turn = torch.zeros(len(classes), dtype=torch.int64)
    for c in torch.unique(classes).tolist():
        mine = classes == c
        turn[mine] = torch.arange(int(mine.sum()))
    by_class = classes.argsort(stable=True)
    return by_class[turn[by_class].argsort(stable=True)]


def within_room(order: Tensor, costs: Tensor, room: int) -> Tensor:
    """Of the positions in `order` those that are kept: each that fits what those before it left of `room`."""
    kept = []
    for position in order.tolist():
        if (cost := int(costs[position])) <= room:
            kept.append(position)
            room -= cost
    return torch.tensor(kept, dtype=torch.int64)
