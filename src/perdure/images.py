"""Images as models want them: decoding, resizing and cropping to uint8 tensors; normalisation is the backbone's."""

import io
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Halving = Literal["floor", "round"]

# What Pillow's readers raise on damaged files; MemoryError and our own mistakes are not among them.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_EXTREME = 16


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names the file and the row."""


@dataclass(frozen=True)
class Preprocess:
    """A model's image processor as plain values, recorded with every run.

    Args:
        size: side of the square the model sees, in pixels.
        resize: length of the shorter side before the central crop, in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        interpolation: how pixels are resampled.
        squash: resize both sides to `resize` without keeping the aspect, as the processors of ViT and SigLIP do.
        halve: where the crop begins when the margins cannot be equal: "floor" as Hugging Face's processors do, "round"
            as torchvision and timm; one pixel apart.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    squash: bool = False
    halve: Halving = "floor"

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1 pixel")
        for name, known in (("interpolation", get_args(Interpolation)), ("halve", get_args(Halving))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as uint8 (3, size, size): upright, RGB, resized with antialiasing, cropped in the middle.

        Grey, palette, 16-bit and transparent images work, of any size; transparency is dropped, not blended, as the
        processors of the pre-trained models do.
        """
        image = _rgb(image)
        if not self.squash:
            image = _centre(image)
        image = image.resize(self._target(image), Image.Resampling[self.interpolation.upper()])
        if image.size != (self.size, self.size):
            left, top = (self._margin(side) for side in image.size)
            # Pillow fills with black what lies outside, as when `size` is more than `resize`.
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Width and height of the image when it is resized; rounded as torchvision does, which costs 2 s to import."""
        width, height = (self.resize if self.squash else int(self.resize * s / min(image.size)) for s in image.size)
        return width, height

    def _margin(self, side: int) -> int:
        if side < self.size:
            return -((self.size - side) // 2)
        return (side - self.size) // 2 if self.halve == "floor" else round((side - self.size) / 2)

    def describe(self) -> dict[str, Any]:
        """All values, as JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def described(cls, facts: dict[str, Any]) -> "Preprocess":
        """The same image processor, from what `describe` wrote.

        Raises:
            ValueError: when `facts` has an entry this version does not know: ignoring it would change the pixels.
        """
        if unknown := set(facts) - {f.name for f in fields(cls)}:
            raise ValueError(f"preprocess has an unknown entry {min(unknown)!r}: written by a newer perdure? upgrade")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return cls(**values)


def decode(source: bytes | str | Path | Image.Image, where: str) -> Image.Image:
    """The decoded image, upright according to its EXIF orientation.

    Args:
        source: encoded bytes, the path of a file, or an image (returned upright).
        where: file and row, for the message of the error.

    Raises:
        UnreadableImage: when there is no such file or its content is no image or damaged.
    """
    try:
        if isinstance(source, Image.Image):
            source.load()
            return _upright(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()
            return _upright(opened)
    except _DAMAGE as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or "damaged"
        remedy = "replace it, or leave it out with skip_bad"
        raise UnreadableImage(f"cannot read image {where}: {' '.join(reason.split())}; {remedy}") from error


def _centre(image: Image.Image) -> Image.Image:
    # The crop never looks further from the middle; resizing a strip of 1 × 10,000 pixels whole would take gigabytes.
    width, height = image.size
    longest = _EXTREME * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _upright(image: Image.Image) -> Image.Image:
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255: nearly everything would be white.
        grey = np.asarray(image).astype(np.int64)
        deep = image.mode != "I" or grey.max() > 255
        return Image.fromarray((grey >> 8 if deep else grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
