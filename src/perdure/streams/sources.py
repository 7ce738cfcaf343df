"""Where images lie before they are decoded: files, rows of parquet files, rows of a hub data set, Python objects."""

import bisect
import itertools
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from perdure.backbones.preprocess import UnreadableImage, decode, head_of

_SHOWN = 80  # characters of a text that was taken for a path
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:")
# By how PNG, JPEG, GIF and WebP begin, or by a length that no path has.
_BASE64 = re.compile(r"((iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/-]{40,}|[\w+/-]{200,})=*\s*", re.ASCII)

Picture = Image.Image | np.ndarray[Any, Any] | str | Path | Tensor
"""An image in Python: Pillow, uint8 (H, W, 3) or grey array, uint8 (3, H, W) tensor, or the path of a file."""


class Source(Protocol):
    """Numbered images, read one by one from any thread; pickled, it holds references only."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        ...

    def where(self, row: int) -> str:
        """File and row, for people."""
        ...

    def key(self, row: int) -> str:
        """What identifies the image wherever the data set lies."""
        ...

    def encoded(self, row: int) -> bytes | Path:
        """What is decoded, or its file; of an image that was never encoded, its values."""
        ...


class Files:
    """Image files below a folder.

    Args:
        root: the folder.
        paths: relative to `root`.
    """

    def __init__(self, root: str | Path, paths: Sequence[str]) -> None:
        self.root = Path(root)
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        return decode(self.root / self.paths[row], self.where(row))

    def where(self, row: int) -> str:
        """The path of the file; bytes of it that are not UTF-8 are shown as numbers."""
        return os.fsencode(self.root / self.paths[row]).decode("utf-8", "backslashreplace")

    def key(self, row: int) -> str:
        """The path within the folder."""
        return self.paths[row].replace("\\", "/")

    def encoded(self, row: int) -> Path:
        """The file."""
        return self.root / self.paths[row]


class Parquet:
    """The image column of parquet files, read when the first image is asked for.

    Args:
        files: in the order in which their rows are numbered.
        column: structs {bytes, path}, bytes, or paths relative to the file's folder.
        memory: bytes of files up to which the encoded images are held in memory; None: a quarter of the machine's. Of
            larger ones `datasets` writes a memory-mapped copy to its own cache, once.
    """

    def __init__(self, files: Sequence[str | Path], column: str, memory: int | None = None) -> None:
        self.files = [Path(f) for f in files]
        self.column = column
        self.memory = memory
        self.ends: list[int] = list(itertools.accumulate(pq.read_metadata(f).num_rows for f in self.files))
        self._encoded: pa.ChunkedArray | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        return decode(self.encoded(row), self.where(row))

    def encoded(self, row: int) -> bytes | Path:
        """The content of the cell, or the file that it names; raises `UnreadableImage` for an empty one."""
        with self._lock:
            if self._encoded is None:
                self._encoded = self._open()
        return _unpacked(self._encoded[row].as_py(), self.where(row), self._place(row)[0].parent)

    def where(self, row: int) -> str:
        """The file and the row in it."""
        file, inside = self._place(row)
        return f"{file}, row {inside}"

    def key(self, row: int) -> str:
        """The file's name and the row in it."""
        file, inside = self._place(row)
        return f"{file.name}:{inside}"

    def _place(self, row: int) -> tuple[Path, int]:
        i = bisect.bisect_right(self.ends, row)
        return self.files[i], row - (self.ends[i - 1] if i else 0)

    def _open(self) -> pa.ChunkedArray:
        budget = psutil.virtual_memory().total // 4 if self.memory is None else self.memory
        if sum(f.stat().st_size for f in self.files) > budget:
            return _memory_mapped(self.files, self.column)
        tables = [pq.read_table(f, columns=[self.column], memory_map=True) for f in self.files]
        bare = [table.replace_schema_metadata() for table in tables]
        return pa.concat_tables(bare, promote_options="permissive")[self.column]


class Rows:
    """The image column of a data set of the `datasets` library.

    Args:
        data: a `datasets.Dataset` whose image column does not decode.
        column: structs {bytes, path}, bytes, or paths.
        name: what to call the data set in messages.
    """

    def __init__(self, data: Any, column: str, name: str) -> None:
        self.data = data
        self.column = column
        self.name = name

    def __len__(self) -> int:
        return len(self.data)

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        return decode(self.encoded(row), self.where(row))

    def encoded(self, row: int) -> bytes | Path:
        """The content of the cell, or the file that it names; raises `UnreadableImage` for an empty one."""
        return _unpacked(self.data[row][self.column], self.where(row), Path())

    def where(self, row: int) -> str:
        """The data set and the row."""
        return f"{self.name}, row {row}"

    def key(self, row: int) -> str:
        """The part's name and the row."""
        return f"{self.name.rpartition(' ')[2]}:{row}"

    def content(self, row: int) -> bytes:
        """The encoded image."""
        return _encoded(self.data[row][self.column], Path())


