"""Decoding and preprocessing."""

import ast
import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

import perdure.backbones.preprocess
from perdure.backbones.preprocess import (
    Interpolation,
    Preprocess,
    UnreadableImage,
    begins_like_an_image,
    decode,
    formats,
    is_image,
    rgb,
)
from perdure.streams import ImageSet, image_set

RNG = np.random.default_rng(0)
PLAIN = Preprocess(24, 24)


def photo(width: int, height: int) -> Image.Image:
    # Smooth, as photographs are: on noise, resampling in other number formats differs more.
    small = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "HSV", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (40, 30), (1, 90), (3000, 1)])
def test_every_kind_of_image_becomes_three_uint8_channels(mode: str, size: tuple[int, int]) -> None:
    image = photo(*size).convert(mode)
    if mode == "F":
        image = Image.fromarray(np.asarray(image) / np.float32(255))
    pixels = PLAIN(image)
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.uint8


def test_grey_image_has_three_equal_channels() -> None:
    pixels = PLAIN(photo(30, 24).convert("L"))
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    ramp = np.tile(np.linspace(0, 65535, 24).astype(np.uint16), (24, 1))
    pixels = PLAIN(decode(encoded(Image.fromarray(ramp)), "ramp"))
    assert pixels[0, 0, 0] == 0
    assert 120 <= pixels[0, 0, 12] <= 136
    assert pixels[0, 0, -1] == 255


def test_palette_with_transparency_decodes_without_a_warning() -> None:
    image = photo(24, 24).convert("P")
    pixels = PLAIN(decode(encoded(image, transparency=bytes([0] * 128 + [255] * 128)), "palette"))
    assert torch.equal(pixels, PLAIN(image.convert("RGB")))


def test_image_is_turned_upright_as_its_exif_says() -> None:
    image = photo(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = image.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(PLAIN(decode(encoded(sideways, exif=exif), "x")), PLAIN(image))


def test_decoding_leaves_the_callers_image_alone() -> None:
    image = photo(40, 24)
    image.getexif()[0x0112] = 6
    PLAIN(decode(image, "x"))
    assert image.size == (40, 24)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("size", [(167, 128), (136, 128), (51, 48), (48, 51), (128, 199), (20, 20), (300, 48)])
def test_equals_the_clip_image_processor_within_two_grey_levels(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    image = photo(*size)
    theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    ours = Preprocess(48, 56)(image)
    assert (theirs.float() - ours.float()).abs().max() <= 2


def test_squash_equals_the_vit_image_processor_within_two_grey_levels() -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    image = photo(167, 128)
    theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    ours = Preprocess(48, 48, interpolation="bilinear", squash=True)(image)
    assert (theirs.float() - ours.float()).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(167, 128), (136, 128), (51, 48), (128, 199), (20, 20)])
def test_equals_the_timm_transform_within_one_grey_level(size: tuple[int, int], interpolation: str) -> None:
    from timm.data import create_transform

    theirs = create_transform((3, 48, 48), interpolation=interpolation, crop_pct=0.9, mean=(0, 0, 0), std=(1, 1, 1))
    image = photo(*size)
    ours = Preprocess(48, 53, interpolation=interpolation, halve="round")(image)  # type: ignore[arg-type]
    assert (theirs(image) * 255 - ours.float()).abs().max() <= 1


def test_crop_larger_than_the_resized_image_is_padded_with_black() -> None:
    pixels = Preprocess(12, 8)(Image.new("RGB", (8, 8), "white"))
    assert pixels[:, 2:10, 2:10].min() == 255
    assert pixels.sum() == 3 * 64 * 255


