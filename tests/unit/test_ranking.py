"""Recall at K."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.metrics import CUTS, ranks, recalls


def by_sorting(queries: Tensor, owners: Tensor, gallery: Tensor, gallery_owners: Tensor, k: int) -> float:
    """Recall as its definition has it: sort, look at the first k."""
    right = 0
    for query, owner in zip(queries, owners.tolist(), strict=True):
        best = (gallery @ query).argsort(descending=True)[:k]
        right += owner in gallery_owners[best].tolist()
    return right / len(queries)


def test_recall_equals_sorting_with_five_captions_an_image() -> None:
    draw = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(40, 8, generator=draw), dim=1)
    pairs = torch.randperm(100, generator=draw)[:40]
    texts = images.repeat_interleave(5, 0) + 0.6 * torch.randn(200, 8, generator=draw)
    texts, owners = F.normalize(texts, dim=1), pairs.repeat_interleave(5)
    found = recalls(images, pairs, texts, owners, (images, pairs, texts, owners))
    for k in CUTS:
        assert found[f"i2t@{k}"] == by_sorting(images, pairs, texts, owners, k)
        assert found[f"t2i@{k}"] == by_sorting(texts, owners, images, pairs, k)
    assert 0 < found["t2i@1"] < found["t2i@5"] < found["t2i@10"] < 1


def test_a_larger_gallery_is_harder_and_queries_stay_the_same() -> None:
    draw = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(30, 4, generator=draw), dim=1)
    texts = F.normalize(images + 0.4 * torch.randn(30, 4, generator=draw), dim=1)
    pairs, few = torch.arange(30), slice(0, 10)
    own = recalls(images[few], pairs[few], texts[few], pairs[few], (images[few], pairs[few], texts[few], pairs[few]))
    union = recalls(images[few], pairs[few], texts[few], pairs[few], (images, pairs, texts, pairs))
    assert all(union[name] <= own[name] for name in own)
    assert union != own


def test_a_model_that_finds_all_alike_finds_nothing() -> None:
    same, pairs = F.normalize(torch.ones(12, 4), dim=1), torch.arange(12)
    assert ranks(same, pairs, same, pairs).tolist() == [11] * 12
    assert set(recalls(same, pairs, same, pairs, (same, pairs, same, pairs)).values()) == {0.0}


def test_the_best_of_several_captions_counts() -> None:
    image = torch.tensor([[1.0, 0.0]])
    texts = F.normalize(torch.tensor([[-1.0, 0.0], [1.0, 0.5], [1.0, 0.1]]), dim=1)
    assert ranks(image, torch.tensor([7]), texts, torch.tensor([7, 3, 7])).tolist() == [0]
    assert ranks(image, torch.tensor([7]), texts, torch.tensor([7, 3, 3])).tolist() == [2]


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_ranks_do_not_depend_on_how_many_queries_are_scored_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(2)
    queries, pairs = F.normalize(torch.randn(20, 4, generator=draw), dim=1), torch.arange(20)
    gallery = F.normalize(queries + torch.randn(20, 4, generator=draw), dim=1)
    whole = ranks(queries, pairs, gallery, pairs)
    monkeypatch.setattr("perdure.metrics._CHUNK", size)
    assert torch.equal(ranks(queries, pairs, gallery, pairs), whole)


def test_embeddings_that_are_no_numbers_find_nothing() -> None:
    lost, pairs = torch.full((12, 4), torch.nan), torch.arange(12)
    assert set(recalls(lost, pairs, lost, pairs, (lost, pairs, lost, pairs)).values()) == {0.0}
