"""Recall at K: whether what belongs to a query stands among the K best of a gallery."""

import torch
from torch import Tensor

CUTS = (1, 5, 10)
_CHUNK = 1024  # queries whose scores are held at once


def ranks(
    queries: Tensor, owners: Tensor, gallery: Tensor, gallery_owners: Tensor, right: Tensor | None = None
) -> Tensor:
    """How many of the gallery that belong to others score at least as high as the query's best own, int64 (n,).

    Equal scores, and what is no number, count against the query: a model that finds all alike finds nothing.

    Args:
        queries: unit-length embeddings (n, dim).
        owners: to whom each query belongs, (n,).
        gallery: unit-length embeddings (m, dim).
        gallery_owners: to whom each of the gallery belongs, (m,).
        right: which of the gallery count as answers, bool (m,), all when None; others of a query's own owner are
            neither right nor wrong.
    """
    found = []
    for some, mine in zip(torch.split(queries, _CHUNK), torch.split(owners, _CHUNK), strict=True):
        scores = some @ gallery.T
        own = mine[:, None] == gallery_owners[None]
        answers = own if right is None else own & right
        best = scores.masked_fill(~answers, -torch.inf).amax(1, keepdim=True)
        found.append((~(scores < best) & ~own).sum(1))
    return torch.cat(found)


def recalls(
    images: Tensor,
    image_owners: Tensor,
    texts: Tensor,
    text_owners: Tensor,
    galleries: tuple[Tensor, ...],
    right: Tensor | None = None,
) -> dict[str, float]:
    """Share of queries whose best own answer is among the first K, in both directions.

    Args:
        images: queries, unit-length (n, dim).
        image_owners: identity of each image, (n,).
        texts: queries, unit-length (m, dim).
        text_owners: identity of the image of each text, (m,).
        galleries: images, their owners, texts, their owners: in which is searched.
        right: which texts of the gallery count as answers, see `ranks`.

    Returns:
        `i2t@1` (an image finds any of its texts), ..., `t2i@10` (a text finds its image).
    """
    gallery, owners, lines, line_owners = galleries
    both = {
        "i2t": ranks(images, image_owners, lines, line_owners, right),
        "t2i": ranks(texts, text_owners, gallery, owners),
    }
    return {f"{way}@{k}": (rank < k).double().mean().item() for way, rank in both.items() for k in CUTS}
