"""Where images lie before they are decoded: files, rows of parquet files, Python objects; and which are the same."""

import bisect
import itertools
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from perdure.backbones.preprocess import UnreadableImage, decode, first_bytes
from perdure.formatting import shortened
from perdure.streams.parquet import batches, memory_mapped

_CHUNK = 256
_SHOWN = 80  # characters of a text that was taken for a path
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:")
# By how PNG, JPEG, GIF and WebP begin, or by a length that no path has.
_BASE64 = re.compile(r"((iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/-]{40,}|[\w+/-]{200,})=*\s*", re.ASCII)

Picture = Image.Image | np.ndarray[Any, Any] | str | Path | Tensor
"""An image in Python: Pillow, uint8 (H, W, 3) or grey array, uint8 (3, H, W) tensor, or the path of a file."""


class Source(ABC):
    """Numbered images, read one by one from any thread; pickled, it holds references only."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, row: int) -> str:
        """File and row, for people."""

    @abstractmethod
    def key(self, row: int) -> str:
        """What identifies the image wherever the data set lies."""

    def identity(self, row: int) -> str:
        """What tells the image apart in all data sets, by place: its file's whole path; "" where that is not known."""
        return ""

    @abstractmethod
    def encoded(self, row: int) -> bytes | Path:
        """What is decoded, or its file; of an image that was never encoded, its values. Raises `UnreadableImage`."""

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        return decode(self.encoded(row), self.where(row))

    def names(self) -> Sequence[str | None]:
        """What each image is called where it is stored; None for one without a name."""
        return [None] * len(self)


class Files(Source):
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

    def where(self, row: int) -> str:
        """The path of the file; bytes of it that are not UTF-8 are shown as numbers."""
        return os.fsencode(self.root / self.paths[row]).decode("utf-8", "backslashreplace")

    def key(self, row: int) -> str:
        """The path within the folder."""
        return self.paths[row].replace("\\", "/")

    def identity(self, row: int) -> str:
        """The whole path."""
        return _whole(self.root / self.paths[row])

    def encoded(self, row: int) -> Path:
        """The file."""
        return self.root / self.paths[row]

    def names(self) -> list[str | None]:
        """What a file has for a name on its disk, so that links to it are seen to be the same."""
        return [_inode(self.root / path) for path in self.paths]


class Parquet(Source):
    """The image column of parquet files, read when the first image is asked for.

    Args:
        files: in the order in which their rows are numbered.
        column: structs {bytes, path}, bytes, or paths relative to the file's folder.
        memory: bytes of files up to which the encoded images are held in memory; None: a quarter of the machine's, or
            half of what is free when that is less. Of larger ones `datasets` writes a memory-mapped copy to its own
            cache, once, a group of rows at a time.
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

    def encoded(self, row: int) -> bytes | Path:
        """The content of the cell, or the file that it names; raises `UnreadableImage` for an empty one."""
        with self._lock:
            if self._encoded is None:
                self._encoded = self._open()
        return unpacked(self._encoded[row].as_py(), self.where(row), self._place(row)[0].parent)

    def where(self, row: int) -> str:
        """The file and the row in it."""
        file, inside = self._place(row)
        return f"{file}, row {inside}"

    def key(self, row: int) -> str:
        """The file's name and the row in it."""
        file, inside = self._place(row)
        return f"{file.name}:{inside}"

    def identity(self, row: int) -> str:
        """The whole path of the image's file, or the table's and the row."""
        file, inside = self._place(row)
        if not self.of_paths:
            return f"{_whole(file)}, row {inside}"
        try:
            return _whole(Path(str(self.encoded(row))))
        except UnreadableImage:
            return ""

    @cached_property
    def of_paths(self) -> bool:
        """Whether the column holds paths only."""
        return is_text(pq.read_schema(self.files[0]).field(self.column).type)

    def names(self) -> list[str | None]:
        """The path in each cell, without a look at the images."""
        return [name for file in self.files for name in _paths(file, self.column)]

    def contents(self, often: Set[str]) -> list[str | None]:
        """The same, of images called as in `often` with a digest of their bytes: "0.jpg" may be another folder's."""
        names: list[str | None] = []
        # Read in pieces, for images are large.
        for file in self.files:
            for piece in batches(file, _CHUNK, [self.column]):
                for cell in piece.column(0).to_pylist():
                    path, encoded = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else (cell, None)
                    digest = f"\n{sha256(encoded).hexdigest()}" if path in often and encoded is not None else ""
                    names.append(path and path + digest)
        return names

    def _place(self, row: int) -> tuple[Path, int]:
        i = bisect.bisect_right(self.ends, row)
        return self.files[i], row - (self.ends[i - 1] if i else 0)

    def _open(self) -> pa.ChunkedArray:
        budget = spare_memory() if self.memory is None else self.memory
        if sum(f.stat().st_size for f in self.files) > budget:
            return memory_mapped(self.files, self.column)
        tables = [pq.read_table(f, columns=[self.column], memory_map=True) for f in self.files]
        bare = [table.replace_schema_metadata() for table in tables]
        return pa.concat_tables(bare, promote_options="permissive")[self.column]


