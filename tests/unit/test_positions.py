"""Larger images and longer texts: positions are resampled, the old ones kept, and nothing changes at the old size."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from perdure.api.learner import Learner
from perdure.api.resizing import resize
from perdure.backbones import BACKBONES, Backbone, mllm
from perdure.backbones.language import Language
from perdure.backbones.mllm import longer
from perdure.backbones.positions import _positions, stretched
from perdure.options.spec import build, parse_one

VISION = ["vit", "deit", "dinov2", "clip", "siglip", "chinese_clip", "timm", "open_clip"]
TEXT = ["clip", "siglip", "chinese_clip", "open_clip", "dual"]
OPEN: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def options(
    saved: Any, timm_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, dict[str, str]]]:
    """Family -> the backbone's name and options."""
    library = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN, "preprocess_cfg": {}}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = library.create_model(f"local-dir:{folder}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    own = {kind: ("vision", {"path": str(saved[kind])}) for kind in ("vit", "deit", "dinov2")}
    own |= {kind: (kind, {"path": str(saved[kind])}) for kind in ("clip", "chinese_clip", "dual")}
    own["siglip"] = ("clip", {"path": str(saved["siglip"])})
    own["timm"] = ("timm", {"name": "test_vit", "checkpoint": str(timm_file)})
    return own | {"open_clip": ("open_clip", {"name": str(folder)})}


def made(options: Any, family: str, **more: Any) -> Backbone:
    name, own = options[family]
    return BACKBONES[name](**own, **more)


def images(side: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0))}


@pytest.mark.parametrize("family", VISION)
def test_at_its_own_size_a_model_is_the_published_one_bit_for_bit(family: str, options: Any) -> None:
    plain = made(options, family)
    side = plain.preprocess.size
    same = made(options, family, size=side)
    assert torch.equal(plain(images(side)), same(images(side)))
    assert plain.fingerprint() == same.fingerprint()
    assert plain.spec == same.spec


@pytest.mark.parametrize("family", VISION)
def test_larger_images_are_read_and_the_fingerprint_says_so(family: str, options: Any) -> None:
    plain = made(options, family)
    side = 2 * plain.preprocess.size
    large = made(options, family, size=side)
    assert large.preprocess.size == side
    assert large(images(side)).isfinite().all()
    assert large.fingerprint() == f"{plain.fingerprint()} size={side}"
    again = build(parse_one(large.spec), BACKBONES, "backbone")
    assert torch.equal(again(images(side)), large(images(side)))


def test_positions_of_patches_are_interpolated_over_their_grid(options: Any) -> None:
    plain, large = (made(options, "vit", **more).model.embeddings.position_embeddings for more in ({}, {"size": 64}))
    assert large.shape == (1, 1 + 8 * 8, 32)
    assert torch.equal(plain[:, 0], large[:, 0])
    grid, fine = plain[0, 1:].reshape(4, 4, 32), large[0, 1:].reshape(8, 8, 32)
    # the mean of four new patches is nearly what their old one was, in the middle of the grid
    coarse = fine.reshape(4, 2, 4, 2, 32).mean((1, 3))
    assert torch.nn.functional.cosine_similarity(coarse[1:3, 1:3].flatten(), grid[1:3, 1:3].flatten(), dim=0) > 0.9


def test_stretching_is_long_clips_formula() -> None:
    old = torch.randn(77, 4, generator=torch.manual_seed(0))
    new = stretched(old, 248, 20)
    assert torch.equal(new[:20], old[:20])
    for i in range(77 - 20 - 1):  # as the published code writes it, for steps of a quarter
        for quarter in range(4):
            expected = old[20 + i] * (4 - quarter) / 4 + old[21 + i] * quarter / 4
            torch.testing.assert_close(new[20 + 4 * i + quarter], expected)
    for quarter in range(4):
        torch.testing.assert_close(new[244 + quarter], old[76] + quarter * (old[76] - old[75]) / 4)
    assert torch.equal(stretched(old, 77, 20), old)


@pytest.mark.parametrize("family", TEXT)
def test_longer_texts_are_read_to_their_end_and_short_ones_as_before(family: str, options: Any) -> None:
    plain, long = made(options, family), made(options, family, length=48)
    one, other = (
        "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z d e f",
    )
    assert torch.equal(*plain.encode_text([one, other]))
    assert not torch.equal(*long.encode_text([one, other]))
    assert long.fingerprint() == f"{plain.fingerprint()} length=48"
    if family != "siglip":  # it reads its padding, which is longer now
        torch.testing.assert_close(plain.encode_text(["a b"]), long.encode_text(["a b"]))


