"""Second moments of layer inputs, named tensors, and what they must equal."""

from typing import Any

import pytest
import torch
from torch import nn

from perdure.adapters.state import BufferDict
from perdure.backbones.tiny import tiny
from perdure.mechanisms.moments import second_moments


def pictures(count: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    return {"image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)}


def test_second_moments_equal_the_product_of_all_inputs_in_float64() -> None:
    model, batches = tiny(dim=16), [pictures(5), pictures(3)]
    layers = {n: model.get_submodule(f"vision.blocks.{n}.attn.qkv") for n in ("0", "1")}
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].detach().flatten(0, 1).double()))
        for n, layer in layers.items()
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    found = second_moments(model, layers, batches)
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        assert len(x) == 8 * 17
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_nothing_above_the_last_watched_layer_is_computed() -> None:
    model, called = tiny(), []
    for name in ("vision.blocks.0.attn.qkv", "vision.blocks.0.attn.proj", "vision.blocks.1", "vision.norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    second_moments(model, {"x": model.get_submodule("vision.blocks.0.attn.qkv")}, [pictures(2), pictures(2)])
    assert called == []
    second_moments(model, {"x": model.get_submodule("vision.blocks.1.attn.qkv")}, [pictures(2)])
    assert called == ["vision.blocks.0.attn.qkv", "vision.blocks.0.attn.proj"]


def test_autocast_has_no_influence_on_the_products() -> None:
    layer, x = nn.Linear(12, 4), torch.randn(500, 12, generator=torch.Generator().manual_seed(0))

    def encode(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(batch["x"])

    found = second_moments(encode, {"layer": layer}, [{"x": x}])["layer"]
    exact = x.double().T @ x.double() / len(x)
    rounded = (x.bfloat16().T @ x.bfloat16()).double() / len(x)
    assert (found - exact).abs().max() < 1e-6
    assert (rounded - exact).abs().max() > 1e-4


def test_a_layer_that_is_never_reached_is_named() -> None:
    model = tiny(text=True)
    layer = model.get_submodule("text.blocks.0.attn.qkv")
    with pytest.raises(ValueError, match=r"^the inputs of \['words'\] are never computed: choose other sites$"):
        second_moments(model, {"words": layer}, [pictures(1)])
    assert not layer._forward_pre_hooks


def test_named_tensors_survive_saving_whatever_their_number_and_size() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = BufferDict()

    one, two = Holder(), Holder()
    one.kept["blocks.0.attn/k"] = torch.arange(6).reshape(2, 3)
    one.kept["count"] = torch.tensor([7])
    two.kept["of another time"] = torch.zeros(9)
    two.load_state_dict(one.state_dict())
    assert list(two.kept) == ["blocks.0.attn/k", "count"]
    assert torch.equal(two.kept["blocks.0.attn/k"], torch.arange(6).reshape(2, 3))
    two.kept["count"] += 1  # a loaded tensor is not the saved one
    assert one.kept["count"].item() == 7
    two.load_state_dict(Holder().state_dict())
    assert not two.kept


def test_named_tensors_follow_their_module() -> None:
    kept = BufferDict()
    kept["a"] = torch.zeros(3)
    assert kept.to(torch.float64)["a"].dtype == torch.float64