class InMemory(Source):
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

    def identity(self, row: int) -> str:
        """The whole path of a file."""
        image = self.images[row]
        return _whole(Path(image)) if isinstance(image, str | Path) else ""

    def encoded(self, row: int) -> bytes | Path:
        """The file, or the pixels."""
        image = self.images[row]
        if isinstance(image, str | Path):
            return Path(image)
        return np.asarray(image.cpu() if isinstance(image, Tensor) else image).tobytes()


def spare_memory() -> int:
    """Bytes that one kind of data may take: a quarter of the machine's memory, or half of what is free if less."""
    memory = psutil.virtual_memory()
    return int(min(memory.total // 4, memory.available // 2))


def identities(parts: Sequence[Source]) -> list[Sequence[str | None]]:
    """What tells the images of the parts of a data set apart; None for an image that is taken for one of its own."""
    named = [part.names() for part in parts]
    often = {name for name, n in Counter(itertools.chain(*named)).items() if name is not None and n > 1}
    return [
        part.contents(often) if isinstance(part, Parquet) and not often.isdisjoint(names) else names
        for part, names in zip(parts, named, strict=True)
    ]


def told_shared(train: Source, test: Source) -> list[str]:
    """A remark where test images are train images too: the same file, or the same name and content in a table."""
    learnt, tested = identities([train, test])
    known = set(learnt) - {None}
    count = sum(each in known for each in tested)
    shared = f"{count} of {len(tested)} test images are train images too, and test only what is known by heart"
    return [f"{shared}: remove them from one of the two"] if count else []


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
    fits = _binary(kind) or is_text(kind)
    if pa.types.is_struct(kind):
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        held = [(_binary if name == "bytes" else is_text, parts[name]) for name in ("bytes", "path") if name in parts]
        fits = bool(held) and all(fit(part) or pa.types.is_null(part) for fit, part in held)
    if not fits:
        raise ValueError(
            f"{name}: image column {column!r} holds {shortened(str(kind), _SHOWN)}; expected encoded bytes, "
            "{bytes, path} or paths"
        )
    path = first.get("path") if isinstance(first, dict) and first.get("bytes") is None else first
    if isinstance(path, str):
        check_path(path, f"{name}: image column {column!r}")


def check_path(path: str, where: str) -> None:
    """Raise a ValueError when a text that should be the path of an image is an address, or an image as base64."""
    if path.startswith("data:") or _BASE64.fullmatch(path):
        raise ValueError(f"{where} holds images as base64 text ({path[:12]}...); decode it to bytes, or to files")
    if _ADDRESS.match(path):
        raise ValueError(f"{where} holds addresses ({shortened(path, _SHOWN)}); download the images first")


def _binary(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def unpacked(cell: Any, where: str, folder: Path) -> bytes | Path:
    """The content of a table's cell, or the file that it names; raises `UnreadableImage` for an empty one."""
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
        return first_bytes(encoded)
    return None if isinstance(source, InMemory) else encoded


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of type `kind` holds texts."""
    return any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _paths(file: Path, column: str) -> list[str | None]:
    kind = pq.read_schema(file).field(column).type
    if is_text(kind):
        return list(pq.read_table(file, columns=[column])[column].to_pylist())
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        cells = pq.ParquetFile(file).read(columns=[f"{column}.path"])[column]
        return [cell and cell["path"] for cell in cells.to_pylist()]
    return [None] * int(pq.read_metadata(file).num_rows)


def _whole(path: Path) -> str:
    return str(Path(os.path.normpath(path)).absolute())


def _inode(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:  # told when it is read
        return str(file)
    return f"{status.st_dev}:{status.st_ino}"
