"""Bottleneck adapters: what is added against a hand calculation, where it stands, what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.adapters.bottleneck import Beside, Bottleneck
from perdure.adapters.injection import attach, detach
from perdure.backbones.tiny import Tiny, tiny
from perdure.types import Site

IMAGES = {"image": torch.arange(4 * 3 * 16 * 16, dtype=torch.uint8).reshape(4, 3, 16, 16)}


def filled(adapter: Bottleneck) -> Bottleneck:
    """Random weights and biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapter


def written(adapter: Bottleneck, x: Tensor) -> Tensor:
    """What a bottleneck adds, by the paper."""
    inner = F.gelu(x @ adapter.down.T + adapter.down_bias)
    return adapter.scale * (inner @ adapter.up.T + adapter.up_bias)


def watched(model: Tiny, name: str, given: bool = False) -> tuple[Tensor, Tensor]:
    """What the layer `name` reads and gives, hooks of adapters included, or before them when `given`."""
    found: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(
        lambda _layer, args, y: found.append((args[0].clone(), y.clone())), prepend=given
    )
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    return found[0]


def test_the_bottleneck_after_a_layer_reads_its_output() -> None:
    model = tiny(dim=16, depth=1)
    (site,) = model.sites("fc2")
    adapter = filled(Bottleneck(site, 3, scale=0.5))
    attach(model, [site], adapter)
    _, before = watched(model, site.layer, given=True)
    _, after = watched(model, site.layer)
    torch.testing.assert_close(after, before + written(adapter, before))
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_the_bottleneck_beside_an_mlp_reads_its_input(fused: bool) -> None:
    model = tiny(dim=16, depth=2, fused=fused)
    for first, last in zip(model.sites("fc1"), model.sites("fc2"), strict=True):
        read, _ = watched(model, first.layer)
        _, plain = watched(model, last.layer)
        adapter = filled(Beside((first, last), 3, scale=0.5))
        attach(model, [first, last], adapter)
        _, after = watched(model, last.layer)
        torch.testing.assert_close(after, plain + written(adapter, read))
    model(IMAGES)
    copy.deepcopy(model)  # no result of the forward pass stays behind: it could not be copied


def test_rows_of_a_fused_layer_train_as_the_same_layers_apart() -> None:
    gradients = []
    for fused in (True, False):
        model = tiny(dim=16, depth=1, fused=fused)
        adapters = []
        for site in model.sites("qv"):
            adapter = filled(Bottleneck(site, 3))
            attach(model, [site], adapter)
            adapters.append(adapter)
        sources = [p for adapter in adapters for p in adapter.parameters()]
        gradients.append(torch.autograd.grad(model(IMAGES).square().sum(), sources))
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_gradients_of_single_examples_add_up_to_those_of_a_batch(parallel: bool) -> None:
    model = tiny(dim=16, depth=2)
    holder = nn.Module()
    holder.model, holder.adapters = model, nn.ModuleList()
    for first, last in zip(model.sites("fc1"), model.sites("fc2"), strict=True):
        adapter = filled(Beside((first, last), 3) if parallel else Bottleneck(last, 3))
        attach(model, [first, last] if parallel else [last], adapter)
        holder.adapters.append(adapter)
    holder.forward = lambda image: model({"image": image}).square().sum()  # type: ignore[assignment]
    params = {name: p.detach() for name, p in holder.named_parameters() if name.startswith("adapters.")}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(holder, values, (image.unsqueeze(0),))

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel
        single = vmap(grad(loss), in_dims=(None, 0))(params, IMAGES["image"])
    whole = torch.autograd.grad(holder(IMAGES["image"]), list(holder.adapters.parameters()))
    for (name, _), expected in zip(params.items(), whole, strict=True):
        assert single[name][0].any()
        torch.testing.assert_close(single[name].sum(0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["adapter(rank=2)", "adapter(rank=2, at='o,fc2')", "adapter(rank=2, parallel=True)"])
def test_an_adapter_starts_as_the_pretrained_model_and_is_trained_by_every_task(spec: str, lab: Any) -> None:
    learner, stream = lab.learner(spec), lab.stream()
    images = stream.tasks[0].test.__getitems__(range(8))
    plain = learner.encode(images)
    learner.grow(stream.tasks[0])
    assert torch.equal(learner.encode(images), plain)
    adapters = list(learner.method.adapters)
    assert len(adapters) == (4 if "o," in spec else 2)  # of two blocks
    before = [adapter.up.detach().clone() for adapter in adapters]
    for task in stream:
        lab.teach(learner, [task], epochs=1)
        assert list(learner.method.adapters) == adapters
        assert not any(torch.equal(adapter.up, up) for adapter, up in zip(adapters, before, strict=True))
        before = [adapter.up.detach().clone() for adapter in adapters]
    assert not torch.allclose(learner.encode(images), plain, atol=1e-3)
    detach(learner.backbone)
    assert torch.equal(learner.encode(images), plain)


def test_after_the_tasks_that_adapt_the_features_stay(lab: Any) -> None:
    learner, stream = lab.learner("adapter(rank=2, tasks=1)"), lab.stream()
    images = stream.tasks[0].test.__getitems__(range(8))
    lab.teach(learner, stream.tasks[:1])
    assert [name for name in learner.trainable() if ".adapters." in name] == []
    features = learner.encode(images)
    lab.teach(learner, stream.tasks[1:2])
    assert torch.equal(learner.encode(images), features)


def test_ewc_finds_every_part_of_an_adapter_important(lab: Any) -> None:
    for spec, layers in (("adapter(rank=2) + ewc", 2), ("ewc + adapter(rank=2, parallel=True)", 2)):
        learner = lab.teach(lab.learner(spec), lab.stream().tasks[:1], epochs=1)
        guard = next(part for part in learner.method if part.name == "ewc")
        held = {name: value for name, value in guard.fisher.items() if ".adapters." in name}
        assert len(held) == 4 * layers
        assert all(value.any() for value in held.values())


def test_a_linear_update_of_the_layer_that_is_read_comes_first_or_is_refused(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2, at='fc2') + adapter(rank=2)"), lab.stream()
    images = stream.tasks[0].test.__getitems__(range(8))
    learner.grow(stream.tasks[0])
    lab.descend(learner, stream.tasks[0])
    trained = learner.encode(images).detach()
    with learner.inference():  # where the update of lora stands in the weight
        torch.testing.assert_close(learner.encode(images), trained, rtol=1e-4, atol=1e-5)
    learner = lab.learner("adapter(rank=2) + lora(rank=2, at='fc2')")
    learner.grow(stream.tasks[0])
    with pytest.raises(ValueError, match=r"^adapter reads what .*fc2 gives, .*: write adapter last, or choose other"):
        learner.method.check(learner, stream.tasks[0])
    for spec in ("adapter(rank=2) + lora(rank=2)", "adapter(rank=2, parallel=True) + lora(rank=2, at='mlp')"):
        lab.teach(lab.learner(spec), stream.tasks[:1], epochs=1)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_bottleneck_wider_than_what_it_reads_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"^rank={rank}: expected 1 to 8, the width at layer$"):
        Bottleneck(Site("0:fc2", "layer", "input", 32, (0, 8)), rank)
