"""Prefixes: attention over joined keys and values, exact in every family of models, and off when nothing is given."""

import copy
import math
from typing import Any

import pytest
import timm as timm_library
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import adapted, detach, prompted
from perdure.adapters.prefix import Prefix, starting_prefix
from perdure.backbones.base import Backbone
from perdure.backbones.clip import pocket
from perdure.backbones.preprocess import Preprocess
from perdure.backbones.timm import Timm
from perdure.backbones.tiny import tiny
from perdure.backbones.vision import Vision
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.prompting import attach_prefix, first_blocks
from perdure.objectives.classify import Classify

TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
HUGGING = {
    "vit": ("ViTModel", "ViTConfig"),
    "dinov2": ("Dinov2Model", "Dinov2Config"),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig"),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig"),
}
TINY_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
FAMILIES = ["tiny fused", "tiny", "pocket", "timm", "timm normalised", *HUGGING]


def backbone(family: str) -> Backbone:
    """A small random model in float64."""
    made: Backbone
    size = Preprocess(size=32, resize=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family.startswith("tiny"):
            made = tiny(depth=3, fused=family.endswith("fused"))
        elif family == "pocket":
            made = pocket()
        elif family.startswith("timm"):
            model = timm_library.models.VisionTransformer(
                **TINY_TIMM, qk_norm=family.endswith("normalised"), num_classes=0
            )
            made = Timm(model, size, "timm(name='small')")
        else:
            kind, config = (getattr(transformers, name) for name in HUGGING[family])
            made = Vision(kind(config(**TOWER)), family == "siglip", size, f"vision(path={family!r})")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "norm" in name:  # those of a fresh model would hide a mix-up
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    return made.double()


def pixels(model: Backbone, n: int = 3) -> dict[str, Tensor]:
    side = model.preprocess.size
    return {"image": torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()}


def some(model: Backbone, blocks: int, *shape: int) -> list[Tensor]:
    width = model.sites("k")[0].fan_out
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, 2 * width, generator=generator, dtype=torch.float64) for _ in range(blocks)]


def by_hand(model: Backbone, block: int, seen: dict[str, Any], prefix: Tensor) -> Tensor:
    """What the output projection reads, from the formula."""
    q, k, v = (
        F.linear(seen["x"], layer.weight[slice(*site.rows)], layer.bias[slice(*site.rows)] if has else None)
        for site in model.sites("qkv", str(block))
        for layer in [model.get_submodule(site.layer)]
        for has in [layer.bias is not None]
    )
    attention = seen["attention"]
    prefix = prefix.expand(len(q), -1, -1)
    p_k, p_v = prefix.chunk(2, -1)
    heads = seen["heads"]
    q, k, v, p_k, p_v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, p_k, p_v))
    if not isinstance(getattr(attention, "q_norm", None), nn.Identity | None):
        q, k, p_k = attention.q_norm(q), attention.k_norm(k), attention.k_norm(p_k)
    if (positions := seen["kwargs"].get("position_embeddings")) is not None:
        from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, *positions)
    scores = q @ torch.cat([p_k, k], 2).mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ torch.cat([p_v, v], 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(5,), (3, 2)], ids=["shared", "one an image"])
def test_attention_equals_the_formula_with_joined_keys_and_values(
    family: str, attention: Any, shape: tuple[int, ...]
) -> None:
    model = backbone(family)
    model.set_attention(attention)
    seen: dict[str, Any] = {"heads": model.model.config.vision_config.num_attention_heads if family == "pocket" else 4}
    out = model.get_submodule(model.sites("o", "1")[0].layer)
    inner = model.get_submodule(model.sites("q", "1")[0].layer.rpartition(".")[0])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(x=args[0] if args else kwargs["hidden_states"], attention=module, kwargs=kwargs)

    inner.register_forward_pre_hook(before, with_kwargs=True)
    prefix = Prefix()
    attach_prefix(of(model), prefix, "1-2")
    out.register_forward_pre_hook(lambda _layer, args: seen.update(out=args[0]))
    given = some(model, 2, *shape)
    plain = model(pixels(model))
    with prefix.using(given):
        joined = model(pixels(model))
    expected = by_hand(model, 1, seen, given[0])
    assert seen["out"].shape == expected.shape
    # eager attention of transformers takes its softmax in float32, whatever comes in
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=5e-6)
    assert (joined - plain).abs().max() > 1e-3


