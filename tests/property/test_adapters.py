"""Low-rank updates: folded into the weights or beside the layers, settled or open, they are the same function."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perdure.adapters.injection import attach, detach, fold
from perdure.adapters.low_rank import LowRank
from perdure.backbones.tiny import tiny
from perdure.types import Site

quick = settings(deadline=None, max_examples=25)
IMAGES = {"image": torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)}


def opened(adapter: LowRank, seed: int) -> list[Tensor]:
    """Open a branch, fill it, and return what it adds to each layer."""
    generator = torch.Generator().manual_seed(seed)
    adapter.open()
    assert adapter.down is not None
    with torch.no_grad():
        adapter.down.copy_(torch.randn(adapter.down.shape, generator=generator) * 0.3)
        for up in adapter.up:
            up.copy_(torch.randn(up.shape, generator=generator) * 0.3)
        return [adapter.scale * (up @ adapter.down) for up in adapter.up]


@quick
@given(
    fused=st.booleans(),
    at=st.sampled_from(["kv", "q", "qkvo", "qv,mlp", "fc1"]),
    settled=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    last_open=st.booleans(),
)
def test_folded_equals_unfolded_equals_weights_changed_by_hand(
    fused: bool, at: str, settled: list[int], scale: float, last_open: bool
) -> None:
    model, by_hand = (tiny(dim=8, depth=2, size=8, fused=fused) for _ in range(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for number, times in enumerate(settled):  # several adapters on one layer add up
        for key, sites in model.sites_by_input(at).items():
            adapter = LowRank(sites, 2, scale)
            for each in range(times + last_open):
                for site, update in zip(sites, opened(adapter, hash((number, key, each)) % 1000), strict=True):
                    with torch.no_grad():
                        by_hand.get_submodule(site.layer).weight[site.rows[0] : site.rows[1]] += update
                if each < times:
                    adapter.merge()
            attach(model, sites, adapter)
    expected = by_hand(IMAGES)
    for branches in (False, True, False):
        fold(model, branches)
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    detach(model)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []


@quick
@given(
    fan_in=st.integers(2, 12),
    fan_outs=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    rank=st.integers(1, 2),
    branches=st.integers(1, 8),
)
def test_settled_branches_add_up_and_are_kept_in_the_smaller_form(
    fan_in: int, fan_outs: list[int], rank: int, branches: int
) -> None:
    sites = [Site(f"s{i}", f"l{i}", "x", fan_in, (0, out)) for i, out in enumerate(fan_outs)]
    adapter = LowRank(sites, rank, 0.5)
    total = [torch.zeros(out, fan_in) for out in fan_outs]
    for each in range(branches):
        total = [a + b for a, b in zip(total, opened(adapter, each), strict=True)]
        adapter.merge()
        numbers = sum(t.numel() for t in adapter.merged.values())
        assert numbers <= fan_in * sum(fan_outs)
        assert numbers == min((each + 1) * rank * (fan_in + sum(fan_outs)), fan_in * sum(fan_outs))
        for part, expected in enumerate(total):
            torch.testing.assert_close(adapter.delta(part, branches=False), expected, rtol=1e-4, atol=1e-5)
            factors: Any = adapter.factors(part)
            torch.testing.assert_close(factors[0] @ factors[1], expected, rtol=1e-4, atol=1e-5)
    twin = LowRank(sites, rank, 0.5)
    twin.load_state_dict(adapter.state_dict())
    for part in range(len(sites)):
        assert torch.equal(twin.delta(part, branches=True), adapter.delta(part, branches=True))
