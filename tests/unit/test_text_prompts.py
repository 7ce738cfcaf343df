"""Prompt tokens and prefixes in a text tower: by hand, in causal attention, in batches of unlike texts, and trained."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.prefix import Prefix
from perdure.adapters.prompt_tokens import PromptTokens, widened
from perdure.backbones.base import Backbone
from perdure.backbones.clip import pocket
from perdure.backbones.tiny import tiny

TEXTS = ["a cat", "two small dogs on a red carpet", "dogs"]
M = 3


def shallow(backbone: Backbone) -> None:
    tokens = PromptTokens(M, backbone.sites("q", "0", "text")[0].fan_in)
    backbone.prompts = tokens
    tokens.attach([backbone.get_submodule(name) for name in backbone.blocks("text")], "text")


def deep(backbone: Backbone) -> None:
    backbone.prompts = torch.nn.ModuleList()
    for site in backbone.sites("q", tower="text"):
        tokens = PromptTokens(M, site.fan_in)
        tokens.attach([backbone.get_submodule(site.key.rpartition(":")[0])], "text")
        backbone.prompts.append(tokens)


def prefixed(backbone: Backbone) -> None:
    keys, values, outs = (backbone.sites(letter, tower="text") for letter in "kvo")
    backbone.prompts = Prefix(torch.empty(len(keys), M, 2 * keys[0].fan_out))
    backbone.prompts.attach(backbone, keys, values, outs)


PLACED = pytest.mark.parametrize("place", [shallow, deep, prefixed])
MODELS = pytest.mark.parametrize("make", [pocket, lambda: tiny(text=True), lambda: tiny(text=True, fused=False)])


def prompted(make: Callable[[], Backbone], place: Callable[[Backbone], None]) -> Backbone:
    """A backbone whose text tower has prompts of some size."""
    backbone = make()
    with torch.no_grad():
        place(backbone)
        for i, values in enumerate(backbone.prompts.parameters()):
            values.normal_(std=0.7, generator=torch.Generator().manual_seed(i))
    return backbone


def by_hand(backbone: Any, text: str, place: Callable[[Backbone], None]) -> Tensor:
    """What CLIP's text tower, causal, gives of one text, with the prompts of `backbone` written out."""
    tower, values = backbone.model.text_model, [p.detach() for p in backbone.prompts.parameters()]
    x = tower.embeddings(input_ids=backbone.tokenise([text])["input_ids"])
    length = x.shape[1]
    for i, layer in enumerate(tower.encoder.layers):
        if place is deep or (place is shallow and i == 0):
            x = torch.cat([values[i][None], x], 1)
        attention, y = layer.self_attn, layer.layer_norm1(x)
        # not called: the layers have hooks
        parts = [F.linear(y, p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if place is prefixed:
            parts[1:] = [
                torch.cat([own[None], part], 1) for own, part in zip(values[0][i].chunk(2, -1), parts[1:], strict=True)
            ]
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
        n, more = q.shape[2], k.shape[2] - q.shape[2]
        seen = torch.arange(n + more)[None] <= torch.arange(n)[:, None] + more
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
        x = x + layer.mlp(layer.layer_norm2(x))
        if place is deep:
            x = x[:, M:]
    return backbone.model.text_projection(tower.final_layer_norm(x[:, -length:])[:, -1])


@PLACED
@torch.no_grad()
def test_text_tower_of_clip_with_prompts_equals_one_written_out(place: Any) -> None:
    backbone = prompted(pocket, place)
    for text in TEXTS:
        torch.testing.assert_close(backbone.encode_text([text]), by_hand(backbone, text, place), rtol=1e-4, atol=1e-4)


@PLACED
@MODELS
@torch.no_grad()
def test_an_embedding_with_prompts_depends_on_its_own_text_alone_by_any_attention(make: Any, place: Any) -> None:
    backbone, found = prompted(make, place), []
    for attention in ("eager", "sdpa"):
        backbone.set_attention(attention)
        together = backbone.encode_text(TEXTS)
        found.append(together)
        alone = torch.cat([backbone.encode_text([text]) for text in TEXTS])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert (together - make().encode_text(TEXTS)).abs().max() > 1e-2


@pytest.mark.parametrize("additive", [False, True])
def test_a_causal_mask_is_widened_to_that_of_more_tokens(additive: bool) -> None:
    for length in (2, 5):
        mask, wide = (torch.ones(n, n, dtype=torch.bool).tril() for n in (length, length + M))
        if additive:
            mask = torch.zeros(1, 1, length, length).masked_fill(~mask, torch.finfo(torch.float32).min)
            assert torch.equal(widened(mask, M)[0, 0] == 0, wide)
        else:
            assert torch.equal(widened(mask, M), wide)


def test_new_tokens_see_all_that_count_where_the_first_does() -> None:
    counts = torch.tensor([[True, True, False], [True, True, True]])
    both = counts[:, None, None, :].expand(-1, 1, 3, -1)
    expected = F.pad(counts, (2, 0), value=True)[:, None, None, :]
    assert torch.equal(widened(counts[:, None, None, :], 2), expected)
    assert torch.equal(widened(both, 2), expected.expand(-1, 1, 5, -1))
