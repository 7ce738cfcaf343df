"""Adapters on layers: what is refused, what a copy calls, where they stand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from perdure.adapters.injection import adapted, attach, attach_behind, detach, fold, folded_into, updates
from perdure.adapters.low_rank import LowRank
from perdure.adapters.progressive_columns import ProgressiveColumns
from perdure.adapters.state import ParameterStore
from perdure.backbones.tiny import tiny
from perdure.types import Site


def filled(model: nn.Module, at: str = "kv") -> list[LowRank]:
    """Adapters with random branches on all blocks."""
    made = []
    for sites in model.sites_by_input(at).values():
        adapter = LowRank(sites, 2)
        adapter.open()
        for up in adapter.up:
            nn.init.normal_(up)
        attach(model, sites, adapter)
        made.append(adapter)
    return made


def test_a_deep_copy_calls_its_own_adapters(lab: Any) -> None:
    learner = lab.taught("inflora(rank=2)")
    learner.grow(lab.stream().tasks[2])
    twin = copy.deepcopy(learner)
    images = lab.stream().tasks[0].test.__getitems__([0, 1, 2])
    with torch.no_grad():
        before = learner.encode(images)
        for adapter in learner.method.adapters.values():
            nn.init.normal_(adapter.down)
            for up in adapter.up:
                nn.init.normal_(up)
        assert torch.equal(twin.encode(images), before)
        assert not torch.allclose(learner.encode(images), before, atol=1e-2)


def test_folding_again_and_again_does_not_drift() -> None:
    model, images = tiny(), {"image": torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)}
    filled(model)
    fold(model, branches=True)
    first = model(images)
    for _ in range(50):
        fold(model, branches=False)
        fold(model, branches=True)
    assert torch.equal(model(images), first)


def test_only_the_named_rows_of_a_fused_layer_change() -> None:
    model = tiny(dim=8)
    before = model.get_submodule("vision.blocks.0.attn.qkv").weight.clone()
    filled(model, at="v")
    fold(model, branches=True)
    after = model.get_submodule("vision.blocks.0.attn.qkv").weight
    assert torch.equal(after[:16], before[:16])
    assert not torch.allclose(after[16:], before[16:])


@pytest.mark.parametrize(
    "method", ["inflora(rank=2)", "o_lora(rank=2)", "sd_lora(rank=2)", "fm_lora(rank=4)", "moe_adapters"]
)
def test_updates_beside_their_layers_answer_as_folded_ones_do_and_copy_no_weight(method: str, lab: Any) -> None:
    folding, beside = lab.learner(method), lab.learner(method)
    beside.backbone.folds = False
    pretrained = {name: weight.clone() for name, weight in beside.backbone.named_parameters()}
    for learner in (folding, beside):
        lab.teach(learner, lab.stream().tasks[:2])
    with beside.inference():
        assert all(torch.equal(weight, pretrained[name]) for name, weight in beside.backbone.named_parameters())
    assert not list(folded_into(beside.backbone))
    test = lab.stream().tasks[0].test
    with folding.inference(), beside.inference():
        torch.testing.assert_close(beside.scores_of(test), folding.scores_of(test), rtol=1e-3, atol=1e-3)
    detach(beside.backbone)
    assert not adapted(beside.backbone)


def test_an_adapted_layer_is_known_until_detached() -> None:
    model = tiny()
    assert not adapted(model)
    adapters = filled(model)
    assert adapted(model)
    assert [(site.key[-1], part) for site, adapter, part in updates(model) if adapter is adapters[0]] == [
        ("k", 0),
        ("v", 1),
    ]
    detach(model)
    assert not adapted(model)
    assert list(updates(model)) == []


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_the_layer_cannot_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"^rank={rank}: expected 1 to 8, the inputs of some.layer$"):
        LowRank([Site("k", "some.layer", "x", 8, (0, 8))], rank)


def test_only_linear_layers_can_be_adapted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"^0 is a Conv2d: only nn.Linear can be adapted; choose other sites$"):
        attach(model, [Site("k", "0", "x", 3, (0, 3))], LowRank([Site("k", "0", "x", 3, (0, 3))], 1))


def test_a_loaded_store_has_its_parameters_in_the_order_in_which_an_optimizer_knew_them() -> None:
    made, loaded = ParameterStore(), ParameterStore()
    for number in range(12):
        for part in ("up", "down"):
            made.put(f"{number}/{part}", torch.full((1,), float(number)))
    made.take("3/down")
    made.put("3/down", torch.zeros(1))
    loaded.load_state_dict(made.state_dict())
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in made.named_parameters()]
    assert len(made.names) == 24


def test_what_stands_behind_a_block_is_found_and_taken_off_again() -> None:
    model = tiny(dim=16)
    columns = ProgressiveColumns(16, 2)
    columns.start(torch.device("cpu"))
    nn.init.normal_(columns.open["up"])
    image = model.sample()
    plain = model(image)
    attach_behind(model.get_submodule(model.blocks()[0]), columns)
    assert adapted(model)
    assert not torch.equal(model(image), plain)
    detach(model)
    assert not adapted(model)
    assert torch.equal(model(image), plain)
