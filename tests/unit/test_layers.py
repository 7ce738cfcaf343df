"""Features of several layers: what they are, how wide, and that they cost nothing where nothing is adapted."""

import inspect
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.api.learner import Learner
from perdure.backbones import BACKBONES
from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import former_parts, make_backbone, with_former
from perdure.training.run import run


def grown(lab: Any, method: str, **where: Any) -> Core:
    bench = lab.but(**where)
    learner = bench.learner(method)
    learner.grow(bench.stream().tasks[0])
    return learner


def test_features_are_the_normalised_tokens_of_the_last_blocks(lab: Any) -> None:
    learner = grown(lab, "probe", layers=2)
    images = lab.stream().tasks[0].test.__getitems__(range(4))
    tower = learner.backbone.vision
    seen: list[torch.Tensor] = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _b, _a, out: seen.append(out))
    features = learner.encode(images)
    wanted = [part for hidden in seen[-2:] for part in (hidden[:, 0], hidden[:, 1:].mean(1))]
    torch.testing.assert_close(features, torch.cat([F.layer_norm(p, p.shape[1:]) for p in wanted], 1))
    assert features.shape[1] == learner.backbone.dim == learner.objective.heads[0].in_features == 64


def test_without_means_there_is_one_token_a_block(lab: Any) -> None:
    backbone = tiny(layers=2, means=False)
    assert backbone(lab.stream().tasks[0].test.__getitems__(range(4))).shape == (4, backbone.dim) == (4, 64)
    assert grown(lab, "ncm", objective="zeroshot", layers=1).backbone.dim == 32


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"mllm", "tiny_mllm"}))
def test_every_backbone_takes_the_option(name: str) -> None:
    assert {"layers", "means"} <= inspect.signature(BACKBONES[name]).parameters.keys()


@pytest.mark.parametrize("spec", ["pocket(layers=2)", "tiny(dim=8, layers=1, means=False)"])
def test_the_spec_of_a_backbone_that_reads_layers_rebuilds_it(spec: str) -> None:
    backbone = make_backbone(spec)
    again = make_backbone(backbone.spec)
    said = [(each.spec, each.layers, each.means, each.dim) for each in (backbone, again)]
    assert said[0] == said[1]


def test_features_are_computed_once_when_nothing_is_adapted(lab: Any) -> None:
    assert grown(lab, "align", layers=1).constant_encoder
    assert not grown(lab, "lora(rank=2)", layers=1).constant_encoder


def test_only_blocks_below_those_that_are_read_are_computed_once(lab: Any) -> None:
    assert [grown(lab, "lora(rank=2, blocks='1')", layers=count).constant_blocks for count in (None, 1, 2)] == [1, 1, 0]


def test_hooks_are_gone_after_each_pass(lab: Any) -> None:
    learner = grown(lab, "probe", layers=2)
    learner.encode(lab.stream().tasks[0].test.__getitems__(range(4)))
    assert not any(module._forward_hooks for module in learner.backbone.modules())


@pytest.mark.parametrize(
    "former", ["layers(last=1) + align(epochs=1)", "lora(rank=2) + layers(last=2, means=False) + ncm"]
)
def test_the_former_part_of_a_sum_sets_the_option_with_equal_scores(former: str, lab: Any, tmp_path: Path) -> None:
    config = lab.config(former)
    rest = " + ".join(part for part in former.split(" + ") if "layers" not in part)
    new = replace(config, method=rest, backbone=with_former(config.backbone, "backbone", former))
    before, after = run(config, tmp_path / "old"), run(new, tmp_path / "new")
    assert before["matrix"] == after["matrix"]
    images = (torch.rand(6, 3, 32, 32) * 255).to(torch.uint8)
    one, other = (Learner.load(tmp_path / name).predict(images) for name in ("old", "new"))
    assert one == other
    assert f"--method {shlex.quote(rest)} --backbone 'tiny(" in former_parts(config)


def test_more_layers_than_blocks_and_class_names_are_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^backbone 'tiny', option layers=9: expected 1 to 2, the blocks of tiny"):
        make_backbone("tiny(layers=9)")
    with pytest.raises(ValueError, match=r"means=False has no effect without layers: leave it out$"):
        make_backbone("tiny(means=False)")
    with pytest.raises(ValueError, match=r"class names and captions cannot be compared with: use --objective class"):
        lab.but(objective="zeroshot", layers=1).learner("probe")
