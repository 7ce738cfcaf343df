"""Which images are kept: orders against brute force, scores against autograd, budgets, and what is refused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.formatting import count_bytes
from perdure.mechanisms import selection_scores as orders
from perdure.mechanisms.replay import ExemplarBuffer
from perdure.mechanisms.selection_scores import last_layer
from perdure.streams.image_set import Budget
from perdure.streams.single_task import folder_task
from perdure.types import Task

CHOSEN = ("class_balanced", "herding", "kmeans", "el2n", "grand", "influence")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(count: int = 30, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=seeded()) + 1


def test_herding_is_the_greedy_choice_of_the_nearest_mean() -> None:
    features = cloud()
    points = F.normalize(features.double(), dim=1)
    chosen: list[int] = []
    for _ in range(12):
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((points.mean(0) - points[[*chosen, i]].mean(0)).norm())))
    assert orders.herding(features, 12).tolist() == chosen


def test_the_means_of_a_herd_are_nearer_to_the_class_mean_than_those_of_a_random_choice() -> None:
    points = F.normalize(cloud(200), dim=1)
    order, random = orders.herding(points, 200), torch.randperm(200, generator=seeded(1))

    def gap(picked: Tensor) -> float:
        return float((points[picked].mean(0) - points.mean(0)).norm())

    assert all(gap(order[:n]) < gap(random[:n]) for n in (1, 5, 20, 50))


@pytest.mark.parametrize("count", [1, 7, 29])
def test_a_herd_of_fewer_is_the_beginning_of_one_of_more(count: int) -> None:
    assert torch.equal(orders.herding(cloud(), count), orders.herding(cloud(), 30)[:count])


def test_kmeans_takes_one_of_each_of_clear_clusters_and_the_largest_ones_first() -> None:
    corners, sizes = torch.eye(6)[:4], (3, 12, 5, 8)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    features = corners[owner] + 0.05 * torch.randn(28, 6, generator=seeded())
    picks = orders.kmeans(features, 4, seeded(3))
    assert owner[picks].tolist() == [1, 3, 2, 0]
    points = F.normalize(features.double(), dim=1)
    for pick in picks.tolist():
        mine = owner == owner[pick]
        centre = points[mine].mean(0)
        assert (points[pick] - centre).norm() == (points[mine] - centre).norm(dim=1).min()


@pytest.mark.parametrize("count", [1, 4, 10, 99])
def test_kmeans_gives_as_many_different_examples_as_asked_for_even_of_copies(count: int) -> None:
    for features in (cloud(), cloud()[:3].repeat(10, 1), torch.ones(30, 4)):
        picks = orders.kmeans(features, count, seeded())
        assert len(picks) == len(set(picks.tolist())) == min(count, 30)


def test_a_cut_choice_of_kmeans_still_covers_the_class() -> None:
    """All are kept while there is room; what is dropped later must not be whole clusters."""
    corners = torch.eye(6)[:3].repeat(10, 1)
    order = orders.kmeans(corners + 0.05 * torch.randn(30, 6, generator=seeded()), 30, seeded())
    assert {i % 3 for i in order[:3].tolist()} == {0, 1, 2}


def test_positions_are_ends_and_middle_of_the_scores() -> None:
    scores = torch.arange(20.0)[torch.randperm(20, generator=seeded())]
    ranked = {p: scores[orders.by_score(scores, p)].tolist() for p in ("top", "bottom", "mid", "offset")}
    assert ranked["top"] == list(range(19, -1, -1))
    assert ranked["bottom"] == list(range(20))
    assert set(ranked["mid"][:4]) == {8, 9, 10, 11}
    assert ranked["mid"][-2:] in ([0, 19], [19, 0])
    assert ranked["offset"] == [*range(17, -1, -1), 19, 18]


def test_grand_and_el2n_are_two_orders_where_features_differ_in_length() -> None:
    residuals = torch.tensor([[0.3, -0.3], [0.2, -0.2], [0.1, -0.1]])
    inputs = torch.tensor([[1.0, 1.0], [2.0, 1.0], [9.0, 1.0]])
    assert orders.by_score(orders.el2n(residuals), "top").tolist() == [0, 1, 2]
    assert orders.by_score(orders.grand(residuals, inputs), "top").tolist() == [2, 1, 0]


@pytest.mark.parametrize("cosine", [False, True])
def test_scores_are_lengths_and_products_of_the_gradients_of_the_last_layer(cosine: bool, lab: Any) -> None:
    bench = lab.but(objective=f"classify(cosine={cosine})")
    learner = bench.teach(bench.learner("lora(rank=2) + replay"), bench.stream().tasks[:2])
    features, labels = learner.features(lab.stream().tasks[1].train)
    gradients = []
    for feature, label in zip(features, labels, strict=True):
        weight = torch.cat([h.weight for h in learner.objective.linears()]).detach()
        if cosine:
            weight = F.normalize(weight, dim=1).requires_grad_()
            loss = F.cross_entropy(learner.objective.scale * weight @ F.normalize(feature, dim=0), label)
            gradients.append(torch.autograd.grad(loss, weight)[0].flatten() / learner.objective.scale)
        else:
            weight.requires_grad_()
            bias = torch.cat([h.bias for h in learner.objective.linears()]).detach().requires_grad_()
            loss = F.cross_entropy(weight @ feature + bias, label)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, bias))]))
    each = torch.stack(gradients)
    residuals, inputs = last_layer(learner, features, labels)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(orders.grand(residuals, inputs), each.norm(dim=1), **close)
    torch.testing.assert_close(orders.influence(residuals, inputs).float(), each @ each.sum(0), **close)
    with learner.inference():
        error = F.softmax(learner.objective.scores(features), 1) - F.one_hot(labels, 4)
    torch.testing.assert_close(orders.el2n(residuals), error.norm(dim=1), **close)


@pytest.mark.parametrize("selection", CHOSEN)
def test_a_memory_shares_its_size_among_the_classes_seen(selection: str, lab: Any) -> None:
    learner = lab.learner(f"lora(rank=2) + replay(size=10, selection={selection!r})")
    kept = []
    for task in lab.stream():
        lab.teach(learner, [task], epochs=1)
        kept.append(learner.method.parts[1].memory.refs)
    assert [torch.bincount(refs[:, 2]).tolist() for refs in kept] == [[5, 5], [3, 3, 2, 2], [2, 2, 2, 2, 1, 1]]
    for before, after in pairwise(kept):
        for c in torch.unique(before[:, 2]).tolist():  # the beginning of the order is what stays
            stays = after[after[:, 2] == c]
            assert torch.equal(stays, before[before[:, 2] == c][: len(stays)])
    assert len({tuple(ref) for ref in kept[-1].tolist()}) == 10


def chosen(selection: str, learner: Any, task: Any, position: str | None = None, size: int = 20) -> list[int]:
    memory = ExemplarBuffer(size, None, selection, position)
    memory.remember(learner, task)
    assert memory.refs[:, 0].unique().tolist() == [task.index]
    return memory.refs[:, 1].tolist()


def test_a_memory_keeps_the_order_of_the_choice(lab: Any) -> None:
    learner, task = lab.teach(lab.learner("lora(rank=2)"), lab.stream().tasks[:1]), lab.stream().tasks[0]
    features, labels = learner.features(task.train)
    residuals, inputs = last_layer(learner, features, labels)
    herd, hard = [], []
    for c in (0, 1):
        mine = (labels == c).nonzero().flatten()
        herd += mine[orders.herding(features[mine], 3)].tolist()
        hard += mine[orders.by_score(orders.influence(residuals[mine], inputs[mine]), "top")[:3]].tolist()
    assert chosen("herding", learner, task, size=6) == herd != sorted(herd)
    assert chosen("influence", learner, task, "top", size=6) == hard != sorted(hard)


def test_every_selection_keeps_other_images_and_the_same_ones_each_time(lab: Any) -> None:
    bench = lab.but(per_class=24)
    learner = bench.teach(bench.learner("lora(rank=2)"), bench.stream().tasks[:1])
    task = bench.stream().tasks[0]
    names = [(s, None) for s in ("reservoir", *CHOSEN)] + [
        (s, p) for s in ("el2n", "grand", "influence") for p in ("top", "mid", "bottom", "offset")
    ]
    found = {name: chosen(name[0], learner, task, name[1]) for name in names}
    assert found == {name: chosen(name[0], learner, task, name[1]) for name in names}
    # a last LayerNorm makes all features about equally long, and grand what el2n is
    usual = [frozenset(found[name]) for name in names if name[1] is None and name[0] != "grand"]
    assert len(set(usual)) == len(usual)
    for s in ("el2n", "grand", "influence"):
        assert found[s, None] == found[s, "mid"]
        assert len({frozenset(found[s, p]) for p in ("top", "mid", "bottom", "offset")}) == 4


@pytest.mark.parametrize("selection", ["herding", "kmeans", "el2n", "grand", "influence"])
def test_a_choice_does_not_depend_on_which_images_share_a_batch(
    selection: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = lab.but(per_class=24)
    learner = bench.teach(bench.learner("lora(rank=2)"), bench.stream().tasks[:1])
    task, whole = bench.stream().tasks[0], learner.features
    at_once = chosen(selection, learner, task)
    monkeypatch.setattr(learner, "features", lambda data: whole(data, 1))
    assert chosen(selection, learner, task) == at_once


def test_hard_images_are_at_the_top(lab: Any) -> None:
    bench = lab.but(per_class=24)
    learner = bench.teach(bench.learner("lora(rank=2)"), bench.stream().tasks[:1], epochs=4)
    task = bench.stream().tasks[0]
    features, labels = learner.features(task.train)
    losses = nn.functional.cross_entropy(learner.objective.scores(features), labels, reduction="none")
    top, mid, bottom = (losses[chosen("el2n", learner, task, p)].mean() for p in ("top", "mid", "bottom"))
    assert top > mid > bottom


@pytest.mark.parametrize(
    ("text", "count"),
    [(50e6, 50_000_000), ("50MB", 50_000_000), ("1.5 GB", 1_500_000_000), ("768b", 768), ("2e3 kB", 2_000_000)],
)
def test_bytes_are_numbers_or_texts_with_a_unit(text: Any, count: int) -> None:
    assert count_bytes(text) == count


@pytest.mark.parametrize("text", ["MB", "50 mb/s", "1.2.3MB", "-5MB", -1.0, 0.0, "0MB", ""])
def test_what_is_no_number_of_bytes_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^bytes=.*: expected a positive number of bytes, such as 50e6, 50MB or"):
        count_bytes(text)


@pytest.mark.parametrize("method", ["replay", "derpp", "icarl"])
def test_a_budget_in_bytes_holds_as_many_images_of_the_size_that_the_model_sees(method: str, lab: Any) -> None:
    learner = lab.taught(f"lora(rank=2) + {method}(bytes='5.4kB')")
    assert len(learner.method.parts[1].memory) == 7
    assert learner.method.measures(learner)["referenced_bytes"] == 7 * 3 * 16 * 16


@pytest.mark.parametrize("part", ["replay", "derpp", "icarl", "gem", "agem"])
def test_a_folder_that_has_moved_is_told_of_when_a_task_begins(part: str, lab: Any, tmp_path: Path) -> None:
    learner, stream = lab.learner(f"lora(rank=2) + {part}(size=8)"), lab.stream()
    for c in ("0", "1"):
        (tmp_path / "old" / c).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (90 * int(c), 30 * i, 50)).save(tmp_path / "old" / c / f"{i}.png")
    first = folder_task(tmp_path / "old", learner.backbone.preprocess, {}, 0)
    kept = folder_task(tmp_path / "old", learner.backbone.preprocess, {}, 0)
    first.train._budget = Budget(0)
    lab.teach(learner, [first])
    learner.grow(stream.tasks[1])
    learner.method.begin_task(learner, stream.tasks[1])
    (tmp_path / "old").rename(tmp_path / "moved")
    said = r"^the memory refers to examples of task 1 \(old\), whose data is not at hand: restore the folder it was"
    with pytest.raises(ValueError, match=said):
        learner.method.begin_task(learner, stream.tasks[1])
    learner.tasks[0] = replace(first, train=kept.train)
    learner.method.begin_task(learner, stream.tasks[1])  # decoded images stay in memory
    learner.tasks[0] = Task.described(first.describe())
    with pytest.raises(ValueError, match=said):
        learner.method.begin_task(learner, stream.tasks[1])
