"""Mixtures of low-rank branches, and the methods that are made of them."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.adapters.low_rank_mixture import SeparateMixtures, TokenMixture, keyed, mixed
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.learner import Core
from perdure.objectives.generate import Generate
from perdure.training.config import make_method
from perdure.types import Site

SITE = Site("0:q", "0", "0", 6, (0, 4))


def shaken(adapter: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    return adapter


def test_a_mixture_adds_up_what_each_branch_gives_in_its_share() -> None:
    x, down, up = torch.randn(2, 3, 6), torch.randn(8, 6), torch.randn(4, 8)
    of_tokens, of_examples = torch.rand(2, 3, 4), torch.rand(2, 4)
    for gates, each in ((of_tokens, of_tokens), (of_examples, of_examples[:, None].expand(2, 3, 4))):
        wanted = sum(
            each[..., e, None] * (x @ down[2 * e : 2 * e + 2].T @ up[:, 2 * e : 2 * e + 2].T) for e in range(4)
        )
        torch.testing.assert_close(mixed(x, down, up, gates), wanted, rtol=1e-5, atol=1e-5)


def test_every_token_has_shares_of_its_own_and_with_equal_ones_it_is_one_lora() -> None:
    adapter, x, y = shaken(TokenMixture(SITE, 2, 3, 0.5)), torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    shares = adapter.gates(x)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))
    assert len({tuple(each.tolist()) for each in shares.flatten(0, 1).detach()}) == 6
    alone = torch.cat([adapter(x[:, i : i + 1], y[:, i : i + 1], 0) for i in range(3)], dim=1)
    torch.testing.assert_close(alone, adapter(x, y, 0))
    with torch.no_grad():
        adapter.router.zero_()
    torch.testing.assert_close(adapter(x, y, 0), y + 0.5 * (x @ adapter.down.T @ adapter.up.T) / 2)


def test_an_example_takes_one_branch_of_each_half_weighed_by_what_they_give() -> None:
    adapter, x, y = shaken(SeparateMixtures(SITE, 4, 2, 0.5, 5)), torch.randn(3, 2, 6), torch.randn(3, 2, 4)
    keys = torch.randn(3, 2, 5)
    with keyed([adapter], keys):
        found = adapter(x, y, 0)
    for i in range(3):
        given = []
        for half in range(2):
            shares = (adapter.gates[half] @ keys[i, half]).softmax(0)
            e = 2 * half + int(shares.argmax())
            rows = slice(2 * e, 2 * e + 2)
            given.append(shares.max() * (x[i] @ adapter.down[rows].T @ adapter.up[:, rows].T))
        weights = torch.stack([given[half] @ adapter.fusion[half] for half in range(2)]).softmax(0)
        wanted = y[i] + 0.5 * sum(weights[half, :, None] * given[half] for half in range(2))
        torch.testing.assert_close(found[i], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter(x, y, 0), y)


def test_both_gates_learn_which_the_published_one_hot_keeps_from_them() -> None:
    adapter, x = shaken(SeparateMixtures(SITE, 4, 2, 1.0, 5)), torch.randn(3, 2, 6)
    with keyed([adapter], torch.randn(3, 2, 5)):
        adapter(x, torch.zeros(3, 2, 4), 0).square().sum().backward()
    assert adapter.gates.grad.flatten(1).any(1).tolist() == [True, True]
    hot = F.one_hot(adapter.gates.sum(-1).argmax(-1), 2)
    assert not hot.requires_grad


def test_a_step_of_tokens_that_start_at_zero_changes_nothing() -> None:
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    assert torch.equal(TokenMixture(SITE, 2, 3, 1.0)(x, y, 0), y)
    adapter = SeparateMixtures(SITE, 4, 2, 1.0, 5)
    with keyed([adapter], torch.randn(2, 2, 5)):
        assert torch.equal(adapter(x, y, 0), y)


def test_alpha_is_divided_by_the_rank_of_all_experts_of_moe_lora_and_by_that_of_one_of_smolora(lab: Any) -> None:
    learner, task = lab.learner("moe_lora(rank=4, experts=2, alpha=2)"), lab.stream().tasks[0]
    learner.grow(task)
    assert {adapter.scale for adapter in learner.method.adapters} == {0.5}
    talking = Core(tiny_mllm(), Generate(), make_method("smolora(rank=4, experts=4, alpha=2)"))
    talking.grow(task)
    assert {adapter.scale for adapter in talking.method.adapters} == {0.5}


def test_one_half_of_the_experts_of_smolora_reads_images_and_the_other_words(lab: Any) -> None:
    learner = Core(tiny_mllm(), Generate(), make_method("smolora(rank=2, experts=4)"))
    learner.grow(lab.stream().tasks[0])
    asked = {"conversation": [{"messages": [{"role": "user", "content": "Which colour?"}]}]}
    with learner.inference(), learner.method.applied(learner, asked, "language"):
        keys = learner.method.adapters[0].keys
    assert keys is not None
    assert keys.any(-1).tolist() == [[False, True]]  # there is no image


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("moe_lora(rank=4, experts=3)", "experts=3: expected at least 2 that divide rank=4 evenly"),
        ("moe_lora(rank=4, experts=1)", "experts=1: expected at least 2"),
        ("smolora(experts=5)", "experts=5: expected an even number from 4 on"),
        ("smolora", "smolora needs conversations"),
        ("moe_lora(rank=99, experts=3)", "rank=99: expected at most 48"),
    ],
)
def test_what_cannot_be_is_refused_by_name(method: str, why: str, lab: Any) -> None:
    def begin() -> None:
        learner = lab.learner(method)
        learner.grow(lab.stream().tasks[0])

    with pytest.raises(ValueError, match=why):
        begin()
