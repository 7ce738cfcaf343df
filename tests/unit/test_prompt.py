"""VPT: shallow tokens pass through all blocks, deep ones through their own, and all tasks train them."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from perdure.adapters.prompt_tokens import PromptTokens
from perdure.backbones.preprocess import Preprocess
from perdure.backbones.timm import Timm
from perdure.backbones.tiny import Tiny
from perdure.core.caching import Cache
from perdure.core.learner import Core
from perdure.training.config import make_backbone, make_method, make_objective
from perdure.training.loop import TrainConfig, fit_task
from perdure.types import Task

DEEP = "prompt(tokens=3, deep=True)"


def grown(lab: Any, spec: str) -> Core:
    learner = lab.learner(spec)
    learner.grow(lab.stream().tasks[0])
    with torch.no_grad():
        for i, tokens in enumerate(learner.method.prompts):
            tokens.values.normal_(generator=torch.Generator().manual_seed(i))
    return learner


def by_hand(backbone: Tiny, image: Tensor, prompts: list[Tensor | None]) -> Tensor:
    """Features of the class token where block i reads `prompts[i]` too, and hands on the image's tokens only."""
    tower = backbone.vision
    patches = tower.patch(backbone.normalise(image)).flatten(2).transpose(1, 2)
    x = torch.cat([tower.token.expand(len(image), -1, -1), patches], 1) + tower.position
    for block, prompt in zip(tower.blocks, prompts, strict=True):
        added = x[:, :0] if prompt is None else prompt.expand(len(x), -1, -1)
        x = block(torch.cat([x, added], 1), None)[:, : x.shape[1]]
    return tower.norm(x[:, 0])


def test_each_block_of_the_deep_form_reads_tokens_of_its_own(lab: Any) -> None:
    learner = grown(lab, DEEP)
    image = lab.stream().tasks[0].test.__getitems__(range(4))["image"]
    values = [tokens.values for tokens in learner.method.prompts]
    assert [tuple(v.shape) for v in values] == [(3, 16)] * 2
    expected = by_hand(lab.backbone(), image, values)
    torch.testing.assert_close(learner.encode({"image": image}), expected, rtol=1e-5, atol=1e-5)


def test_chosen_blocks_alone_have_tokens(lab: Any) -> None:
    learner = grown(lab, "prompt(tokens=3, deep=True, blocks='1')")
    image = lab.stream().tasks[0].test.__getitems__(range(4))["image"]
    (tokens,) = learner.method.prompts
    expected = by_hand(lab.backbone(), image, [None, tokens.values])
    torch.testing.assert_close(learner.encode({"image": image}), expected, rtol=1e-5, atol=1e-5)


def test_the_shallow_form_lets_one_set_pass_through_all_blocks(lab: Any) -> None:
    learner, backbone = grown(lab, "prompt(tokens=3)"), lab.backbone()
    images = lab.stream().tasks[0].test.__getitems__(range(4))
    tokens = PromptTokens(3, 16)
    tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
    tokens.load_state_dict(learner.method.prompts[0].state_dict())
    assert len(learner.method.prompts) == 1
    assert torch.equal(learner.encode(images), backbone(images))
    assert not torch.allclose(learner.encode(images), grown(lab, DEEP).encode(images))


@pytest.mark.parametrize("blocks", ["1-2", "2"])
def test_training_above_kept_blocks_changes_nothing(blocks: str, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    def taught() -> dict[str, Tensor]:
        method = make_method(f"prompt(tokens=3, deep=True, blocks={blocks!r})")
        learner = Core(make_backbone("tiny(dim=16, depth=3)"), make_objective("classify"), method)
        learner.grow(lab.stream().tasks[0])
        assert learner.constant_blocks == int(blocks[0])
        fit_task(learner, learner.task, TrainConfig(epochs=2, batch_size=8, lr=1e-2))
        return learner.learnt_state()

    kept = taught()
    monkeypatch.setattr(Cache, "lower_blocks", lambda _cache, data: data)
    plain = taught()
    assert [name for name in plain if not torch.equal(kept[name], plain[name])] == []


@pytest.mark.parametrize("spec", ["prompt", DEEP])
def test_every_task_goes_on_with_the_same_tokens(spec: str, lab: Any) -> None:
    learner, stream = lab.learner(spec), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    before = {n: p.detach().clone() for n, p in learner.method.named_parameters()}
    assert before
    assert {f"method.{n}" for n in before} <= learner.shared().keys()
    lab.teach(learner, stream.tasks[1:2])
    after = dict(learner.method.named_parameters())
    assert after.keys() == before.keys()
    assert all((after[n] - before[n]).abs().max() > 1e-3 for n in before)


@pytest.mark.parametrize("spec", ["prompt", DEEP, "l2p(reads='class')"])
def test_attention_that_counts_an_images_tokens_is_refused(spec: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=28, depth=1)
    backbone = Timm(model, Preprocess(size=28, resize=28, interpolation="bilinear"), "timm(name='eva')")
    learner = Core(backbone, make_objective("classify"), make_method(spec))
    with pytest.raises(
        ValueError, match=r"^timm\(name='eva'\): no token can join those of an image \(.*\); use another"
    ):
        learner.grow(Task(0, "a", (0, 1), ("x", "y"), 1))
