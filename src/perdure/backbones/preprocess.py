"""Images as models want them: decoding, resizing and cropping to uint8 tensors; normalisation is the backbone's."""

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Halving = Literal["floor", "round"]

# What Pillow's readers raise on damaged files; MemoryError and our own mistakes are not among them.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_EXTREME = 16

# Pillow knows forty more, among them EPS, for which it starts Ghostscript whatever the file is called.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "HEIF")
_HEAD = 16
"""Bytes at the start of a file by which its format is known."""
_TWELVE_BITS = 4096


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

    def at(self, size: int) -> "Preprocess":
        """The same for a model that sees `size` pixels."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))

    def sides(self) -> dict[str, Any]:
        """Its sizes as an image processor of transformers writes them."""
        square = {"height": self.size, "width": self.size}
        size = {"height": self.resize, "width": self.resize} if self.squash else {"shortest_edge": self.resize}
        cropped = {"crop_size": square} if not self.squash or self.resize != self.size else {}
        return {"size": size, **cropped}

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as uint8 (3, size, size): upright, RGB, resized with antialiasing, cropped in the middle.

        Every mode of Pillow works, of any size; transparency is dropped, not blended, as the processors of the
        pre-trained models do.

        Raises:
            ValueError: when it is not known which of the image's values is white; see `rgb`.
        """
        image = rgb(_upright(image))
        if not self.squash:
            image = _centre(image)
        (width, height), how = self._target(image), Image.Resampling[self.interpolation.upper()]
        left, top = self._margin(width), self._margin(height)
        # Pillow fills with black what lies outside, as when `size` is more than `resize`.
        if left > 0 and how is not Image.Resampling.NEAREST:
            # Pillow resizes rows, then columns: of these only those that are kept, with the same result to the bit
            image = image.resize((width, image.height), how).crop((left, 0, left + self.size, image.height))
            left, width = 0, self.size
        image = image.resize((width, height), how)
        if image.size != (self.size, self.size):
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


@functools.cache
def formats() -> dict[str, tuple[str, ...]]:
    """The image formats that this installation reads, by Pillow's names, each with its usual endings."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    endings = Image.registered_extensions()  # makes Pillow load its readers
    known = [name for name in _FORMATS if name in Image.OPEN and (name != "AVIF" or features.check("avif"))]
    return {name: tuple(sorted(ending for ending, of in endings.items() if of == name)) for name in known}


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(ending for endings in formats().values() for ending in endings)


def is_image(name: str) -> bool:
    """Whether a file called `name` is taken for an image when a folder is read."""
    return ("." + name.rpartition(".")[2]).lower() in _endings()


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first bytes of a file (16 are enough) are those of a format that is read; costs microseconds."""
    return any(accept is None or accept(head[:_HEAD]) for accept in (Image.OPEN[name][1] for name in formats()))


def first_bytes(file: str | Path) -> bytes:
    """The first bytes of a file, for `begins_like_an_image`; none when it cannot be read."""
    try:
        with Path(file).open("rb") as opened:
            return opened.read(_HEAD)
    except OSError:
        return b""


def decode(source: bytes | str | Path | Image.Image, where: str) -> Image.Image:
    """The decoded image: RGB, upright according to its EXIF orientation.

    Args:
        source: encoded bytes, the path of a file, or an image.
        where: file and row, for the message of the error.

    Raises:
        UnreadableImage: when there is no such file, or its content is damaged, of no format in `formats`, or of values
            whose range is not known.
    """
    try:
        if isinstance(source, Image.Image):
            source.load()
            return rgb(_upright(source))
        known = tuple(formats())
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known) as opened:
            opened.load()
            return rgb(_upright(opened))
    except _DAMAGE as error:
        reason = str(getattr(error, "strerror", None) or error) or "damaged"
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image ({', '.join(formats())})"
        raise UnreadableImage(f"cannot read image {where}: {' '.join(reason.split())}; replace or remove it") from error


@contextmanager
def skippable(how: str) -> Iterator[None]:
    """Within, the message of an unreadable image also says how to leave it out: a flag or an option."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f"{error}, or leave it out with {how}") from error


def rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB.

    Modes of more than 8 bits a channel have a white of their own: 65,535 for 16 bits, and for 32-bit integers that were
    read from PNM; 1 for floating-point numbers; 255 for other 32-bit integers. Values beyond it, or 16-bit ones that
    use 12 bits at most, would come out white or black: what is white there, nobody says.

    Raises:
        ValueError: for such an image, with its mode and values.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    whole = image.mode != "F"
    known = image.format in ("PPM", "PNG") and image.mode == "I"
    white = 1 if not whole else 65535 if known or image.mode.startswith("I;16") else 255
    dark = image.mode.startswith("I;16") and 0 < high < _TWELVE_BITS
    if dark or not 0 <= low <= high <= white:
        shown = f"{low:g} to {high:g}, where 0 is black and {white} white"
        raise ValueError(f"an image of mode {image.mode} with values from {shown}: save it as 8 bit")
    if whole:
        return (values.astype(np.int64) >> (8 if white > 255 else 0)).astype(np.uint8)
    return np.asarray((values * 255).round(), dtype=np.uint8)


def _centre(image: Image.Image) -> Image.Image:
    # The crop never looks further from the middle; resizing a strip of 1 × 10,000 pixels whole would take gigabytes.
    width, height = image.size
    longest = _EXTREME * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which a copy loses
    return turned
