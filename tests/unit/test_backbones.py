"""Backbones: same features as the plain library, the right pixels, the right layers, errors that help."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm as timm_library
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from perdure.backbones import BACKBONES, Backbone
from perdure.options.spec import build, parse_one

VISION = ["vit", "deit", "dinov2", "clip", "siglip"]
TIMM = "test_vit"


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def pixels(backbone: Backbone, n: int = 2) -> dict[str, torch.Tensor]:
    side = backbone.preprocess.size
    return {"image": torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()}


@pytest.fixture(scope="module")
def every_backbone(saved: dict[str, Path], timm_file: Path) -> Callable[[], list[Backbone]]:
    """All kinds of models, read once; to be left as they are, or asked for anew with `every_backbone()`."""

    def read() -> list[Backbone]:
        return [
            *(BACKBONES["vision"](path=str(saved[kind])) for kind in VISION),
            *(BACKBONES["clip"](path=str(saved[kind])) for kind in ("clip", "siglip", "chinese_clip")),
            BACKBONES["timm"](name=TIMM, checkpoint=str(timm_file)),
            BACKBONES["pocket"](),
            BACKBONES["tiny"](),
            BACKBONES["tiny"](fused=False, text=True),
        ]

    return read


@pytest.fixture(scope="module")
def backbones(every_backbone: Callable[[], list[Backbone]]) -> list[Backbone]:
    """One of each kind; to be left as they are."""
    return every_backbone()


# What every backbone promises


def test_every_backbone_is_frozen_and_its_spec_rebuilds_it(backbones: list[Backbone]) -> None:
    for backbone in backbones:
        assert not backbone.training
        assert not any(module.training for module in backbone.modules())
        assert not any(p.requires_grad or p.dtype != torch.float32 for p in backbone.parameters())
        batch = pixels(backbone)
        features = backbone(batch)
        assert features.shape == (2, backbone.dim)
        again = build(parse_one(backbone.spec), BACKBONES, "backbone")
        assert again.spec == backbone.spec
        assert again.preprocess == backbone.preprocess
        assert again.fingerprint() == backbone.fingerprint()
        assert torch.equal(again(batch), features)


def test_eager_and_sdpa_attention_give_the_same_features(backbones: list[Backbone]) -> None:
    for backbone in backbones:
        batch = pixels(backbone)
        backbone.set_attention("eager")
        eager = backbone(batch)
        backbone.set_attention("sdpa")
        torch.testing.assert_close(backbone(batch), eager, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="'eager' or 'sdpa'"):
            backbone.set_attention("flash")


def test_switching_the_attention_reaches_the_model(timm_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    plain = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or plain(*a, **k)
    )
    for backbone in (
        BACKBONES["timm"](name=TIMM, checkpoint=str(timm_file)),
        BACKBONES["pocket"](),
        BACKBONES["tiny"](),
    ):
        for implementation in ("eager", "sdpa"):
            backbone.set_attention(implementation)
            fused.clear()
            backbone(pixels(backbone))
            assert bool(fused) == (implementation == "sdpa"), backbone.spec


def test_loading_leaves_the_random_state_and_the_log_levels_alone(
    every_backbone: Callable[[], list[Backbone]], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as hf

    before = torch.get_rng_state(), hf.get_verbosity(), hf.is_progress_bar_enabled(), logging.root.level
    every_backbone()
    after = torch.get_rng_state(), hf.get_verbosity(), hf.is_progress_bar_enabled(), logging.root.level
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert capfd.readouterr() == ("", "")


def test_registry_knows_the_options_of_each_family() -> None:
    options = {name: list(inspect.signature(factory).parameters) for name, factory in BACKBONES.items()}
    elastic = ["size", "length", "positions"]
    assert options == {
        "timm": ["name", "checkpoint", "input_norm", "layers", "means", "size"],
        "vision": ["path", "input_norm", "layers", "means", "size"],
        "clip": ["path", "input_norm", "layers", "means", *elastic],
        "chinese_clip": ["path", "input_norm", "layers", "means", *elastic],
        "open_clip": ["name", "checkpoint", "input_norm", "layers", "means", *elastic],
        "dual": ["path", "vision", "text", "input_norm", "layers", "means", *elastic],
        "pocket": ["layers", "means", *elastic],
        "tiny": ["dim", "depth", "size", "seed", "fused", "text", "layers", "means"],
        "mllm": ["path", "dtype", "quantize", "checkpointing", "length", "rope", "factor"],
        "tiny_mllm": ["dim", "depth", "size", "seed", "length"],
    }


def test_fingerprint_follows_the_weights() -> None:
    tiny = BACKBONES["tiny"]()
    assert tiny.fingerprint() == BACKBONES["tiny"]().fingerprint() != BACKBONES["tiny"](seed=8).fingerprint()
    next(tiny.parameters()).data.view(-1)[0] += 1e-6
    assert tiny.fingerprint() != BACKBONES["tiny"]().fingerprint()


# Features and pixels are those of the plain library


@pytest.mark.parametrize("kind", VISION)
def test_vision_features_are_those_of_plain_transformers(kind: str, saved: dict[str, Path]) -> None:
    backbone = BACKBONES["vision"](path=str(saved[kind]))
    x = backbone.normalise(pixels(backbone)["image"])
    whole = {
        "vit": transformers.ViTForImageClassification,
        "deit": transformers.DeiTModel,
        "dinov2": transformers.Dinov2Model,
        "clip": transformers.CLIPModel,
        "siglip": transformers.SiglipModel,
    }[kind].from_pretrained(saved[kind])
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            expected = whole.eval().vision_model(x).pooler_output
        else:
            expected = getattr(whole.eval(), "vit", whole)(x).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone(pixels(backbone)), expected, atol=1e-5, rtol=1e-5)


def test_timm_features_are_what_the_classifier_reads(timm_file: Path) -> None:
    backbone = BACKBONES["timm"](name=TIMM, checkpoint=str(timm_file))
    weights = load_file(timm_file)
    plain = timm_library.create_model(TIMM).eval()
    plain.load_state_dict(weights)
    batch = pixels(backbone)
    with torch.no_grad():
        expected = plain(backbone.normalise(batch["image"]))
    ours = backbone(batch) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VISION)
def test_preprocessing_is_that_of_the_models_own_processor(
    kind: str, saved: dict[str, Path], image: Image.Image
) -> None:
    backbone = BACKBONES["vision"](path=str(saved[kind]))
    pillow = transformers.AutoImageProcessor.from_pretrained(saved[kind], backend="pil")
    for picture in (image, image.rotate(90, expand=True), image.resize((41, 200)), image.resize((10, 10))):
        theirs = torch.from_numpy(pillow(images=picture, return_tensors="np")["pixel_values"][0])
        torch.testing.assert_close(backbone.normalise(backbone.preprocess(picture)[None])[0], theirs)
    # Their default resizes tensors instead of Pillow images, with other rounding.
    default = transformers.AutoImageProcessor.from_pretrained(saved[kind])
    theirs = default(images=image, return_tensors="pt")["pixel_values"][0]
    ours = backbone.normalise(backbone.preprocess(image)[None])[0]
    assert (ours - theirs).abs().max() <= 2 / 255 / min(backbone.preprocess.std) + 1e-6


def test_preprocessing_of_timm_is_that_of_its_evaluation_transform(timm_file: Path, image: Image.Image) -> None:
    backbone = BACKBONES["timm"](name=TIMM, checkpoint=str(timm_file))
    transform = timm_library.data.create_transform(**timm_library.data.resolve_model_data_config(backbone.model))
    ours = backbone.normalise(backbone.preprocess(image)[None])[0]
    assert (ours - transform(image)).abs().max() <= 2 / 255 / 0.5 + 1e-6


def test_normalise_maps_black_and_white_to_the_ends_and_keeps_the_batch() -> None:
    backbone = BACKBONES["pocket"]()
    image = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 48, 48).clone()
    black, white = backbone.normalise(image)
    assert image.unique().tolist() == [0, 255]
    torch.testing.assert_close(black[:, 0, 0], -torch.tensor([0.48 / 0.27, 0.46 / 0.26, 0.41 / 0.27]))
    torch.testing.assert_close(white[:, 5, 5], torch.tensor([0.52 / 0.27, 0.54 / 0.26, 0.59 / 0.27]))


@pytest.mark.parametrize("family", ["vision", "clip", "timm"])
def test_input_norm_none_gives_raw_pixels(family: str, saved: dict[str, Path], timm_file: Path) -> None:
    where = {"name": TIMM, "checkpoint": str(timm_file)}
    where = where if family == "timm" else {"path": str(saved["clip"])}
    backbone = BACKBONES[family](**where, input_norm="none")
    assert "input_norm='none'" in backbone.spec
    batch = pixels(backbone)["image"]
    torch.testing.assert_close(backbone.normalise(batch), batch / 255)
    with pytest.raises(ValueError, match=r"expected 'model' .* or 'none'"):
        BACKBONES[family](**where, input_norm="imagenet")


def test_processor_that_does_not_normalise_gives_raw_pixels(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["vit"], tmp_path, do_normalize=False)
    assert BACKBONES["vision"](path=str(folder)).preprocess.mean == (0, 0, 0)


# Text


def test_texts_are_encoded_in_two_steps() -> None:
    for backbone in (BACKBONES["pocket"](), BACKBONES["tiny"](text=True)):
        texts = ["a cat", "two dogs on a sofa", ""]
        masks: list[torch.Tensor | None] = []
        layer = backbone.get_submodule(backbone.sites("v", tower="text")[0].layer)
        layer.register_forward_hook(lambda *_, backbone=backbone, masks=masks: masks.append(backbone.text_mask))
        tokens = backbone.tokenise(texts)
        assert all(ids.device.type == "cpu" and ids.shape[0] == 3 for ids in tokens.values())
        assert torch.equal(backbone.encode_tokens(tokens), backbone.encode_text(texts))
        assert backbone.text_mask is None
        lengths = [ids.shape[1] for text in texts for ids in list(backbone.tokenise([text]).values())[:1]]
        assert masks[0].sum(1).tolist() == masks[1].sum(1).tolist() == lengths
        assert backbone.encode_text([]).shape == (0, backbone.dim)


def test_zero_shot_on_a_backbone_without_text_names_the_remedy(saved: dict[str, Path]) -> None:
    for backbone in (BACKBONES["tiny"](), BACKBONES["vision"](path=str(saved["clip"]))):
        with pytest.raises(ValueError, match=r"no text tower.*clip\(path=\.\.\.\)"):
            backbone.encode_text(["a cat"])
        for use in (
            lambda b=backbone: b.logit_scale,
            lambda b=backbone: b.encode_text([]),
            lambda b=backbone: b.tokenise([]),
        ):
            with pytest.raises(ValueError, match="no text tower"):
                use()
        with pytest.raises(ValueError, match="no text tower; it has: vision"):
            backbone.sites("kv", tower="both")


# Sites


def test_sites_are_the_layers_asked_for_in_every_family(backbones: list[Backbone]) -> None:
    for backbone in backbones:
        for tower in backbone.towers():
            names = backbone.blocks(tower)
            stack = backbone.get_submodule(names[0].rpartition(".")[0])
            assert len(names) == len(stack)
            sites = backbone.sites("qkvo,mlp", tower=tower)
            assert all(site.layer.startswith(f"{backbone.towers()[tower]}.") for site in sites)
            assert len(sites) == 6 * len(names)
            assert len({site.key for site in sites}) == len(sites)
            for site in sites:
                layer = backbone.get_submodule(site.layer)
                assert isinstance(layer, nn.Linear)
                assert site.fan_in == layer.in_features
                assert 0 <= site.rows[0] < site.rows[1] <= layer.out_features
            first = {site.key.rpartition(":")[2]: site for site in sites[:6]}
            assert first["q"].input == first["k"].input == first["v"].input
            assert len({first[letter].input for letter in ("q", "o", "fc1", "fc2")}) == 4
            assert first["fc1"].fan_out == first["fc2"].fan_in > first["fc1"].fan_in


def test_sites_with_one_input_name_really_read_the_same_tensor(backbones: list[Backbone]) -> None:
    for backbone in backbones:
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = [
            backbone.get_submodule(site.layer).register_forward_pre_hook(
                lambda _, args, seen=seen, name=site.input: seen.setdefault(name, []).append(args[0])
            )
            for site in backbone.sites("qkvo,mlp")
        ]
        backbone(pixels(backbone))
        for hook in hooks:
            hook.remove()
        assert len(seen) == 4 * len(backbone.blocks()), backbone.spec
        for name, inputs in seen.items():
            assert all(torch.equal(each, inputs[0]) for each in inputs), name


def test_pooling_head_of_siglip_is_not_a_block(saved: dict[str, Path]) -> None:
    for family in ("vision", "clip"):
        backbone = BACKBONES[family](path=str(saved["siglip"]))
        assert not any(".head." in site.layer for site in backbone.sites("qkvo,mlp"))


def test_fused_and_separate_projections_are_the_same_sites_and_features() -> None:
    fused, separate = BACKBONES["tiny"](text=True), BACKBONES["tiny"](fused=False, text=True)
    torch.testing.assert_close(fused(pixels(fused)), separate(pixels(fused)), atol=1e-5, rtol=1e-5)
    words = ["a cat", "two dogs", ""]
    torch.testing.assert_close(fused.encode_text(words), separate.encode_text(words), atol=1e-5, rtol=1e-5)
    pairs = list(zip(fused.sites("qkv", "0-1", "both"), separate.sites("qkv", "0-1", "both"), strict=True))
    assert len(pairs) == 12
    for one, other in pairs:
        assert (one.key, one.input, one.fan_in, one.fan_out) == (other.key, other.input, other.fan_in, other.fan_out)
        rows = slice(*one.rows)
        assert torch.equal(
            fused.get_submodule(one.layer).weight[rows], separate.get_submodule(other.layer).weight[slice(*other.rows)]
        )


@pytest.mark.parametrize(
    ("at", "blocks", "message"),
    [
        ("kw", None, "cannot read 'kw'"),
        ("k,k", None, "names a layer twice"),
        ("fc3", None, "cannot read 'fc3'"),
        ("kv", "0-2", "'0-2' is outside 0-1"),
        ("kv", "1-0", "'1-0' is outside 0-1"),
        ("kv", "first", "write '0-4' or '0,2,5'"),
    ],
)
def test_wrong_sites_are_named(at: str, blocks: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BACKBONES["tiny"]().sites(at, blocks)


def test_layers_inside_multihead_attention_are_refused() -> None:
    class Packed(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.spec = "packed"
            self.blocks_ = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, batch_first=True) for _ in range(2))

    with pytest.raises(ValueError, match="never calls it"):
        Packed().sites("o")
    with pytest.raises(ValueError, match=r"nothing matches at='k'.*linear1"):
        Packed().sites("kv")


class Gated(Backbone):
    """Two towers whose MLPs have two and three layers, and a projector between them."""

    spec, dim = "gated", 4

    def __init__(self) -> None:
        super().__init__()
        plain = {"q_proj": nn.Linear(4, 4), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}
        gated = {"q_proj": nn.Linear(4, 4)} | {f"{n}_proj": nn.Linear(4, 4) for n in ("gate", "up", "down")}
        self.seeing = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(plain)])})
        self.joining = nn.ModuleDict({"linear_1": nn.Linear(4, 4), "linear_2": nn.Linear(4, 4)})
        self.speaking = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(gated), nn.ModuleDict(gated)])})

    def towers(self) -> dict[str, str]:
        return {"vision": "seeing", "projector": "joining", "language": "speaking"}


@pytest.mark.parametrize(
    ("at", "tower", "layers"),
    [
        ("mlp", "vision", ["fc1", "fc2"]),
        ("mlp", "language", ["up_proj", "down_proj", "gate_proj"] * 2),
        ("gate", "language", ["gate_proj"] * 2),
        ("up,down", "language", ["up_proj", "down_proj"] * 2),
        ("mlp", "projector", ["linear_1", "linear_2"]),
    ],
)
def test_an_mlp_is_all_the_layers_that_it_has_in_every_tower(at: str, tower: str, layers: list[str]) -> None:
    sites = Gated().sites(at, tower=tower)
    assert [site.layer.rpartition(".")[2] for site in sites] == layers


def test_gate_and_up_read_the_same_input() -> None:
    groups = Gated().sites_by_input("mlp", "0", "language").values()
    assert [[site.key[-4:] for site in sites] for sites in groups] == [[":fc1", "gate"], [":fc2"]]


def test_a_gate_is_refused_where_an_mlp_has_none() -> None:
    with pytest.raises(
        ValueError, match=r"^gated: nothing matches at='gate' in block 'seeing.blocks.0', which has: q_proj, fc1"
    ):
        Gated().sites("gate")


def test_model_without_transformer_blocks_is_refused_when_sites_are_asked_for() -> None:
    class Convolutions(Backbone):
        spec = "convolutions"

        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        Convolutions().sites("kv")


# Tiny


def test_tiny_tells_images_and_texts_apart() -> None:
    tiny = BACKBONES["tiny"](text=True)
    features = tiny(pixels(tiny, 8))
    assert torch.linalg.matrix_rank(features - features.mean(0)) == 7
    words = tiny.encode_text(["cat", "act", "dog"])
    assert torch.cdist(words, words).add(torch.eye(3)).min() > 0.1


@pytest.mark.parametrize("wrong", [{"dim": 30}, {"size": 9}])
def test_tiny_of_impossible_size_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected a multiple"):
        BACKBONES["tiny"](**wrong)


# Bad input


def edited(source: Path, to: Path, without: str = "", **facts: object) -> Path:
    """A copy of a model's folder without one file and with other facts in its preprocessor_config.json."""
    folder = to / source.name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(without))
    if facts:
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    return folder