class Given:
    """Images handed over from Python.

    Args:
        images: a list (or another sequence, or a Series) of images in any of the forms of `Picture`, or one uint8
            tensor (n, 3, H, W).

    Raises:
        ValueError: when an image has another form; names its row.
    """

    def __init__(self, images: Sequence[Picture] | Tensor) -> None:
        if isinstance(images, Tensor) and (images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8):
            raise ValueError(
                f"images: got a {images.dtype} tensor of shape {tuple(images.shape)}, expected torch.uint8 "
                "(n, 3, H, W) with values 0-255"
            )
        self.images = images if isinstance(images, Tensor) else listed(images, "images")
        if isinstance(images, Tensor):
            if len(images):
                _check(images[0], 0)
            return
        for row, image in enumerate(self.images):
            _check(image, row)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        image = self.images[row]
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2:] == (1,) else image))
        return decode(image, self.where(row))

    def where(self, row: int) -> str:
        """The row, and the file when there is one."""
        image = self.images[row]
        return f"{image} (row {row})" if isinstance(image, str | Path) else f"in row {row}"

    def key(self, row: int) -> str:
        """The row."""
        return str(row)

    def encoded(self, row: int) -> bytes | Path:
        """The file, or the pixels."""
        image = self.images[row]
        if isinstance(image, str | Path):
            return Path(image)
        return np.asarray(image.cpu() if isinstance(image, Tensor) else image).tobytes()


def listed(values: Any, what: str) -> Any:
    """`values` as something with positions: a Series by position, whatever its index; lists and arrays as they are.

    Raises:
        ValueError: for what has no positions, such as a generator; `what` says what it should have been.
    """
    if hasattr(values, "iloc") and getattr(values, "ndim", 1) == 1:  # a Series, or an Index
        return list(values)
    keyed = isinstance(values, Mapping | Set | str | bytes) or hasattr(values, "iloc")
    if keyed or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise ValueError(f"{what}: got a {type(values).__name__}, expected a list, an array or a tensor")
    return values


def _check(image: Any, row: int) -> None:
    if isinstance(image, Tensor):
        fits = image.dim() == 3 and image.shape[0] == 3 and image.dtype == torch.uint8 and image.numel() > 0
        form = f"a {image.dtype} tensor of shape {tuple(image.shape)}"
    elif isinstance(image, np.ndarray):
        fits = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4)))
        fits = fits and image.size > 0
        form = f"a {image.dtype} array of shape {image.shape}"
    elif isinstance(image, Image.Image):
        fits, form = 0 not in image.size, f"a Pillow image of {image.size[0]} × {image.size[1]} pixels"
    else:
        fits, form = isinstance(image, str | Path), f"a {type(image).__name__}"
    if not fits:
        raise ValueError(
            f"images, row {row}: got {form}, expected a Pillow image, a path, a uint8 array (H, W, 3) or a uint8 "
            "tensor (3, H, W) with values 0-255 and at least one pixel"
        )


def check_images(name: str, column: str, kind: pa.DataType, first: Any) -> None:
    """Raise a ValueError unless a column of a table can hold images.

    Args:
        name: of the file.
        column: its name.
        kind: its type.
        first: the value of its first cell that is not empty, if there is one.
    """
    fits = _binary(kind) or _text(kind)
    if pa.types.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        held = [(_binary if name == "bytes" else _text, parts[name]) for name in ("bytes", "path") if name in parts]
        fits = bool(held) and all(fit(part) or pa.types.is_null(part) for fit, part in held)
    if not fits:
        raise ValueError(
            f"{name}: image column {column!r} holds {_shortened(str(kind))}; expected encoded bytes, {{bytes, path}} "
            "or paths"
        )
    path = first.get("path") if isinstance(first, dict) and first.get("bytes") is None else first
    if isinstance(path, str):
        check_path(path, f"{name}: image column {column!r}")


def check_path(path: str, where: str) -> None:
    """Raise a ValueError when a text that should be the path of an image is an address, or an image as base64."""
    if path.startswith("data:") or _BASE64.fullmatch(path):
        raise ValueError(f"{where} holds images as base64 text ({path[:12]}...); decode it to bytes, or to files")
    if _ADDRESS.match(path):
        raise ValueError(f"{where} holds addresses ({_shortened(path)}); download the images first")


def _binary(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _text(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _unpacked(cell: Any, where: str, folder: Path) -> bytes | Path:
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if cell is None:
        raise UnreadableImage(f"cannot read image {where}: the cell is empty; fill it, or remove the row")
    if isinstance(cell, str):
        try:
            check_path(cell, "the cell")
        except ValueError as error:
            raise UnreadableImage(f"cannot read image {where}: {error}") from error
        return folder / cell
    return bytes(cell)


def head(source: Source, row: int) -> bytes | None:
    """The first bytes of an encoded image, none where it is missing; None where the image is not encoded."""
    try:
        encoded = source.encoded(row)
    except UnreadableImage:
        return b""
    if isinstance(encoded, Path):
        return head_of(encoded)
    return None if isinstance(source, Given) else encoded


def _encoded(cell: Any, folder: Path) -> bytes:
    """The bytes of a cell's image; none of an empty cell, or of a file that is not there."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str):
        return (folder / cell).read_bytes() if (folder / cell).is_file() else b""
    return bytes(cell or b"")


def _memory_mapped(files: Sequence[Path], column: str) -> pa.ChunkedArray:
    with quietly() as datasets:
        data = datasets.load_dataset("parquet", data_files=[str(f) for f in files], columns=[column], split="train")
    return data.data.column(column)


@contextmanager
def quietly() -> Iterator[Any]:
    """The `datasets` library without progress bars; imported here, for it takes a second, and small data never needs it."""
    datasets = import_module("datasets")
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()
