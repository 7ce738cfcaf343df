"""Files of conversations, entry by entry: JSON, JSONL, parquet and CSV, with the images that they name or hold."""

import base64
import binascii
import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from perdure.backbones.preprocess import UnreadableImage, decode
from perdure.formatting import meant, shortened
from perdure.options.paths import is_file
from perdure.streams.conversation_rows import Columns, records
from perdure.streams.conversations import Pictures, Record
from perdure.streams.parquet import batches
from perdure.streams.sources import Files, Parquet, Source, check_path
from perdure.streams.tables import check_image_column, read_csv, read_schema

ENDINGS = (".json", ".jsonl", ".parquet", ".csv")
_BLANK = re.compile(r"[ \t\r\n]*")
_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_PIECE = 256


class MissingImage(UnreadableImage):
    """An entry names an image that is not there."""


@dataclass(frozen=True)
class FileEntry:
    """One entry of a file: what it says, and where it stands, as `line 3`; `number` counts from 0."""

    value: Any
    place: str
    number: int


class Reader:
    """Reads files of conversations into records that share their images.

    Args:
        columns: under which names entries say what.
        images: the folder that paths of images are relative to; None: the file's own.
        skip_bad: whether entries that name a missing image are left out.
    """

    def __init__(self, columns: Columns, images: Path | None = None, skip_bad: bool = False) -> None:
        self.pictures = Pictures()
        self.left_out: list[str] = []
        """File and line of the entries that were left out."""
        self.remarks: list[str] = []
        """Of files that show no image, though they have columns that are not read."""
        self.columns = columns
        self._names: dict[str, dict[str, None]] = {}  # names that entries hold, by file
        self.images = images
        self.skip_bad = skip_bad
        self._files = Files("", [])
        self._inside = _Inside()
        self._known: dict[tuple[Path, str], int] = {}

    def read(
        self, file: Path, images: Path | None = None, amend: Callable[[Any, int], Any] | None = None
    ) -> list[Record]:
        """The records of a file, in its order.

        Args:
            file: its ending says what it is.
            images: the folder of its images, where it is another one than the reader's.
            amend: what to read in place of an entry, of the entry and its number.

        Raises:
            ValueError: for the first entry that is not as expected, with its file and line.
        """
        folder = images or self.images or file.parent
        found = self.records_of(self.entries(file), str(file), file.name, folder, amend)
        if not found:
            raise ValueError(f"{file} holds no conversation that can be read; choose another file")
        return found

    def records_of(
        self,
        entries: Iterable[FileEntry],
        name: str,
        key: str,
        folder: Path,
        amend: Callable[[Any, int], Any] | None = None,
    ) -> list[Record]:
        """The records of entries.

        Args:
            entries: in their order.
            name: what they stand in, for people.
            key: what it is called wherever it lies.
            folder: of their images.
            amend: see `read`.
        """
        found: list[Record] = []
        held = self._names.setdefault(name, {})
        for entry in entries:
            place = f"{name}, {entry.place}"
            try:
                value = amend(entry.value, entry.number) if amend else entry.value
                held |= dict.fromkeys(map(str, value)) if isinstance(value, Mapping) else {}
                found += records(
                    value, place, f"{key}:{entry.number}", lambda shown: self._shown(shown, folder), self.columns
                )
            except MissingImage as error:
                if not self.skip_bad:
                    raise MissingImage(f"{place}: {error}") from error
                self.left_out.append(place)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        unread = self.columns.unread(held)
        if found and unread and not any(record.images for record in found):
            names = shortened(", ".join(unread), 100)
            self.remarks.append(f"no images in {name}: only texts are read; columns that are not read: {names}")
        return found

    def check_named(self) -> None:
        """Raise a ValueError for a column that was named, and which no entry of all that was read has."""
        for option, name in self.columns.named.items():
            if not any(name in held for held in self._names.values()):
                file, held = next(iter(self._names.items()))
                raise ValueError(
                    f"{file}: no entry has {option}={name!r}{meant(name, held)}; it has: {', '.join(held) or 'nothing'}"
                )

    def entries(self, file: Path) -> Iterator[FileEntry]:
        """What stands in a file, one after another."""
        if file.suffix == ".parquet":
            return self._parquet(file)
        if file.suffix == ".csv":
            cells = read_csv(file).to_pylist()
            blank = ({name: None if value == "" else value for name, value in row.items()} for row in cells)
            return (FileEntry(row, f"row {i}", i) for i, row in enumerate(blank))
        return read_json(file)

    def _parquet(self, file: Path) -> Iterator[FileEntry]:
        names = read_schema(file).names
        image = next((name for name in self.columns.images if name in names), None)
        kind = None if image is None else read_schema(file).field(image).type
        listed = kind is not None and pa.types.is_list(kind)
        if image is not None and not listed:
            check_image_column(file, image)
        counts: list[int] = []
        source = None if image is None else (_Lists(file, image, counts) if listed else Parquet([file], image))
        number = 0
        try:
            for piece in batches(file, _PIECE):
                for row in piece.to_pylist():
                    if image is not None and source is not None:
                        cells = (row[image] or []) if listed else [row[image]]
                        first = sum(counts[-1:]) if listed else number
                        row[image] = [_cell(cell, source, first + i) for i, cell in enumerate(cells)]
                        counts.append(first + len(cells))
                    yield FileEntry(row, f"row {number}", number)
                    number += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}); get it again") from error

    def _shown(self, value: Any, folder: Path) -> list[int]:
        """Numbers of the images that stand in an entry."""
        if value is None or (isinstance(value, str) and not value):
            return []
        if isinstance(value, list | tuple):
            return [number for each in value for number in self._shown(each, folder)]
        if isinstance(value, _Cell):
            return [self.pictures.number(value.identity, lambda: (value.source, value.row), value.identity)]
        if isinstance(value, Image.Image):
            return [self._held(_png(value))]
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("path", "url", "image") if value.get(name)), None)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            said = " ".join(f"{value!r:.60}".split())
            raise ValueError(f"an image is {said}; expected the path of an image, or in Python a Pillow image")
        if (encoded := _decoded(value)) is not None:
            return [self._held(encoded)]
        if (folder, value) in self._known:
            return [self._known[folder, value]]
        check_path(value, "the image")
        path = os.path.normpath(folder / value)
        if not is_file(path):
            raise MissingImage(f"there is no image {value!r:.120} in {folder}, the folder of the images; add it")
        whole, key = str(Path(path).absolute()), value.replace("\\", "/")
        self._known[folder, value] = self.pictures.number(whole, lambda: self._file(path), key)
        return [self._known[folder, value]]

    def _held(self, encoded: bytes) -> int:
        identity = sha256(encoded).hexdigest()
        return self.pictures.number(identity, lambda: self._inside.add(encoded), identity)

    def _file(self, path: str) -> tuple[Source, int]:
        self._files.paths.append(path)
        return self._files, len(self._files) - 1