def refusal(family: str, **options: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        BACKBONES[family](**options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("family", ["vision", "clip"])
def test_missing_folder_is_named(family: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert f"path={missing!r}: no such folder" in refusal(family, path=missing)
    assert "no such folder" in refusal(family, path="./nowhere")


def test_unreachable_hub_is_told_from_a_missing_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for family, options in (
        ("vision", {"path": "some/model"}),
        ("clip", {"path": "some/model"}),
        ("timm", {"name": "vit_tiny_patch16_224"}),
        ("timm", {"name": "hf-hub:some/model"}),
    ):
        message = refusal(family, **options)
        assert "the hub gave no model" in message
        assert "check name and network" in message


def test_downloaded_hub_model_is_read_without_the_hub(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--model"
    shutil.copytree(saved["clip"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for family in ("vision", "clip"):
        backbone = BACKBONES[family](path="some/model")
        assert backbone.spec == f"{family}(path='some/model')"
        assert backbone.fingerprint() == BACKBONES[family](path=str(saved["clip"])).fingerprint()
    # What an earlier download left out is asked for, not missed later.
    for file in repository.rglob("tokenizer*"):
        file.unlink()
    assert "the hub gave no model" in refusal("clip", path="some/model")


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no *.safetensors file"),
        ("preprocessor_config.json", "has no usable preprocessor_config.json"),
    ],
)
def test_missing_file_is_named(without: str, message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["clip"], tmp_path, without)
    for family in ("vision", "clip"):
        assert message in refusal(family, path=str(folder))


def test_clip_without_tokenizer_is_refused_and_its_images_still_work(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["clip"], tmp_path, "vocab.json")
    (folder / "tokenizer_config.json").unlink()
    assert "no usable tokenizer" in refusal("clip", path=str(folder))
    BACKBONES["vision"](path=str(folder))


def test_pickled_weights_are_refused_unread(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["vit"], tmp_path, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refusal("vision", path=str(folder))
    assert "pytorch_model.bin, a pickle" in message
    assert "convert it to model.safetensors" in message
    message = refusal("timm", name=TIMM, checkpoint=str(folder / "pytorch_model.bin"))
    assert "only .safetensors is read" in message


def test_damaged_and_incomplete_weights_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["vit"], tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if name.endswith("intermediate.dense.bias"))
    save_file({name: value for name, value in weights.items() if name != gone}, file, metadata={"format": "pt"})
    assert "lacks 1 of the weights of a ViTModel" in refusal("vision", path=str(folder))
    save_file(weights | {gone: torch.zeros(3)}, file, metadata={"format": "pt"})
    assert "cannot load" in refusal("vision", path=str(folder))
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot load" in refusal("vision", path=str(folder))
    (folder / "config.json").write_text("{")
    assert "cannot load" in refusal("vision", path=str(folder))
    (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}')
    assert "cannot load" in refusal("vision", path=str(folder))
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    assert "names no model that transformers knows" in refusal("vision", path=str(folder))


def test_models_of_another_kind_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    assert "without image and text tower" in refusal("clip", path=str(saved["vit"]))
    folder = edited(saved["vit"], tmp_path)
    (folder / "config.json").write_text('{"model_type": "swin"}')
    assert "is a swin model; vision(path=...) reads:" in refusal("vision", path=str(folder))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"size": {"height": 32, "width": 40}}, "has size="),
        ({"size": {"height": 48, "width": 48}}, "the model refuses images of 48 pixels"),
        ({"resample": 5}, "has resample=5"),
        ({"do_resize": False}, "has do_resize=False"),
        ({"rescale_factor": 1.0}, "has rescale_factor=1.0"),
    ],
)
def test_image_processor_that_cannot_be_followed_is_refused(
    facts: dict[str, object], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    assert message in refusal("vision", path=str(edited(saved["vit"], tmp_path, **facts)))


def test_timm_refuses_what_does_not_fit(timm_file: Path, tmp_path: Path) -> None:
    assert "did you mean vit_tiny_patch16_224" in refusal("timm", name="vit_tinny_patch16_224")
    assert "no such file" in refusal("timm", name=TIMM, checkpoint=str(tmp_path / "no.safetensors"))
    assert "does not fit" in refusal("timm", name="test_vit2", checkpoint=str(timm_file))
    weights = load_file(timm_file)
    partial = tmp_path / "partial.safetensors"
    save_file({name: value for name, value in weights.items() if name != "norm.weight"}, partial)
    assert "norm.weight missing" in refusal("timm", name=TIMM, checkpoint=str(partial))
    save_file(weights | {"surplus": torch.zeros(1)}, partial)
    assert "surplus is not in the model" in refusal("timm", name=TIMM, checkpoint=str(partial))
    partial.write_bytes(b"nonsense")
    assert "damaged or not safetensors" in refusal("timm", name=TIMM, checkpoint=str(partial))


def test_a_folder_of_timm_is_read_and_other_backbones_say_so(timm_file: Path, tmp_path: Path) -> None:
    model = timm_library.create_model(TIMM, img_size=32, depth=2)
    timm_library.models.save_for_hf(model, tmp_path / "own", safe_serialization=True)
    read = BACKBONES["timm"](name=str(tmp_path / "own"))
    with torch.no_grad():
        wanted = model.eval().forward_head(model.forward_features(torch.zeros(1, 3, 32, 32)), pre_logits=True)
        assert torch.allclose(read.encode_pixels(torch.zeros(1, 3, 32, 32)), wanted, atol=1e-5)
    assert BACKBONES["timm"](name=f"local-dir:{tmp_path / 'own'}").spec == read.spec
    for family in ("vision", "clip"):
        assert f"write timm(name={str(tmp_path / 'own')!r})" in refusal(family, path=str(tmp_path / "own"))
    assert "leave out 'timm/', or write 'hf-hub:timm/" in refusal("timm", name="timm/vit_tiny_patch16_224")
    (tmp_path / "own" / "config.json").write_text('{"model_type": "vit"}')
    assert "vision(path=" in refusal("timm", name=str(tmp_path / "own"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../vit/model.safetensors", "/x.safetensors", "a\\b.safetensors", 7]
)
@pytest.mark.parametrize("family", ["vision", "clip", "dual", "timm", "open_clip"])
def test_an_index_that_leads_elsewhere_is_refused_before_any_library_follows_it(
    family: str, name: object, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(saved["vit"], tmp_path)
    (folder / "open_clip_config.json").write_text('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    option = {"dual": "vision", "timm": "name", "open_clip": "name"}.get(family, "path")
    more = {"text": str(saved["clip"])} if family == "dual" else {}
    message = refusal(family, **{option: str(folder)}, **more)
    assert "model.safetensors.index.json' names " in message
    assert "expected .safetensors files beside it" in message


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("tokenizer_config.json", {"vocab_file": "{outside}"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../outside.txt"]}),
        ("config.json", {"auto_map": {"AutoConfig": "../outside.txt"}}),
        ("config.json", {"text_config": {"deep": [{"er": "{outside}"}]}}),
        ("preprocessor_config.json", {"image_processor_file": "{outside}"}),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:{outside}"}}}),
        ("adapter_config.json", {"base_model_name_or_path": "else/where"}),
    ],
)
def test_a_configuration_that_leads_out_of_its_folder_is_refused(
    file: str, facts: dict[str, object], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(saved["clip"], tmp_path)
    (tmp_path / "outside.txt").write_text("secret")
    written = json.dumps(facts).replace("{outside}", str(tmp_path / "outside.txt"))
    own = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(own | json.loads(written)))
    message = refusal("clip", path=str(folder))
    assert file in message
    assert "leads" in message


def test_what_a_saved_model_remembers_of_another_machine_does_no_harm(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["clip"], tmp_path)
    file = folder / "tokenizer_config.json"
    stale = {"special_tokens_map_file": "/home/somebody/map.json", "name_or_path": str(tmp_path)}
    file.write_text(json.dumps(json.loads(file.read_text()) | stale))
    BACKBONES["clip"](path=str(folder))
