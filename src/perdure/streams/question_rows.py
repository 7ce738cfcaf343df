"""Rows of files of questions, JSON, JSON lines, TSV, CSV or parquet, with their images beside them or within."""

import base64
import binascii
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from perdure.backbones.preprocess import begins_like_an_image
from perdure.formatting import meant, room_for, shortened
from perdure.storage.schema import decode_json
from perdure.streams.parquet import batches
from perdure.streams.sources import check_path
from perdure.streams.tables import read_schema

ENDINGS = (".parquet", ".json", ".jsonl", ".tsv", ".csv")
_ENCODED = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_BLOCK = 1 << 28  # bytes; a row of a TSV file must fit, image and all


@dataclass(frozen=True, eq=False)
class Stored:
    """An image in a parquet file, read when it is wanted: an evaluation set is larger than a memory.

    Args:
        column: in which it stands.
        row: counted within the file.
        where: file and row, for people.
    """

    column: "_Column"
    row: int
    where: str

    def read(self) -> bytes | Path:
        """The encoded image.

        Raises:
            ValueError: when the cell holds none.
        """
        return _picture(self.column[self.row], self.column.file.parent, self.where)


EncodedImage = Path | bytes | Stored
"""An encoded image: its file, its bytes, or where they are stored."""


@dataclass(frozen=True)
class QuestionRow:
    """One row of a file.

    Args:
        where: file and line or row, for people.
        cells: by column.
        folder: to which paths of images are relative.
    """

    where: str
    cells: Mapping[str, Any]
    folder: Path

    def text(self, *columns: str) -> str:
        """The text in the first of these columns that is there.

        Raises:
            ValueError: when there is none of them, and for an empty cell.
        """
        column = self._column(columns)
        value = self.cells[column]
        if not isinstance(value, str | int) or not (text := str(value).strip()):
            raise ValueError(f"{self.where}: column {column!r} is {shortened(repr(value), 60)}; expected a text")
        return text

    def image(self, *columns: str) -> EncodedImage:
        """The image in the first of these columns that is there.

        Raises:
            ValueError: when it is none, and when its file is missing.
        """
        cell = self.cells[self._column(columns)]
        return cell if isinstance(cell, Stored) else _picture(cell, self.folder, self.where)

    def _column(self, columns: Sequence[str]) -> str:
        found = next((column for column in columns if column in self.cells), None)
        if found is None:
            near, known = meant(columns[0], self.cells), ", ".join(map(str, self.cells))
            wanted = " or ".join(map(repr, columns))
            raise ValueError(f"{self.where}: no column {wanted}{near}; there are: {shortened(known)}")
        return found


