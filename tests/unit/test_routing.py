"""Routers against hand calculations; the pool keeps to its bytes; merging against the papers' rules."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.mechanisms.experience_pool import ExperiencePool, even_share
from perdure.mechanisms.merging import MERGES, merged_vectors
from perdure.mechanisms.routing import ClassRouter, LinUCB, SubspaceRouter, TextRouter, router_of
from perdure.mechanisms.subspace import shrunk


def pool_of(features: list[Tensor], limit: int = 10**6) -> ExperiencePool:
    """A pool of one class a member, with black pictures of 2 x 2."""
    pool = ExperiencePool(limit, rank=2)
    for member, mine in enumerate(features):
        pool.add(member, [torch.zeros(len(mine), 3, 2, 2, dtype=torch.uint8)], [mine], [member])
    return pool


def clouds(spread: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [centre + spread * torch.randn(40, 8, generator=generator) for centre in torch.eye(8)[:3]]


def test_the_gaussian_router_is_linear_discriminant_analysis() -> None:
    features = [cloud[:count] for cloud, count in zip(clouds(), (40, 20, 10), strict=True)]
    pool = pool_of(features)
    router = ClassRouter(pool, [0, 1, 2], 3, gaussian=True)
    asked = torch.cat(features)[::7]
    wide = pool.statistics.pooled()
    sure = torch.linalg.inv(router.root @ router.root.T)  # what Σ became when it was shrunk
    torch.testing.assert_close(sure, shrunk(wide, 67), rtol=1e-2, atol=1e-5)
    ways = asked.double()[:, None] - torch.stack([f.double().mean(0) for f in features])
    by_hand = (
        torch.tensor([4 / 7, 2 / 7, 1 / 7]).log()
        - torch.einsum("nci,ij,ncj->nc", ways, torch.linalg.inv(sure), ways) / 2
    )
    torch.testing.assert_close(router(asked).double(), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ["gaussian", "nearest", "subspace"])
def test_each_example_is_sent_to_whom_it_belongs_whoever_else_is_asked_about(route: str) -> None:
    features = clouds()
    router = router_of(route, pool_of(features), [0, 1, 2], 3, 8)  # type: ignore[arg-type]
    assert router is not None
    asked, truth = torch.cat(features), torch.arange(3).repeat_interleave(40)
    chosen, _ = router.choose(asked, [0, 1, 2])
    assert (chosen == truth).float().mean() > 0.95
    alone = torch.cat([router.choose(asked[i : i + 1], [0, 1, 2])[0] for i in range(0, 120, 9)])
    assert torch.equal(alone, chosen[::9])
    assert set(router.choose(asked, [0, 2])[0].tolist()) <= {0, 2}


def test_what_is_like_nothing_that_was_taught_is_told() -> None:
    features = clouds()
    router = ClassRouter(pool_of(features), [0, 1, 2], 3, gaussian=True)
    router.settle(torch.cat(features))
    assert router.choose(torch.cat(features), [0, 1, 2])[1].float().mean() == pytest.approx(0.95, abs=0.01)
    assert not router.choose(torch.eye(8)[5:], [0, 1, 2])[1].any()


def test_texts_choose_by_the_largest_cosine() -> None:
    pool = pool_of(clouds())
    for member in range(3):
        pool.texts[str(member)] = torch.eye(8)[[member, 5]] if member == 1 else torch.eye(8)[[member]]
    router = TextRouter(pool.texts, 3)
    assert torch.equal(router(torch.eye(8)[5:6]), torch.tensor([[0.0, 1.0, 0.0]]))


def test_a_bandit_that_sees_rewards_alone_learns_whom_to_ask() -> None:
    bandit, features = LinUCB(3, 8), clouds()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1)).tolist()
    asked, truth = torch.cat(features), torch.arange(3).repeat_interleave(40)
    for row in order:
        member = int(bandit.choose(asked[row : row + 1], [0, 1, 2])[0])
        bandit.learn(asked[row], member, float(member == truth[row]))
    assert (bandit.choose(asked, [0, 1, 2])[0] == truth).float().mean() > 0.9
    bandit.settle(asked)
    assert bandit.choose(asked, [0, 1, 2])[1].float().mean() == pytest.approx(0.95, abs=0.01)
    assert not bandit.choose(torch.eye(8)[5:], [0, 1, 2])[1].any()  # who is unsure of them would try them
    x = torch.cat([asked[0], torch.ones(1)]).double()
    before = torch.linalg.inv(bandit.inverse[1])
    bandit.learn(asked[0], 1, 0.5)
    torch.testing.assert_close(torch.linalg.inv(bandit.inverse[1]), before + x.outer(x))  # Sherman and Morrison


@pytest.mark.parametrize("worth", [0.0, 0.4])
def test_a_bandit_tries_who_was_never_asked_where_the_other_is_worth_less(worth: float) -> None:
    """Rewards come for who answered alone: whoever is not tried could never show that it is worth more."""
    bandit, example = LinUCB(2, 8), clouds()[0][:1]
    asked = []
    for _ in range(30):
        (member,) = bandit.choose(example, [0, 1])[0].tolist()
        bandit.learn(example[0], member, (worth, 1.0)[member])
        asked.append(member)
    assert asked[0] == 0
    assert asked[-10:] == [1] * 10


def test_examples_give_way_to_the_limit_and_statistics_never_do() -> None:
    features = clouds()
    whole = pool_of(features)
    rest = whole.nbytes - 120 * 12
    small = pool_of(features, limit=rest + 12 * 20)
    assert small.nbytes <= rest + 12 * 20
    assert [len(small.exemplars[str(c)]) for c in range(3)] == [6, 6, 6]
    images, classes = small.sample(10, torch.Generator().manual_seed(0))
    assert (len(images), len(classes)) == (10, 10)
    with pytest.raises(ValueError, match=r"statistics of 3 classes take .* give more with --pool-bytes"):
        pool_of(features, limit=rest - 1)
    assert [even_share([3, 10, 10], most) for most in (23, 13, 5, 0)] == [10, 5, 1, 0]


def test_a_basis_explains_what_lies_in_it() -> None:
    plane = torch.eye(8)[:2][torch.arange(40) % 2] * torch.linspace(1, 2, 40)[:, None]
    router = SubspaceRouter(pool_of([plane, torch.eye(8)[2:].repeat(8, 1)]).bases, 2)
    assert router(plane)[:, 0].abs().max() < 1e-6
    assert (router(plane).argmax(1) == 0).all()
    moved = SubspaceRouter(pool_of([plane + 3, plane - 3]).bases, 2)  # each lies in its own place
    assert moved(plane + 3)[:, 0].abs().max() < 1e-6
    assert moved(plane - 3)[:, 0].max() < -1


def merged(how: str, updates: list[Tensor], weights: list[float], **options: float) -> Tensor:
    return merged_vectors(MERGES[how](**options), [{"layer": u} for u in updates], weights)["layer"]


@pytest.mark.parametrize(
    ("how", "options"), [("average", {}), ("arithmetic", {"scale": 1}), ("ties", {"density": 1}), ("dare", {"drop": 0})]
)
def test_weights_1_and_0_give_the_first_update(how: str, options: dict[str, float]) -> None:
    first, second = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(how, [first, second], [1, 0], **options), first)
    torch.testing.assert_close(merged(how, [first], [2.0], **options), first * (2 if how == "arithmetic" else 1))


def test_ties_beats_the_average_on_updates_that_disagree_in_what_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.zeros(2, 20, 20).unbind()
    first[:, :4], second[:, 10:14] = 1.0, -1.0  # what each of the two is about
    wanted = first + second
    noisy = [each + 0.1 * torch.randn(20, 20, generator=generator) for each in (first, second)]
    noisy[1][:, :4] -= 0.3  # small entries that go against the other's large ones
    error = {how: float((merged(how, noisy, [1, 1]) - wanted).norm()) for how in ("ties", "average")}
    assert error["ties"] < error["average"] / 3, error


def test_weights_and_scales_count_in_every_way() -> None:
    first, second = torch.tensor([[1.0, 4.0]]), torch.tensor([[-2.0, 2.0]])
    for how, options, wanted in (
        ("average", {"scale": 2}, [[0.5, 7.0]]),
        ("dare", {"drop": 0, "scale": 2}, [[0.5, 7.0]]),
        ("arithmetic", {}, [[0.4, 5.6]]),  # 0.4 of the sum
        ("ties", {"density": 1, "scale": 2}, [[2.0, 7.0]]),  # 3 - 2 > 0 elects plus, of which only the first is
    ):
        torch.testing.assert_close(merged(how, [first, second], [3, 1], **options), torch.tensor(wanted))


def test_what_ties_keeps_is_largest_in_all_layers_and_what_dare_drops_follows_the_seed() -> None:
    vector = {"a": torch.tensor([10.0, -9.0]), "b": torch.tensor([1.0, 0.5])}
    found = merged_vectors(MERGES["ties"](density=0.5), [vector], [1.0])
    assert {layer: update.tolist() for layer, update in found.items()} == {"a": [10.0, -9.0], "b": [0.0, 0.0]}
    drawn = [merged_vectors(MERGES["dare"](), [{"a": torch.ones(99)}], [1.0], seed)["a"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_ties_trims_elects_and_averages_as_in_the_papers_figure() -> None:
    updates = [torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[2.0, 5.0, 0.2, -0.1]])]
    found = merged("ties", updates, [1, 1], density=0.75)
    # trimmed to the largest three each: 0.1 and -0.1 fall; the second elects +, of which only the 5 agrees
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 0.2, 2.0]]))


def test_dare_drops_and_keeps_the_mean() -> None:
    update = torch.ones(200, 200)
    found = merged("dare", [update], [1.0], drop=0.9)
    assert set(found.unique().tolist()) == {0.0, 10.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)


def test_weights_that_say_nothing_are_refused() -> None:
    given: list[tuple[Any, str]] = [
        ([0, 0], "one above 0"),
        ([1, -1], "of 0 or more"),
        (["x", 1], "expected numbers"),
        ([1], "got 1 for 2 members"),
    ]
    for weights, said in given:
        with pytest.raises(ValueError, match=said):
            merged("average", [torch.ones(1, 1)] * 2, weights)