def test_all_positions_of_a_text_are_interpolated_where_that_is_asked_for(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, long = made(options, "clip"), made(options, "clip", length=48, positions="interpolate")
    tables = [_positions(each.get_submodule(each.towers()["text"])) for each in (plain, long)]
    old, new = (found[2] for found in tables if found)
    assert torch.equal(new, stretched(old, 48, 0))
    assert long.fingerprint() == f"{plain.fingerprint()} length=48, positions=interpolate"
    again = build(parse_one(long.spec), BACKBONES, "backbone")
    assert torch.equal(again.encode_text(["a b c"]), long.encode_text(["a b c"]))
    monkeypatch.setattr("perdure.backbones.positions.KEPT", 23)
    with pytest.raises(ValueError, match="keeps the first 23 of 24 positions: write positions='interpolate'"):
        made(options, "clip", length=48)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"size": 33}, "size=33: expected a multiple of 8, the side of a patch; write size=40"),
        ({"positions": "stretch"}, "positions='stretch' has no effect without length"),
        ({"length": 3}, "length=3: expected 24 or more"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(more: dict[str, Any], said: str, options: Any) -> None:
    with pytest.raises(ValueError, match=said):
        made(options, "clip", **more)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip", "timm", "open_clip"])
def test_an_export_reads_the_larger_images_by_itself(family: str, options: Any, tmp_path: Path) -> None:
    name, own = options[family]
    large = made(options, family, size=2 * made(options, family).preprocess.size)
    learner = Learner.create(large.spec, "lora(rank=2)", precision="fp32", device="cpu")
    side = large.preprocess.size
    learner.learn(images(side)["image"], ["a", "b"], epochs=1)
    folder = learner.export(tmp_path / "merged", "merged")
    option = next(iter(own))
    again = BACKBONES[name](**{option: str(folder)})
    assert again.preprocess.describe() == large.preprocess.describe()
    with learner.inference():
        torch.testing.assert_close(again(images(side)), learner.backbone(images(side)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"a LoRA does not bring size=|no LoRA of PEFT fits"):
        learner.export(tmp_path / "lora", "peft")


def test_a_learner_that_reads_larger_images_knows_what_it_knew_and_can_go_back(options: Any, tmp_path: Path) -> None:
    learner = Learner.create("pocket()", "lora(rank=2) + ncm", precision="fp32", device="cpu")
    learner.learn(images(48)["image"], ["a", "b"], epochs=1)
    learner.save(tmp_path / "my")
    shown = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images(48)["image"]]
    before = learner.predict(shown)
    assert resize(tmp_path / "my", size=72) == "pocket(size=72)"
    large = Learner.load(tmp_path / "my")
    assert large.backbone.preprocess.size == 72
    assert large.fingerprint == f"{learner.fingerprint} size=72"
    state = learner.learnt_state()
    assert all(torch.equal(value, state[name]) for name, value in large.learnt_state().items())
    large.learn(images(72)["image"], ["c", "d"], epochs=1).save(tmp_path / "my")
    assert len(Learner.load(tmp_path / "my").known) == 4
    learner.save(tmp_path / "other")
    resize(tmp_path / "other", size=72)
    with pytest.raises(ValueError, match=r"other reads that already, on pocket\(size=72\): there is nothing to change"):
        resize(tmp_path / "other", size=72)
    resize(tmp_path / "other", size=48)
    with pytest.raises(ValueError, match=r"other reads that already, on pocket: there is nothing to change"):
        resize(tmp_path / "other", size=48)
    assert Learner.load(tmp_path / "other").predict(shown) == before


def test_an_encoder_that_was_trained_with_its_positions_is_not_resized(tmp_path: Path) -> None:
    learner = Learner.create("pocket()", "finetune()", precision="fp32", device="cpu")
    learner.learn(images(48)["image"], ["a", "b"], epochs=1).save(tmp_path / "my")
    with pytest.raises(ValueError, match=r"has trained the encoder itself, positions and all, .*: export it with --to"):
        resize(tmp_path / "my", size=72)
    assert Learner.load(tmp_path / "my").backbone.preprocess.size == 48


def frequencies(backbone: Language) -> torch.Tensor:
    found: torch.Tensor = backbone.model.get_decoder().rotary_emb.inv_freq
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn"])
def test_scaled_rotary_positions_make_room_and_one_is_the_published_model(
    family: str, rope: str, tiny_mllms: Callable[[str], Path]
) -> None:
    folder = str(tiny_mllms(family))
    plain, same, long = mllm(folder), mllm(folder, rope=rope, factor=1), mllm(folder, rope=rope, factor=4.0)
    asked = {"conversation": [{"messages": [{"role": "user", "content": "what is this"}], "answer": "a dog"}]}
    assert torch.equal(plain.head(plain(asked)), same.head(same(asked)))
    assert plain.fingerprint() == same.fingerprint()
    assert long.dialogue.length == 4 * plain.dialogue.length
    assert long.fingerprint() == f"{plain.fingerprint()} rope={rope}, factor=4.0"
    ratio = frequencies(long) / frequencies(plain)
    torch.testing.assert_close(ratio[-1], torch.tensor(0.25))
    assert float(ratio[0]) == pytest.approx(0.25 if rope == "linear" else 1)
    assert not torch.equal(plain.head(plain(asked)), long.head(long(asked)))


def test_what_is_written_down_counts_the_numbers_of_a_head_that_turn_and_the_length_that_was_trained() -> None:
    for rope, wanted in (
        ("ntk", {"rope_theta": 100.0 * 4 ** (8 / 6)}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ):
        given = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
        text = SimpleNamespace(head_dim=16, max_position_embeddings=64, rope_parameters=given)
        longer(SimpleNamespace(get_text_config=lambda text=text: text), rope, 4.0, "folder")  # type: ignore[arg-type]
        assert text.rope_parameters == given | wanted
        assert text.max_position_embeddings == 256


def test_a_length_beyond_the_positions_is_refused_unless_they_are_stretched(tiny_mllms: Callable[[str], Path]) -> None:
    folder = str(tiny_mllms("llava"))
    most = mllm(folder).dialogue.length
    assert mllm(folder, length=2 * most, rope="linear", factor=2.0).dialogue.length == 2 * most
    with pytest.raises(ValueError, match=rf"^length={most + 1}: .* has positions for {most} tokens; .*rope=, factor="):
        mllm(folder, length=most + 1)


@pytest.mark.parametrize(("rope", "factor"), [("yarn", None), (None, 2.0)])
def test_half_a_request_for_a_longer_context_is_refused(
    rope: Any, factor: float | None, tiny_mllms: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="has no effect without"):
        mllm(str(tiny_mllms("llava")), rope=rope, factor=factor)