def test_nothing_given_is_the_pretrained_model_bit_for_bit_and_so_is_detach() -> None:
    model = tiny()
    plain = model(pixels(model))
    prefix = Prefix()
    attach_prefix(of(model), prefix, None)
    assert torch.equal(model(pixels(model)), plain)
    with prefix.using([torch.ones(2, 64)] * 2):
        assert not torch.allclose(model(pixels(model)), plain)
    assert torch.equal(model(pixels(model)), plain)
    assert adapted(model)
    assert prompted(model)
    detach(model)
    assert not adapted(model)
    with prefix.using([torch.ones(2, 64)] * 2):
        assert torch.equal(model(pixels(model)), plain)


def test_own_values_are_always_on_and_what_is_given_comes_before_them() -> None:
    model = tiny()
    prefix = Prefix(starting_prefix(2, 3, 64))
    attach_prefix(of(model), prefix, None)
    own = model(pixels(model))
    own[:, 0].sum().backward()  # the sum of all features is constant after the last norm
    assert prefix.values is not None
    assert prefix.values.grad is not None
    assert prefix.values.grad.any()
    with prefix.using(prefix.values.unbind()):
        assert torch.equal(model(pixels(model)), own)
    with prefix.using([torch.ones(1, 64)] * 2):
        assert not torch.allclose(model(pixels(model)), own)


def test_a_copied_model_asks_its_own_prefix() -> None:
    pair = nn.ModuleDict({"model": tiny(), "prefix": Prefix(starting_prefix(2, 3, 64))})
    attach_prefix(of(pair["model"]), pair["prefix"], None)
    other = copy.deepcopy(pair)
    plain = pair["model"](pixels(pair["model"]))
    nn.init.ones_(other["prefix"].values)
    assert torch.equal(pair["model"](pixels(pair["model"])), plain)
    assert not torch.allclose(other["model"](pixels(pair["model"])), plain)


def test_a_prefix_for_each_image_equals_one_image_at_a_time() -> None:
    model, prefix = tiny().double(), Prefix()
    attach_prefix(of(model), prefix, None)
    batch, given = pixels(model), some(model, 2, 3, 2)
    with prefix.using(given):
        together = model(batch)
    for i in range(3):
        with prefix.using([values[i] for values in given]):
            torch.testing.assert_close(model({"image": batch["image"][i : i + 1]})[0], together[i])


@pytest.mark.parametrize("specs", [("lora", "prefix"), ("prefix", "lora")])
@pytest.mark.parametrize("fused", [True, False])
def test_a_low_rank_update_of_the_same_layers_is_independent_of_the_order(
    fused: bool, specs: tuple[str, str], lab: Any
) -> None:
    bench = lab.but(fused=fused)
    stream = bench.stream()
    learner = bench.learner(" + ".join(specs))
    learner.grow(stream.tasks[0])
    parts = {part.name: part for part in learner.method}
    for number, adapter in enumerate(parts["lora"].adapters):
        nn.init.normal_(adapter.up[0], std=0.1, generator=torch.Generator().manual_seed(number))
        nn.init.normal_(adapter.down, std=0.1, generator=torch.Generator().manual_seed(9 + number))
    values = parts["prefix"].prefixes[0].values
    nn.init.normal_(values, generator=torch.Generator().manual_seed(3))
    images = stream.tasks[0].test.__getitems__(range(4))
    beside = learner.encode(images)
    with learner.inference():  # where the update stands in the weights, and no second hook runs
        torch.testing.assert_close(learner.encode(images), beside, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bias outside", "positions"])
def test_an_attention_that_nothing_can_join_is_refused_with_the_reason(kind: str) -> None:
    more = {} if kind == "bias outside" else {"use_rot_pos_emb": True, "qkv_fused": False}
    model = Timm(
        timm_library.models.eva.Eva(**TINY_TIMM, num_classes=0, **more), Preprocess(size=32, resize=32), "timm('eva')"
    )
    reason = "they do not come from the layers" if kind == "bias outside" else "The size of tensor a"
    with pytest.raises(ValueError, match=rf"^timm\('eva'\): nothing can join .*\({reason}.* such as lora$"):
        attach_prefix(of(model), Prefix(), "0")


def test_bfloat16_stays_near_float32() -> None:
    model, prefix = tiny(dim=64), Prefix()
    attach_prefix(of(model), prefix, None)
    given = [values.float() for values in some(model, 2, 3, 4)]
    with prefix.using(given):
        exact = model(pixels(model))
        rounded = model.to(torch.bfloat16)(pixels(model))
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact, rounded.float(), dim=1).min() > 0.999


def test_blocks_of_a_paper_are_cut_to_those_there_are() -> None:
    assert [first_blocks(tiny(depth=d), 0, 5) for d in (2, 5, 6)] == ["0-1", "0-4", "0-4"]


def of(backbone: Backbone) -> Core:
    """A learner that has the backbone, and nothing to learn with."""
    return Core(backbone, Classify(), Method())