def question_files(path: Path) -> list[Path]:
    """The files of questions that a path means: itself, or the one in a folder, or the parts of one in parquet.

    Raises:
        ValueError: when there is none, or more than one.
    """
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ValueError(f"path={str(path)!r} is no file of questions; expected {', '.join(ENDINGS)}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"path={str(path)!r} does not exist; give a file of questions, or its folder")
    for depth in ("*", "*/*"):
        for ending in ENDINGS:
            files = sorted(path.glob(f"{depth}{ending}"))
            apart = {file.parent for file in files} if ending == ".parquet" else files
            if len(apart) > 1:
                raise ValueError(f"path={str(path)!r} holds several sets of questions; give one of {_few(apart)}")
            if files:
                return files
    raise ValueError(f"path={str(path)!r} holds no questions; expected a file that ends in {', '.join(ENDINGS)}")


def read_rows(path: Path, images: Sequence[str], folder: Path | None = None) -> list[QuestionRow]:
    """The rows of the files that `path` means.

    Args:
        path: of a file, or of a folder.
        images: columns that may hold images: paths, bytes, structs of both, or base64 as the public files have it.
        folder: to which paths are relative; that of the file when None.

    Raises:
        ValueError: for what cannot be read, in one line, with the file and the line.
    """
    rows = [row for file in question_files(path) for row in _rows(file, images)]
    if not rows:
        raise ValueError(f"path={str(path)!r} holds no questions; every file is empty")
    return rows if folder is None else [replace(row, folder=folder) for row in rows]


def _rows(file: Path, images: Sequence[str]) -> Iterator[QuestionRow]:
    if file.suffix == ".parquet":
        cells = _parquet(file, images)
    else:
        room_for(3 * file.stat().st_size, f"the content of {file}")  # as bytes, as texts, and decoded
        read = {".json": _json, ".jsonl": _json_lines}.get(file.suffix, _separated)
        cells = _with_repeated_images(read(file), images)
    for where, row in cells:
        yield QuestionRow(f"{file}, {where}", row, file.parent)


def _json(file: Path) -> list[tuple[str, dict[str, Any]]]:
    content = decode_json(file.read_bytes(), str(file), "expected a list of questions")
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a list of questions, got {shortened(repr(content), 60)}")
    return [(f"row {i}", _record(row, f"{file}, row {i}")) for i, row in enumerate(content)]


def _json_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = [(f"line {n}", line) for n, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    remedy = "write one object a line"
    return [(n, _record(decode_json(line, f"{file}, {n}", remedy), f"{file}, {n}")) for n, line in lines]


def _record(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a question, got {shortened(repr(row), 60)}")
    return row


def _separated(file: Path) -> list[tuple[str, dict[str, Any]]]:
    with file.open("rb") as opened:
        names = opened.readline().decode("utf-8-sig", "replace").strip().split("\t" if file.suffix == ".tsv" else ",")
    try:
        table = arrow_csv.read_csv(
            file,
            arrow_csv.ReadOptions(block_size=_BLOCK),
            arrow_csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys((name.strip('"') for name in names), pa.string())),
        )
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: {shortened(reason)}; save it as UTF-8 with a line of names") from error
    return [(f"row {i}", row) for i, row in enumerate(table.to_pylist())]


def _parquet(file: Path, images: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    names = read_schema(file).names
    with _damage_told(file):
        opened = pq.ParquetFile(file)
        lazy = [name for name in names if name in images and _holds_images(file, name)]
        cells = opened.read(columns=[name for name in names if name not in lazy]).to_pylist()
    columns = {name: _Column(file, name) for name in lazy}
    for i, row in enumerate(cells):
        row |= {name: Stored(column, i, f"{file}, row {i}") for name, column in columns.items()}
    return [(f"row {i}", row) for i, row in enumerate(cells)]


def _holds_images(file: Path, column: str) -> bool:
    """Whether the cells hold images and not only paths: these are read at once, for their files must be there."""
    first = next(batches(file, 1, [column]), None)
    cell = first[0][0].as_py() if first is not None and len(first) else None
    return not isinstance(cell, str) or _ENCODED.fullmatch(cell) is not None


class _Column:
    """A column of a parquet file; the latest row group that was read is kept, for rows are asked for in order."""

    def __init__(self, file: Path, name: str) -> None:
        self.file = file
        self.name = name
        self._lock = threading.Lock()
        self._first = 0
        self._group: Any = ()

    def __getitem__(self, row: int) -> Any:
        with self._lock, _damage_told(self.file):
            if not self._first <= row < self._first + len(self._group):
                opened = pq.ParquetFile(self.file)
                group, self._first = 0, 0
                while row >= self._first + opened.metadata.row_group(group).num_rows:
                    self._first += opened.metadata.row_group(group).num_rows
                    group += 1
                self._group = opened.read_row_group(group, columns=[self.name]).column(0)
            return self._group[row - self._first].as_py()


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    """Within, what pyarrow says of a damaged file becomes one line with its name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise ValueError(f"{file} is damaged ({reason}); download it again") from error


def _with_repeated_images(
    rows: list[tuple[str, dict[str, Any]]], images: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Images in place of the `index` of the row which has the same one: so VLMEvalKit's files write it."""
    by_index = {str(row.get("index")): row for _, row in rows}
    for _, row in rows:
        for name in images:
            if isinstance(cell := row.get(name), str) and cell in by_index:
                row[name] = by_index[cell].get(name)
    return rows


def _picture(cell: Any, folder: Path, where: str) -> bytes | Path:
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str) and _ENCODED.fullmatch(cell):
        try:
            cell = base64.b64decode(cell)
        except binascii.Error as error:
            raise ValueError(f"{where}: the image is no base64 text ({error}); download the file again") from error
    if isinstance(cell, str) and cell:
        check_path(cell, f"{where}: the image")
        if not (file := folder / cell).is_file():
            raise ValueError(f"{where}: the image {str(file)!r} is missing; unpack the images there, or give images=")
        return file
    if isinstance(cell, bytes) and begins_like_an_image(cell):
        return cell
    raise ValueError(f"{where}: expected an image, got {shortened(repr(cell), 60)}")


def _few(paths: Sequence[Path] | set[Path]) -> str:
    return shortened(", ".join(sorted(map(str, paths))), 300)
