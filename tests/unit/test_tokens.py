"""Prompt tokens: they pass through blocks beside an image's own, and leave them as they were."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from perdure.adapters.injection import detach, prompted
from perdure.adapters.prompt_tokens import PromptBase, PromptTokens, RoutedPrompts
from perdure.backbones.tiny import Tiny
from perdure.types import Batch


def held(lab: Any, tokens: PromptBase) -> tuple[Tiny, Batch]:
    """A backbone whose blocks all take `tokens`, and three images."""
    backbone = lab.backbone()
    tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
    return backbone, lab.stream().tasks[0].test.__getitems__(range(3))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_tokens_stand_behind_the_first_and_before_all_others(lab: Any) -> None:
    tokens = PromptTokens(5, 16)
    backbone, images = held(lab, tokens)
    read: list[Tensor] = []
    backbone.vision.blocks[0].norm1.register_forward_hook(lambda _m, args, _y: read.append(args[0]))
    backbone(images)
    detach(backbone)
    backbone(images)
    with_tokens, without = read
    assert torch.equal(with_tokens[:, :1], without[:, :1])
    assert torch.equal(with_tokens[:, 1:6], tokens.values.expand(3, -1, -1))
    assert torch.equal(with_tokens[:, 6:], without[:, 1:])


def test_nothing_is_added_until_it_is_given_nor_after(lab: Any) -> None:
    tokens, plain = RoutedPrompts(), lab.backbone()
    backbone, images = held(lab, tokens)
    assert prompted(backbone)
    assert torch.equal(backbone(images), plain(images))
    with tokens.using(drawn(5, 16)):
        assert (backbone(images) - plain(images)).abs().max() > 0.01
    assert torch.equal(backbone(images), plain(images))
    with pytest.raises(KeyError, match="image"), tokens.using(drawn(5, 16)):
        backbone({})
    assert tokens.now() is None


def test_given_tokens_are_no_part_of_any_state(lab: Any) -> None:
    tokens = RoutedPrompts()
    with tokens.using(drawn(5, 16)):
        assert not tokens.state_dict()
    assert list(PromptTokens(5, 16).state_dict()) == ["values"]


@pytest.mark.parametrize("reads", [False, True])
def test_tokens_of_its_own_serve_each_image_as_if_it_were_alone(reads: bool, lab: Any) -> None:
    tokens = RoutedPrompts()
    tokens.reads = reads
    backbone, images = held(lab, tokens)
    values = drawn(3, 5, 16)
    with tokens.using(values):
        together = backbone(images)
    for i in range(3):
        with tokens.using(values[i]):
            alone = backbone({"image": images["image"][i : i + 1]})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-5)


def test_what_the_tokens_became_can_take_the_place_of_the_class_token(lab: Any) -> None:
    tokens = RoutedPrompts()
    tokens.reads = True
    backbone, images = held(lab, tokens)
    became: list[Tensor] = []
    last = backbone.vision.blocks[-1]
    last.mlp.register_forward_hook(lambda _m, _args, y: became.append(y))
    last.norm2.register_forward_hook(lambda _m, args, _y: became.append(args[0]))
    with tokens.using(drawn(5, 16)):
        features = backbone(images)
    entered, added = became
    mean = (entered + added)[:, 1:6].mean(1)
    torch.testing.assert_close(features, backbone.vision.norm(mean), rtol=1e-5, atol=1e-5)


def test_tokens_take_the_precision_of_the_encoder(lab: Any) -> None:
    tokens = RoutedPrompts()
    backbone, images = held(lab, tokens)
    backbone.to(torch.bfloat16)
    with tokens.using(drawn(5, 16)):
        assert backbone(images).dtype == torch.bfloat16


def test_tokens_are_to_a_model_that_rotates_patches_what_its_own_registers_are() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.DINOv3ViTConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with_registers = transformers.DINOv3ViTModel(config).eval()
    config.num_register_tokens = 0
    without = transformers.DINOv3ViTModel(config).eval()
    registers = with_registers.embeddings.register_tokens.data.normal_(generator=torch.Generator().manual_seed(0))
    shared = {k: v for k, v in with_registers.state_dict().items() if not k.endswith("register_tokens")}
    missing, _ = without.load_state_dict(shared, strict=False)
    assert missing == ["embeddings.register_tokens"]
    tokens, pixels = RoutedPrompts(), drawn(2, 3, 32, 32)
    tokens.attach(list(without.model.layer))
    plain = without(pixels).pooler_output
    with tokens.using(registers[0]):
        features = without(pixels).pooler_output
    torch.testing.assert_close(features, with_registers(pixels).pooler_output, rtol=1e-5, atol=1e-5)
    assert (features - plain).abs().max() > 0.01
