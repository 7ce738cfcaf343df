"""Larger images and longer texts: positions are resampled, the old ones kept, and nothing changes at the old size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perdure.backbones import BACKBONES, Backbone
from perdure.backbones.positions import stretched
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
    assert plain.fingerprint() == same.fingerprint() and plain.spec == same.spec


@pytest.mark.parametrize("family", VISION)
def test_larger_images_are_read_and_the_fingerprint_says_so(family: str, options: Any) -> None:
    plain = made(options, family)
    side = 2 * plain.preprocess.size
    large = made(options, family, size=side)
    assert large.preprocess.size == side and large(images(side)).isfinite().all()
    assert large.fingerprint() == f"{plain.fingerprint()} size={side}"
    again = build(parse_one(large.spec), BACKBONES, "backbone")
    assert torch.equal(again(images(side)), large(images(side)))


def test_positions_of_patches_are_interpolated_over_their_grid(options: Any) -> None:
    plain, large = (made(options, "vit", **more).model.embeddings.position_embeddings for more in ({}, {"size": 64}))
    assert large.shape == (1, 1 + 8 * 8, 32) and torch.equal(plain[:, 0], large[:, 0])
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
