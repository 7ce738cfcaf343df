"""The CLIP family: OpenCLIP, Chinese-CLIP, SigLIP, ALIGN and dual encoders compute what their own library computes."""

import copy
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip as library
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import detach, fold
from perdure.adapters.low_rank import LowRankSet
from perdure.adapters.prefix import Prefix
from perdure.backbones import BACKBONES, Backbone
from perdure.backbones.open_clip import locate_model
from perdure.backbones.open_clip_attention import Attention
from perdure.core.learner import Core
from perdure.export.model import export
from perdure.mechanisms.prompting import attach_prefix
from perdure.methods.finetune import Finetune
from perdure.methods.lora import LoRA
from perdure.objectives.retrieve import Retrieve
from perdure.objectives.zeroshot import ZeroShot
from perdure.options.spec import build, parse_one
from perdure.training.config import make_method
from perdure.types import Nothing, Task

LENGTH = 24
TEXTS = ["a cat", "two small dogs on a red carpet, seen from above", "一只猫"]
OPEN: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}
TO_SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
OPENS: dict[str, dict[str, Any]] = {
    "open": OPEN,
    "open_quick": OPEN | {"quick_gelu": True},
    "open_custom": OPEN | {"custom_text": True, "text_cfg": OPEN["text_cfg"] | {"pool_type": "eos", "eos_id": 49407}},
    "open_siglip": OPEN | {"custom_text": True, "init_logit_bias": -10, "text_cfg": OPEN["text_cfg"] | TO_SIGLIP},
    "open_timm_bert": OPEN
    | {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": {
            "hf_model_name": "BERT",  # replaced by the path of a folder
            "hf_tokenizer_name": "BERT",
            "context_length": LENGTH,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
        },
    },
}
FACTORY = {"chinese_clip": "chinese_clip", "dual": "dual"} | dict.fromkeys(OPENS, "open_clip")
HUGGING = ["clip", "siglip", "align", "chinese_clip", "dual"]
EVERY = [*HUGGING, *OPENS]
DRAWN = [0.0704130, 0.0129233, -0.0044109]  # what a new text projection of width 32 begins with
ADAPTED = [kind for kind in EVERY if kind != "align"]  # in both towers


@pytest.fixture(scope="module")
def saved(saved: Any) -> dict[str, Path]:
    """Folders as the libraries write them, of small random models."""
    for kind, config in OPENS.items():
        folder = saved[kind] = saved.root / kind
        folder.mkdir()
        config = json.loads(json.dumps(config).replace('"BERT"', json.dumps(str(saved["bert"]))))
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"]["hf_model_pretrained"] = False
            saved.write_words(folder)
        facts = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}}
        (folder / "open_clip_config.json").write_text(json.dumps(facts))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = library.create_model(f"local-dir:{folder}")
            saved.shake(model)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return saved


@functools.cache
def original(folder: Path) -> Any:
    """The OpenCLIP model as its library makes it; not to be changed."""
    return library.create_model(f"local-dir:{folder}").eval()


def read(kind: str, folder: Path) -> Backbone:
    option = "name" if kind in OPENS else "path"
    return BACKBONES[FACTORY.get(kind, "clip")](**{option: str(folder)})


once = functools.cache(read)


def load(kind: str, saved: dict[str, Path]) -> Backbone:
    """A backbone to be changed: a copy of the one that was read, but for its tokenizer, which takes longest."""
    backbone = once(kind, saved[kind])
    return copy.deepcopy(backbone, {id(backbone.tokenizer): backbone.tokenizer})


def pixels(backbone: Backbone, n: int = 3) -> dict[str, Tensor]:
    side = backbone.preprocess.size
    return {"image": torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()}