def _png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    decode(image, "of a conversation").save(written, "png")
    return written.getvalue()


def read_json(file: Path) -> Iterator[FileEntry]:
    """The entries of a JSON list, or of a file with an entry a line.

    Raises:
        ValueError: names file and line of what is not JSON.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} is no UTF-8 text ({error}); save it as UTF-8") from error
    begin = _after_blanks(text, 0)
    if text[begin : begin + 1] == "[":
        return _listed(file, text, begin + 1)
    return _by_line(file, text)


def json_lines(name: str, text: str) -> Iterator[FileEntry]:
    """The entries of a text with one a line, which stands in what is called `name`; raises as `read_json`."""
    return _by_line(Path(name), text)


def _by_line(file: Path, text: str) -> Iterator[FileEntry]:
    number = 0
    # Not splitlines(): a text may hold a line separator of Unicode.
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            value, end = _value(file, content, _after_blanks(content, 0), line)
            if content[end:].strip():
                raise _no_json(file, line, "something follows the entry")
            yield FileEntry(value, f"line {line}", number)
            number += 1


def _listed(file: Path, text: str, at: int) -> Iterator[FileEntry]:
    line, counted, number = 1, 0, 0
    at = _after_blanks(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, end = _value(file, text, at, line)
        yield FileEntry(value, f"line {line} (entry {number + 1})", number)
        number += 1
        at = _after_blanks(text, end)
        if text[at : at + 1] == ",":
            at = _after_blanks(text, at + 1)
            if text[at : at + 1] == "]":
                raise _no_json(file, line + text.count("\n", counted, at), "a comma before the end of the list")
        elif text[at : at + 1] != "]":
            raise _no_json(file, line + text.count("\n", counted, at), "no comma after an entry")
    if (rest := _after_blanks(text, at + 1)) < len(text):
        raise _no_json(file, 1 + text.count("\n", 0, rest), "something follows the list")


def _value(file: Path, text: str, at: int, line: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except RecursionError:
        why = "brackets are nested too deeply"
    except json.JSONDecodeError as error:
        line += text.count("\n", at, error.pos)
        why = error.msg
    except ValueError as error:  # a number of thousands of digits
        why = str(error)
    raise _no_json(file, line, why)


def _no_json(file: Path, line: int, why: str) -> ValueError:
    return ValueError(f"{file}, line {line}: it is not JSON ({why}); write a list, or one entry a line")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _decoded(text: str) -> bytes | None:
    """The image that a data URI holds; None for any other text."""
    if not (head := _URI.match(text)):
        return None
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the image {text[:40]!r}... is no base64 ({error}); correct it") from error


@dataclass(frozen=True)
class _Cell:
    """An image in a table; `identity` is that of its content."""

    identity: str
    source: Source
    row: int


def _cell(cell: Any, source: Source, row: int) -> Any:
    """What a cell of an image column shows: the image in it, or the path."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return _Cell(sha256(content).hexdigest(), source, row)
    return cell


class _Lists(Parquet):
    """Images in a column of lists; their rows are counted through. `ends` are filled while the file is read."""

    def __init__(self, file: Path, column: str, counts: list[int]) -> None:
        super().__init__([file], column)
        self._counts = counts

    def where(self, row: int) -> str:
        """The file and the row of the list."""
        return f"{self.files[0]}, row {bisect_right(self._counts, row)}"

    def _place(self, row: int) -> tuple[Path, int]:
        return self.files[0], bisect_right(self._counts, row)

    def _open(self) -> pa.ChunkedArray:
        return pc.list_flatten(super()._open())


class _Inside(Source):
    """Encoded images that stand in JSON."""

    def __init__(self) -> None:
        self._encoded: list[bytes] = []

    def add(self, encoded: bytes) -> tuple[Source, int]:
        """Keep an image; returns its place."""
        self._encoded.append(encoded)
        return self, len(self._encoded) - 1

    def __len__(self) -> int:
        return len(self._encoded)

    def where(self, row: int) -> str:
        """The number of the image."""
        return f"within the file (number {row})"

    def key(self, row: int) -> str:
        """The hash of the content."""
        return sha256(self._encoded[row]).hexdigest()

    def encoded(self, row: int) -> bytes:
        """The content."""
        return self._encoded[row]