def test_preprocess_survives_json() -> None:
    made = Preprocess(48, 54, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", squash=True, halve="round")
    assert Preprocess.described(json.loads(json.dumps(made.describe()))) == made


def test_unknown_entry_of_a_described_preprocess_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown entry 'gamma'"):
        Preprocess.described({**PLAIN.describe(), "gamma": 2})


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
def test_images_are_resized_as_torchvision_does_bit_for_bit(interpolation: Interpolation) -> None:
    for width, height, side in RNG.integers(1, 99, (25, 3)).tolist():
        image = photo(width, height)
        plain = Preprocess(side, side, interpolation=interpolation)
        theirs = tv.resize(image, [side], interpolation=InterpolationMode(interpolation), antialias=True)
        assert image.resize(plain._target(image), Image.Resampling[interpolation.upper()]).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("wrong", [{"size": 0}, {"resize": -1}, {"interpolation": "cubic"}, {"halve": "up"}])
def test_impossible_preprocess_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocess(**{"size": 8, "resize": 8, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_image_is_unreadable_and_named(form: str) -> None:
    whole = encoded(photo(40, 40), form)
    for cut in (0, 3, len(whole) // 2):
        with pytest.raises(
            UnreadableImage, match=r"^cannot read image train\.parquet, row 7: .*; replace or remove it$"
        ):
            decode(whole[:cut], "train.parquet, row 7")


def test_missing_file_is_unreadable_and_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnreadableImage, match=r"gone\.png"):
        decode(tmp_path / "gone.png", str(tmp_path / "gone.png"))


def test_text_file_is_no_image(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UnreadableImage, match="not an image"):
        decode(tmp_path / "a.png", "a.png")


@pytest.mark.parametrize("mode", [*Image.MODES, "La", "PA", "RGBa", "RGBX", "I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_pillow_becomes_rgb_and_black_stays_black(mode: str) -> None:
    black = {"CMYK": (0, 0, 0, 255), "YCbCr": (0, 128, 128), "LAB": (0, 128, 128)}.get(mode, 0)
    shown = rgb(Image.new(mode, (3, 2), black))
    assert (shown.mode, shown.size) == ("RGB", (3, 2))
    assert np.asarray(shown).max() <= 1


@pytest.mark.parametrize(
    ("values", "shades"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 200, 255]], np.int32), [0, 200, 255]),
        (np.array([[0, 0x8000, 0xFFFF]], np.uint16), [0, 128, 255]),
        (np.zeros((1, 3), np.uint16), [0, 0, 0]),
    ],
)
def test_values_whose_white_is_known_keep_their_shades(values: np.ndarray, shades: list[int]) -> None:  # type: ignore[type-arg]
    for form in ("TIFF", None):
        image = Image.fromarray(values)
        image = decode(encoded(image, form), "x") if form else rgb(image)
        assert np.asarray(image)[0, :, 0].tolist() == shades


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 1.5]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, 256]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 4095]], np.uint16),
        np.array([[0, 255]], np.uint16),
    ],
)
def test_values_whose_white_nobody_says_are_refused_with_file_and_mode(values: np.ndarray) -> None:  # type: ignore[type-arg]
    image = Image.fromarray(values)
    with pytest.raises(UnreadableImage, match=rf"^cannot read image a\.tif: an image of mode {image.mode} .*as 8 bit"):
        decode(encoded(image, "TIFF"), "a.tif")
    with pytest.raises(ValueError, match=f"mode {image.mode}"):
        PLAIN(image)


def test_deep_pgm_is_read_by_the_white_it_names() -> None:
    assert np.asarray(decode(b"P5 3 1 4095\n" + bytes([0, 0, 8, 0, 15, 255]), "x"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("form", ["EPS", "ICO", "TGA", "PCX", "SGI"])
def test_formats_that_are_not_listed_are_not_read_whatever_they_are_called(form: str, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(photo(24, 24), form))
    with pytest.raises(UnreadableImage, match=r"not an image \(JPEG, PNG, "):
        decode(file, "photo.png")
    assert form not in formats()
    assert not begins_like_an_image(file.read_bytes()) or form == "TGA"
    assert not is_image(f"a.{form.lower()}")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "HEIF"])
def test_formats_that_are_listed_are_read(form: str) -> None:
    if form not in formats():
        pytest.skip(f"this Pillow does not read {form}")
    content = encoded(photo(24, 24), form)
    assert decode(content, "x").size == (24, 24)
    assert begins_like_an_image(content[:16])
    assert all(is_image(f"a{ending.upper()}") for ending in formats()[form])


def test_one_function_opens_images() -> None:
    sources = Path(perdure.__file__).parent.rglob("*.py")
    calls = [
        file.name
        for file in sources
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert calls == ["preprocess.py"]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_columns_that_are_cropped_away_are_left_out_with_the_same_pixels(interpolation: Any) -> None:
    noise = np.random.default_rng(0)
    for width, height in ((71, 40), (40, 71), (300, 41), (64, 64), (13, 9)):
        image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for size, resize in ((28, 32), (28, 29), (28, 28), (32, 20)):
            wanted = Preprocess(size, resize, interpolation=interpolation)
            whole = image.resize(wanted._target(image), Image.Resampling[interpolation.upper()])
            left, top = (wanted._margin(side) for side in whole.size)
            expected = np.array(whole.crop((left, top, left + size, top + size)))
            assert torch.equal(wanted(image), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("seconds", [0.0, 60.0])  # an image that takes longer is decoded in a thread of its own
def test_slow_images_are_read_where_nothing_is_to_be_trained_and_may_be_trained_on(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_set, "_WORTH_A_THREAD", seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = ImageSet.queries([photo(40, 30) for _ in range(12)], PLAIN)
    with torch.inference_mode():
        asked = images.__getitems__(range(12))["image"]
    assert not asked.is_inference()
    assert torch.equal(asked, images.__getitems__(range(12))["image"])
