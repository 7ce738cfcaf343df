"""Where images lie before they are decoded: files, rows of parquet files, rows of a hub data set, Python objects."""

import bisect
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from perdure.images import UnreadableImage, decode

Picture = Image.Image | np.ndarray[Any, Any] | str | Path | Tensor
"""An image in Python: Pillow, uint8 (H, W, 3) or (H, W) array, uint8 (3, H, W) tensor, or the path of a file."""


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

    def content(self, row: int) -> bytes:
        """What there is to decode: equal for equal images, whatever they are called and wherever they lie."""
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
        """The path of the file."""
        return str(self.root / self.paths[row])

    def key(self, row: int) -> str:
        """The path within the folder."""
        return self.paths[row].replace("\\", "/")

    def content(self, row: int) -> bytes:
        """The bytes of the file."""
        return (self.root / self.paths[row]).read_bytes()


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
        return _unpack(self._cell(row), self.where(row), self._place(row)[0].parent)

    def content(self, row: int) -> bytes:
        """The encoded image."""
        return _encoded(self._cell(row), self._place(row)[0].parent)

    def _cell(self, row: int) -> Any:
        with self._lock:
            if self._encoded is None:
                self._encoded = self._open()
        return self._encoded[row].as_py()

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
        return _unpack(self.data[row][self.column], self.where(row), Path())

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
        images: a sequence of images in any of the forms of `Picture`, or one uint8 tensor (n, 3, H, W).

    Raises:
        ValueError: when an image has another form; names its row.
    """

    def __init__(self, images: Sequence[Picture] | Tensor) -> None:
        if isinstance(images, Tensor) and (images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8):
            raise ValueError(
                f"images: got a {images.dtype} tensor of shape {tuple(images.shape)}, expected torch.uint8 "
                "(n, 3, H, W) with values 0-255"
            )
        self.images = images
        if not isinstance(images, Tensor):
            for row, image in enumerate(images):
                _check(image, row)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Image.Image:
        """The decoded image; raises `UnreadableImage`."""
        image = self.images[row]
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return decode(image, self.where(row))

    def where(self, row: int) -> str:
        """The row, and the file when there is one."""
        image = self.images[row]
        return f"{image} (row {row})" if isinstance(image, str | Path) else f"in row {row}"

    def key(self, row: int) -> str:
        """The row."""
        return str(row)

    def content(self, row: int) -> bytes:
        """The pixels."""
        return self.read(row).tobytes()


def _check(image: Any, row: int) -> None:
    if isinstance(image, Tensor):
        fits = image.dim() == 3 and image.shape[0] == 3 and image.dtype == torch.uint8
        form = f"a {image.dtype} tensor of shape {tuple(image.shape)}"
    elif isinstance(image, np.ndarray):
        fits = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)))
        form = f"a {image.dtype} array of shape {image.shape}"
    else:
        fits, form = isinstance(image, Image.Image | str | Path), f"a {type(image).__name__}"
    if not fits:
        raise ValueError(
            f"images, row {row}: got {form}, expected a Pillow image, a path, a uint8 array (H, W, 3) or a uint8 "
            "tensor (3, H, W) with values 0-255"
        )


def _unpack(cell: Any, where: str, folder: Path) -> Image.Image:
    if isinstance(cell, dict):
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if cell is None:
        raise UnreadableImage(f"cannot read image {where}: the cell is empty; fill it, or leave it out with skip_bad")
    return decode(folder / cell if isinstance(cell, str) else cell, where)


def _encoded(cell: Any, folder: Path) -> bytes:
    """The bytes of a cell's image; none of an empty cell, or of a file that is not there."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str):
        return (folder / cell).read_bytes() if (folder / cell).is_file() else b""
    return bytes(cell or b"")


def _memory_mapped(files: Sequence[Path], column: str) -> pa.ChunkedArray:
    from perdure.streams.hub import quietly  # `datasets` takes a second to import; small data never needs it

    with quietly() as datasets:
        data = datasets.load_dataset("parquet", data_files=[str(f) for f in files], columns=[column], split="train")
    return data.data.column(column)