def plain(kind: str, folder: Path, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of images and texts, and the scale, by the library of the model itself."""
    with torch.no_grad():
        if kind in OPENS:
            model = original(folder)
            ids = library.get_tokenizer(f"local-dir:{folder}")(TEXTS)
            return model.encode_image(values), model.encode_text(ids), model.logit_scale.exp()
        model = transformers.AutoModel.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        how: dict[str, Any] = {"truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        if kind == "siglip":
            tokens = {"input_ids": tokenizer(TEXTS, padding="max_length", **how).input_ids}
        else:
            tokens = tokenizer(TEXTS, padding=True, **how)
        image, text = model.get_image_features(values).pooler_output, model.get_text_features(**tokens).pooler_output
        return image, text, 1 / model.temperature if kind == "align" else model.logit_scale.exp()


def logits(backbone: Backbone) -> Tensor:
    image, text = backbone(pixels(backbone)), backbone.encode_text(TEXTS)
    return backbone.logit_scale * F.normalize(image) @ F.normalize(text).T


def low_rank(backbone: Backbone, at: str, tower: Any, up: float) -> LowRankSet:
    """LoRA whose output factors are normal with deviation `up`."""
    adapters = LowRankSet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapters.open(backbone, backbone.sites(at, tower=tower), 2)
        for adapter in adapters:
            for factor in adapter.up:
                factor.data += up * torch.randn(factor.shape)
    return adapters


# What they compute


@pytest.mark.parametrize("kind", EVERY)
def test_embeddings_of_both_towers_are_those_of_the_models_own_library(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    batch = pixels(backbone)
    image, text, scale = plain(kind, saved[kind], backbone.normalise(batch["image"]))
    for attention in ("eager", "sdpa"):
        backbone.set_attention(attention)
        torch.testing.assert_close(backbone(batch), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(backbone.encode_text(TEXTS), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone.logit_scale, scale.reshape(()))
    assert image.shape[1] == text.shape[1] == backbone.dim
    assert image.std(0).min() > 1e-4  # a model that gives the same for all images would pass
    assert text.std(0).min() > 1e-4


@pytest.mark.parametrize("kind", EVERY)
def test_backbone_is_frozen_and_its_spec_rebuilds_it(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    again = build(parse_one(backbone.spec), BACKBONES, "backbone")
    assert (again.spec, again.fingerprint()) == (backbone.spec, backbone.fingerprint())
    assert again.preprocess == backbone.preprocess
    # close, not equal: a copy lies elsewhere in memory, and kernels round by alignment
    torch.testing.assert_close(
        logits(copy.deepcopy(backbone, {id(backbone.tokenizer): backbone.tokenizer})),
        logits(backbone),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", EVERY)
def test_both_towers_switch_their_attention(
    kind: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = load(kind, saved)
    fused: list[int] = []
    true = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or true(*a, **k))
    for implementation in ("eager", "sdpa"):
        backbone.set_attention(implementation)
        calls = []
        for use in (lambda: backbone(pixels(backbone)), lambda: backbone.encode_text(TEXTS)):
            fused.clear()
            use()
            calls.append(len(fused))
        # SigLIP's pooling head and ALIGN (which transformers computes eagerly only) keep what they have.
        blocks = [len(backbone.blocks(tower)) if backbone.has_blocks(tower) else 0 for tower in ("vision", "text")]
        expected = [0, 0] if implementation == "eager" or kind == "align" else blocks
        assert calls == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", EVERY)
def test_preprocessing_is_that_of_the_models_own_library(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (250, 274, 3), dtype=np.uint8)
    )  # an odd margin to crop
    if kind in OPENS:
        facts = library.transform.PreprocessCfg(**original(saved[kind]).visual.preprocess_cfg)
        theirs = library.transform.image_transform_v2(facts, is_train=False)(image)
    else:
        processor = transformers.AutoImageProcessor.from_pretrained(saved[kind], backend="pil")
        theirs = torch.from_numpy(np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0]))
    ours = backbone.normalise(backbone.preprocess(image)[None])[0]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)


def test_efficientnets_second_division_is_followed(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["align"], tmp_path / "align")
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text())
    norm = {"do_normalize": True, "include_top": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    file.write_text(json.dumps(facts | norm))
    test_preprocessing_is_that_of_the_models_own_library("align", {"align": folder})
    file.write_text(json.dumps(facts | {"rescale_offset": False}))
    with pytest.raises(ValueError, match=r"rescale_factor=.*expected 1/255"):
        read("align", folder)


# Texts


@pytest.mark.parametrize("kind", EVERY)
def test_mask_says_which_tokens_count_while_texts_are_encoded_and_only_then(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    seen: list[tuple[Tensor | None, Tensor]] = []
    first = backbone.get_submodule(backbone.blocks("text")[0])
    handle = first.register_forward_pre_hook(lambda _, args: seen.append((backbone.text_mask, args[0])))
    tokens = backbone.tokenise(TEXTS)
    assert all(not value.is_floating_point() and len(value) == len(TEXTS) for value in tokens.values())
    backbone.encode_text(TEXTS)
    assert backbone.text_mask is None
    backbone(pixels(backbone))
    handle.remove()
    ((mask, hidden),) = seen
    if kind in ("siglip", "open_siglip"):
        assert mask is None  # they read their padding
        return
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.shape == hidden.shape[:2]
    # Without padding in front or between, and with as many tokens as the text has.
    lengths = [next(iter(backbone.tokenise([text]).values())).shape[1] for text in TEXTS]
    assert mask.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1
    assert torch.equal(mask, torch.arange(mask.shape[1])[None] < torch.tensor(lengths)[:, None])


def test_mask_is_gone_after_an_error() -> None:
    backbone = BACKBONES["tiny"](text=True)
    with pytest.raises(IndexError):
        backbone.encode_tokens({"ids": torch.full((1, 2), 999)})
    assert backbone.text_mask is None


@pytest.mark.parametrize("kind", EVERY)
def test_text_embedding_depends_neither_on_neighbours_nor_on_what_is_cut_off(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    long = "a photograph of a very small cat " * 20
    together = backbone.encode_text(["a cat", long, "a dog"])
    torch.testing.assert_close(together[:1], backbone.encode_text(["a cat"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:2], backbone.encode_text([long + " and more"]), atol=1e-5, rtol=0)
    assert (together[0] - together[2]).abs().max() > 1e-4
    assert backbone.encode_text([]).shape == (0, backbone.dim)


def test_texts_of_a_roberta_stop_where_its_positions_do(saved: dict[str, Path]) -> None:
    backbone = BACKBONES["dual"](vision=str(saved["vit"]), text=str(saved["roberta"]))
    ids = backbone.tokenise(["cat " * 50])["input_ids"]
    assert ids.shape == (1, LENGTH - 2)  # its positions begin behind the number of the padding token
    backbone.encode_text(["cat " * 50])


def test_padding_of_openclip_is_cut_where_it_has_no_effect(saved: dict[str, Path]) -> None:
    assert load("open", saved).tokenise(["a cat"])["ids"].shape == (1, 4)
    assert load("open_siglip", saved).tokenise(["a cat"])["ids"].shape == (1, LENGTH)


# Adapters


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_at_zero_leave_the_logits_and_others_change_both_towers(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = logits(backbone).detach()
    sites = backbone.sites("qkvo,mlp", tower="both")
    assert len(sites) == 6 * (len(backbone.blocks()) + len(backbone.blocks("text")))
    low_rank(backbone, "qkvo,mlp", "both", 0.0)
    torch.testing.assert_close(logits(backbone), before, atol=1e-5, rtol=0)
    detach(backbone)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    batch = pixels(backbone)
    for at in ("q", "k", "v", "o", "fc1", "fc2"):
        for tower, use in (("vision", lambda: backbone(batch)), ("text", lambda: backbone.encode_text(TEXTS))):
            first = use()
            low_rank(backbone, at, tower, 1.0)
            changed = use().detach()
            assert (changed - first).abs().max() > 1e-5, (at, tower)
            fold(backbone, branches=True)
            torch.testing.assert_close(use(), changed, atol=1e-4, rtol=1e-4)
            detach(backbone)
            assert torch.equal(use(), first)


@pytest.mark.parametrize("kind", ADAPTED)
def test_gradients_reach_every_adapter_of_both_towers(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    adapters = low_rank(backbone, "qkvo,mlp", "both", 0.1)
    logits(backbone).log_softmax(1)[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())


@pytest.mark.parametrize("kind", ADAPTED)
def test_blocks_can_be_skipped(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    batch = pixels(backbone)
    expected = backbone(batch)
    hidden = backbone.before(1, batch)
    first = backbone.get_submodule(backbone.sites("o")[0].layer)
    handle = first.register_forward_pre_hook(lambda *_: pytest.fail("the first block ran"))
    with backbone.entering(1, hidden):
        torch.testing.assert_close(backbone(batch), expected, atol=1e-6, rtol=0)
    handle.remove()
    with backbone.entering(1, hidden.flip(0)):
        torch.testing.assert_close(backbone(batch).flip(0), expected, atol=1e-6, rtol=0)


def test_adapters_of_align_stand_in_its_text_tower_only(saved: dict[str, Path]) -> None:
    backbone = load("align", saved)
    before = logits(backbone).detach()
    for tower in ("vision", "both"):
        with pytest.raises(ValueError, match=r"the vision tower has no stack of .* use tower='text'") as caught:
            backbone.sites("kv", tower=tower)
        assert "\n" not in str(caught.value)
    assert not backbone.has_blocks()
    assert backbone.has_blocks("text")
    low_rank(backbone, "qkvo,mlp", "text", 0.0)
    torch.testing.assert_close(logits(backbone), before, atol=1e-5, rtol=0)
    detach(backbone)
    low_rank(backbone, "qkvo,mlp", "text", 0.1)
    assert (logits(backbone) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", EVERY)
def test_tower_parameters_are_all_but_the_scale(kind: str, saved: dict[str, Path]) -> None:
    backbone = load(kind, saved)
    seen, heard = backbone.tower_parameters("vision"), backbone.tower_parameters("text")
    assert not seen.keys() & heard.keys()
    assert backbone.tower_parameters("both") == seen | heard
    left = {name for name, _ in backbone.named_parameters()} - seen.keys() - heard.keys()
    scale = "model.temperature" if kind == "align" else "model.logit_scale"
    assert left == {scale} | ({"model.logit_bias"} if "siglip" in kind else set())
    for parameters, use in ((seen, lambda: backbone(pixels(backbone))), (heard, lambda: backbone.encode_text(TEXTS))):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        use().square().sum().backward()
        touched = {name for name, p in backbone.named_parameters() if p.grad is not None}
        assert touched <= parameters.keys()
        # A pooling layer that the model has but does not read stays without.
        assert all("pooler" in name for name in parameters.keys() - touched)
        backbone.requires_grad_(False)
        backbone.zero_grad()


@pytest.mark.parametrize("kind", ["open_quick", "chinese_clip"])
def test_lora_learns_in_both_towers(kind: str, saved: dict[str, Path]) -> None:
    learner = Core(load(kind, saved), ZeroShot(), LoRA(rank=2, at="qkvo,mlp", tower="both"))
    image = pixels(learner.backbone, 6)["image"]
    batch = {"image": image, "label": torch.arange(6) % 2}
    learner.grow(Task(index=0, name="pets", classes=(0, 1), names=("cat", "dog"), train=Nothing(), test=Nothing()))
    learner.train()
    learner.prepare()
    optimizer = torch.optim.Adam(learner.trainable().values(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = learner.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.abs().sum() > 0 for name, p in learner.trainable().items() if ".up." in name)


# OpenCLIP


def test_fused_attention_is_unpacked_with_its_weights(saved: dict[str, Path]) -> None:
    backbone, fused = load("open", saved), original(saved["open"])
    assert not any(isinstance(module, nn.MultiheadAttention) for module in backbone.modules())
    assert sum(isinstance(module, Attention) for module in backbone.modules()) == 5
    theirs = fused.visual.transformer.resblocks[1].attn
    ours = backbone.model.visual.transformer.resblocks[1].attn
    assert torch.equal(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]), theirs.in_proj_weight)
    assert torch.equal(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]), theirs.in_proj_bias)
    assert torch.equal(ours.out_proj.weight, theirs.out_proj.weight)
    assert not any("in_proj" in name for name in backbone.state_dict())


def test_quick_gelu_is_kept_and_another_activation_would_show(saved: dict[str, Path], tmp_path: Path) -> None:
    quick = load("open_quick", saved)
    folder = shutil.copytree(saved["open_quick"], tmp_path / "plain")
    facts = json.loads((folder / "open_clip_config.json").read_text())
    facts["model_cfg"].pop("quick_gelu")
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    plain_gelu = BACKBONES["open_clip"](name=str(folder))
    assert quick.fingerprint() == plain_gelu.fingerprint()
    assert (quick(pixels(quick)) - plain_gelu(pixels(quick))).abs().max() > 1e-4
    assert (quick.encode_text(TEXTS) - plain_gelu.encode_text(TEXTS)).abs().max() > 1e-4
    assert any(type(module).__name__ == "QuickGELU" for module in quick.modules())


def test_prefixes_join_the_unpacked_attention(saved: dict[str, Path]) -> None:
    backbone, fused = load("open", saved), copy.deepcopy(original(saved["open"]))
    learner, prefix = Core(backbone, ZeroShot(), LoRA(rank=2)), Prefix()
    batch = pixels(backbone)
    before = backbone(batch)
    attach_prefix(learner, prefix, "0-1")
    given = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(4))
    # torch's own attention knows a prefix of one token, under another name.
    for block, values in zip(fused.visual.transformer.resblocks, given, strict=True):
        block.attn.bias_k, block.attn.bias_v = (nn.Parameter(each[None]) for each in values.chunk(2, 1))
    with torch.no_grad():
        expected = fused.encode_image(backbone.normalise(batch["image"]))
    with prefix.using(list(given)):
        torch.testing.assert_close(backbone(batch), expected, atol=1e-5, rtol=0)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(backbone(batch), before)


def test_model_is_found_by_folder_by_config_and_by_name(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved["open"]
    whole = load("open", saved)
    weights = str(shutil.copy(folder / "open_clip_model.safetensors", tmp_path / "w.safetensors"))
    config = tmp_path / "small-quickgelu.json"
    config.write_text(json.dumps(OPENS["open_quick"]))
    by_config = BACKBONES["open_clip"](name=str(config))
    assert by_config.spec == f"open_clip(name={str(config)!r})"
    assert by_config.fingerprint() == whole.fingerprint()
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"small-quickgelu": OPENS["open_quick"]})
    by_name = BACKBONES["open_clip"](name="small-quickgelu", checkpoint=weights)
    assert by_name.spec == f"open_clip(name='small-quickgelu', checkpoint={weights!r})"
    torch.testing.assert_close(logits(by_name), logits(by_config))
    assert by_name.preprocess.mean == library.OPENAI_DATASET_MEAN
    assert (
        BACKBONES["open_clip"](name="small-quickgelu", checkpoint=weights, input_norm="none").preprocess.std == (1,) * 3
    )


def test_downloaded_openclip_is_read_without_the_hub(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--model"
    shutil.copytree(saved["open"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbone = BACKBONES["open_clip"](name="hf-hub:some/model")
    assert backbone.spec == "open_clip(name='hf-hub:some/model')"
    assert backbone.fingerprint() == load("open", saved).fingerprint()
    assert "the hub gave no model" in refusal("open_clip", name="hf-hub:some/other")


def test_known_names_bring_the_preprocessing_that_all_their_weights_share() -> None:
    from perdure.backbones.open_clip import _usual

    assert _usual("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert _usual("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert "mean" not in _usual("ViT-L-14")  # one of many was trained with other numbers
    assert _usual("ViT-S-32-alt") == {}


# Two encoders that have never met


def test_pair_of_encoders_keeps_their_weights_and_draws_what_is_new_alike_in_every_process(
    saved: dict[str, Path],
) -> None:
    options = {"vision": str(saved["vit"]), "text": str(saved["bert"])}
    torch.manual_seed(5)
    pair = BACKBONES["dual"](**options)
    assert pair.spec == f"dual(vision={options['vision']!r}, text={options['text']!r})"
    assert pair.dim == 512
    bert = transformers.BertModel.from_pretrained(saved["bert"]).state_dict()
    own = pair.model.text_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in bert.items())
    torch.manual_seed(6)
    assert BACKBONES["dual"](**options).fingerprint() == pair.fingerprint()
    drawn = pair.model.text_projection.weight
    assert drawn[0, :3].tolist() == pytest.approx(DRAWN, rel=1e-4)  # whatever process asks
    assert drawn.std() == pytest.approx(32**-0.5, rel=0.05)
    # The classifier that the ViT was saved from has no pooling layer.
    parameters = pair.tower_parameters("both")
    assert {"model.visual_projection.weight", "model.text_projection.weight"} <= parameters.keys()
    assert parameters["model.vision_model.pooler.dense.weight"].std() > 0.1
    low_rank(pair, "qkvo,mlp", "both", 0.1)


@pytest.mark.parametrize(("vision", "text"), [("clip", "clip"), ("siglip", "roberta"), ("chinese_clip", "bert")])
def test_towers_of_other_pairs_are_taken_over(vision: str, text: str, saved: dict[str, Path]) -> None:
    pair = BACKBONES["dual"](vision=str(saved[vision]), text=str(saved[text]))
    assert len(pair.sites("qkvo,mlp", tower="both")) == 6 * 5
    whole = load(vision, saved)
    batch = pixels(pair)
    with torch.no_grad():
        pooled = whole.model.vision_model(whole.normalise(batch["image"])).pooler_output
        torch.testing.assert_close(pair(batch), pair.model.visual_projection(pooled), atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.encode_text(TEXTS)[:1], pair.encode_text(TEXTS[:1]), atol=1e-5, rtol=0)


# What cannot be read


def refusal(family: str, **options: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        BACKBONES[family](**options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_wrong_kinds_are_told_the_right_name(saved: dict[str, Path]) -> None:
    def folder(kind: str) -> str:
        return str(saved[kind])

    assert "is a clip model: write clip(path=...)" in refusal("chinese_clip", path=folder("clip"))
    assert "write dual(path=...)" in refusal("chinese_clip", path=folder("dual"))
    assert "write vision(path=...)" in refusal("chinese_clip", path=folder("vit"))
    assert "write chinese_clip(path=...)" in refusal("dual", path=folder("chinese_clip"))
    assert "write open_clip(name=" in refusal("clip", path=folder("open"))
    assert "give path=" in refusal("dual")
    assert "give path=" in refusal("dual", vision=folder("vit"))
    assert "give path=" in refusal("dual", path=folder("dual"), text=folder("bert"))
    assert "text='./nowhere': no such folder" in refusal("dual", vision=folder("vit"), text="./nowhere")
    for text in ("vit", "chinese_clip"):
        assert "cannot be the text tower" in refusal("dual", vision=folder("vit"), text=folder(text))
    assert "cannot be the vision tower" in refusal("dual", vision=folder("align"), text=folder("bert"))


def test_siglip_2_of_variable_resolution_is_refused_and_one_of_fixed_resolution_is_a_siglip(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved["siglip"], tmp_path / "naflex")
    facts = json.loads((folder / "config.json").read_text())
    assert facts["model_type"] == "siglip"  # as google/siglip2-base-patch16-224 says too
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    assert "SigLIP 2 of variable resolution: take one of fixed" in refusal("clip", path=str(folder))


def test_openclip_refuses_what_it_cannot_read(saved: dict[str, Path], tmp_path: Path) -> None:
    weights = str(saved["open"] / "open_clip_model.safetensors")
    assert "did you mean ViT-B-32" in refusal("open_clip", name="ViT-B/32")
    assert "add checkpoint=" in refusal("open_clip", name="ViT-B-32")
    assert "only .safetensors is read" in refusal("open_clip", name="ViT-B-32", checkpoint="openai.pt")
    assert "no such file" in refusal("open_clip", name="ViT-B-32", checkpoint="nowhere.safetensors")
    assert "there is no open_clip_config.json" in refusal("open_clip", name=str(tmp_path))
    assert "does not fit the model" in refusal("open_clip", name=str(saved["open_siglip"]), checkpoint=weights)
    assert "a CoCa" in refusal("open_clip", name="coca_ViT-B-32", checkpoint=weights)
    assert "expected 'model'" in refusal("open_clip", name="ViT-B-32", input_norm="imagenet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": OPEN["vision_cfg"] | {"layrs": 3}}, "OpenCLIP cannot build it"),
        ({"vision_cfg": OPEN["vision_cfg"] | {"image_size": [32, 40]}}, "does not fit|expected a square"),
        ({"vision_cfg": OPEN["vision_cfg"] | {"qk_norm": True}}, "normalised or scaled heads"),
        ({"text_cfg": OPEN["text_cfg"] | {"hf_tokenizer_name": "some"}}, "no usable tokenizer"),
        ({"text_cfg": OPEN["text_cfg"] | {"layers": 2}}, "is not in the model"),
        ({"embed_dim": 8}, "does not fit the model"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved["open"], tmp_path / "open")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN | change}))
    with pytest.raises(ValueError, match=message) as caught:
        BACKBONES["open_clip"](name=str(folder))
    assert "\n" not in str(caught.value)


def test_weights_beside_the_config_must_be_clear_and_safe(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["open"], tmp_path / "open")
    weights = folder / "open_clip_model.safetensors"
    save_file({"of": torch.zeros(1)}, folder / "model.safetensors")  # the same model, as another library has it
    assert BACKBONES["open_clip"](name=str(folder)).fingerprint() == load("open", saved).fingerprint()
    weights.rename(folder / "other.safetensors")
    assert "has 2 safetensors files" in refusal("open_clip", name=str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "other.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    assert "a pickle" in refusal("open_clip", name=str(folder))
    (folder / "open_clip_pytorch_model.bin").unlink()
    assert "has no open_clip_model.safetensors" in refusal("open_clip", name=str(folder))
    weights.write_bytes(b"nonsense")
    assert "damaged or not safetensors" in refusal("open_clip", name=str(folder))
    (folder / "open_clip_config.json").write_text("{")
    assert "open_clip_config.json is damaged: it cannot be read as JSON" in refusal("open_clip", name=str(folder))
    (folder / "open_clip_config.json").write_text("{}")
    assert "describes no model of OpenCLIP" in refusal("open_clip", name=str(folder))


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install 'perdure[open_clip]'" in refusal("open_clip", name="ViT-B-32")


def test_reading_leaves_the_random_state_alone(saved: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    backbones: list[Callable[[], object]] = [lambda kind=kind: once.__wrapped__(kind, saved[kind]) for kind in EVERY]
    backbones.append(lambda: BACKBONES["dual"](vision=str(saved["vit"]), text=str(saved["roberta"])))
    for read in backbones:
        read()
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    "spec",
    [
        "prompt(tokens=3, tower='text')",  # as those of l2p
        "prefix(length=3, tower='text')",  # as those of dualprompt and coda_prompt
        "moe_adapters(noise=0, tower='text')",
    ],
)
@torch.no_grad()
def test_texts_with_prompts_or_experts_depend_on_themselves_alone(kind: str, spec: str, saved: dict[str, Path]) -> None:
    learner = Core(load(kind, saved), ZeroShot(), make_method(spec))
    backbone = learner.backbone
    before = backbone.encode_text(TEXTS)
    learner.grow(Task(0, "a", (0, 1), ("cat", "dog"), 1))
    for prompt in learner.method.parameters():
        prompt.normal_(generator=torch.Generator().manual_seed(0))
    learner.train()  # experts are of tasks that have been learnt, or of the one in training
    for attention in ("eager", "sdpa"):
        backbone.set_attention(attention)
        together = learner.embed_texts(TEXTS)
        torch.testing.assert_close(together, torch.cat([learner.embed_texts([t]) for t in TEXTS]), rtol=0, atol=1e-5)
    assert (together - before).abs().max() > 1e-3


# Export


@pytest.mark.parametrize("kind", OPENS)
def test_export_of_openclip_is_read_by_its_library_and_by_us(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    learner = Core(load(kind, saved), ZeroShot(), LoRA(rank=2, tower="both"))
    learner.grow(Task(0, "a", (0, 1), ("cat", "dog"), 1))
    for name, factor in learner.method.named_parameters():
        factor.data += 0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name)))
    learner.learnt = 1
    folder = export(learner, tmp_path / "it", "merged")
    batch = pixels(learner.backbone)
    with learner.inference():
        seen, read = learner.encode(batch), learner.backbone.encode_text(TEXTS)
    assert (seen - load(kind, saved)(batch)).abs().max() > 1e-3
    with torch.no_grad():
        theirs = original(folder)
        tokens = library.get_tokenizer(f"local-dir:{folder}")(TEXTS)
        torch.testing.assert_close(
            theirs.encode_image(learner.backbone.normalise(batch["image"])), seen, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(theirs.encode_text(tokens), read, atol=1e-5, rtol=0)
    ours = BACKBONES["open_clip"](name=str(folder))
    assert ours.preprocess == learner.backbone.preprocess
    torch.testing.assert_close(ours(batch), seen, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("vision", "text"), [("vit", "bert"), ("clip", "clip"), ("siglip", "roberta")])
@pytest.mark.parametrize("norm", ["model", "none"])
def test_export_of_a_pair_is_read_by_transformers_and_by_us(
    vision: str, text: str, norm: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    (saved[vision] / "LICENSE").write_text("of what sees")
    backbone = BACKBONES["dual"](vision=str(saved[vision]), text=str(saved[text]), input_norm=norm)
    learner = Core(backbone, Retrieve(), Finetune(tower="both"))
    learner.grow(Task(0, "a", (0,), ("all",), 1))
    with torch.no_grad():
        for parameter in learner.trainable().values():
            parameter.add_(0.01)
    learner.learnt = 1
    folder = export(learner, tmp_path / "it", "merged")
    batch = pixels(backbone)
    with learner.inference():
        seen, read = learner.encode(batch), learner.embed_texts(TEXTS)
        theirs = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
        limit = backbone.tokenise(["long " * 50])["input_ids"].shape[1]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        torch.testing.assert_close(theirs.get_text_features(**tokens).pooler_output, read, atol=1e-5, rtol=0)
        values = backbone.normalise(batch["image"])
        torch.testing.assert_close(
            theirs.get_image_features(pixel_values=values).pooler_output, seen, atol=1e-5, rtol=0
        )
    ours = BACKBONES["dual"](path=str(folder))
    assert ours.preprocess == backbone.preprocess
    torch.testing.assert_close(ours(batch), seen, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(TEXTS), read, atol=1e-5, rtol=0)
    assert (folder / "vision-LICENSE").read_text() == "of what sees"
    with pytest.raises(ValueError, match=r"was put together here, no folder has it for a LoRA: export to 'merged'"):
        export(learner, tmp_path / "other", "peft")


def test_readme_of_an_exported_pair_runs(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = BACKBONES["dual"](vision=str(saved["vit"]), text=str(saved["bert"]))
    learner = Core(backbone, Retrieve(), LoRA(rank=2, tower="both"))
    learner.grow(Task(0, "a", (0,), ("all",), 1))
    learner.learnt = 1
    folder = export(learner, tmp_path / "it", "merged")
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    exec((folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], {})


def test_export_brings_a_tokenizer_that_came_from_the_hub(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Core(load("open_timm_bert", saved), ZeroShot(), LoRA(rank=2))
    learner.grow(Task(0, "a", (0, 1), ("cat", "dog"), 1))
    learner.learnt = 1
    facts = dataclasses.replace(locate_model(str(saved["open_timm_bert"])), folder=None)
    monkeypatch.setattr("perdure.export.model.locate_model", lambda *_: facts)  # a model that the library knows by name
    folder = export(learner, tmp_path / "it", "merged")
    tokens = library.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(tokens, learner.backbone.tokenizer(TEXTS))


def test_readme_of_an_exported_openclip_runs(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for objective in (ZeroShot(), Retrieve()):
        learner = Core(load("open_quick", saved), objective, LoRA(rank=2))
        learner.grow(Task(0, "a", (0, 1), ("cat", "dog"), 1))
        learner.learnt = 1
        folder = export(learner, tmp_path / type(objective).__name__, "merged")
        Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(folder / "photo.jpg")
        monkeypatch.chdir(folder)
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert "it needs open_clip_torch" in readme
        exec(readme.split("```python\n")[1].split("```")[0], {})
        expected = ("cat", "dog") if "classes" in objective.asks else ("a red car", "two dogs on a beach")
        assert capsys.readouterr().out.strip() in expected


def test_export_of_openclip_to_peft_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    learner = Core(load("open", saved), ZeroShot(), LoRA(rank=2))
    learner.grow(Task(0, "a", (0, 1), ("cat", "dog"), 1))
    learner.learnt = 1
    with pytest.raises(ValueError, match=r"^OpenCLIP's attention is one fused layer.*export to 'merged'"):
        export(learner, tmp_path / "it", "peft")
