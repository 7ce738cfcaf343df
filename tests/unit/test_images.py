"""Decoding and preprocessing."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.images import Preprocess, UnreadableImage, decode

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
