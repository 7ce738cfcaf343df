"""Features of several layers: what they are, how wide, and that they cost nothing where nothing is adapted."""

from typing import Any

import torch
from torch.nn import functional as F

from perdure.core.learner import Core


def grown(lab: Any, method: str, **where: Any) -> Core:
    bench = lab.but(**where)
    learner = bench.learner(method)
    learner.grow(bench.stream().tasks[0])
    return learner


def test_features_are_the_normalised_tokens_of_the_last_blocks(lab: Any) -> None:
    learner = grown(lab, "layers(last=2)")
    images = lab.stream().tasks[0].test.__getitems__(range(4))
    tower = learner.backbone.vision
    seen: list[torch.Tensor] = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _b, _a, out: seen.append(out))
    features = learner.encode(images)
    wanted = [part for hidden in seen[-2:] for part in (hidden[:, 0], hidden[:, 1:].mean(1))]
    torch.testing.assert_close(features, torch.cat([F.layer_norm(p, p.shape[1:]) for p in wanted], 1))
    assert features.shape[1] == learner.dim == learner.objective.heads[0].in_features == 64


def test_without_means_there_is_one_token_a_block(lab: Any) -> None:
    learner = grown(lab, "layers(last=2, means=False)")
    images = lab.stream().tasks[0].test.__getitems__(range(4))
    assert learner.encode(images).shape == (4, learner.dim) == (4, 32)
    assert grown(lab, "layers(last=1) + ncm", objective="zeroshot").dim == 32


def test_features_are_computed_once_when_nothing_is_adapted(lab: Any) -> None:
    assert grown(lab, "layers(last=1) + align").constant_encoder
    assert not grown(lab, "lora(rank=2) + layers(last=1)").constant_encoder


def test_hooks_are_gone_after_each_pass(lab: Any) -> None:
    learner = grown(lab, "layers(last=2)")
    learner.encode(lab.stream().tasks[0].test.__getitems__(range(4)))
    assert not any(module._forward_hooks for module in learner.backbone.modules())
