"""Choosing prompts by a query: which entries of a pool fit an image, judged by the pre-trained encoder's features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.learner import Core
from perdure.types import Batch

QUERY = "query"
"""Name under which a method records queries; they never change, so a set of images needs them once."""


def query(learner: Core, batch: Batch) -> Tensor:
    """Unit features (B, dim) of the pre-trained encoder, in float32; those recorded, or computed here.

    Prompts must be off while it is asked: they are when nothing has been given to them.
    """
    if QUERY in batch:
        return batch[QUERY]
    with torch.no_grad():
        features: Tensor = learner.backbone(batch)
    return F.normalize(features.float(), dim=1)


def nearest(cosines: Tensor, count: int, batchwise: bool = False) -> Tensor:
    """The `count` best entries for each example, (B, count), from `cosines` (B, entries).

    Args:
        cosines: of queries and keys.
        count: entries wanted.
        batchwise: all examples take the entries that most of them chose, as the published codes do. In a test set
            sorted by task this tells the task, and an answer depends on who else is asked about.
    """
    best = cosines.topk(count, dim=1).indices
    if not batchwise:
        return best
    votes = torch.bincount(best.flatten(), minlength=cosines.shape[1])
    return votes.topk(count).indices.expand(len(best), -1)
