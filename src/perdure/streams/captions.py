"""Streams of images with captions from parquet or JSONL files: retrieval by topic, or language after language."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from perdure.formatting import meant
from perdure.options.ranges import without_effect
from perdure.storage.schema import plain
from perdure.streams.columns import require_column
from perdure.streams.options import TOPICS, CaptionOptions, stream
from perdure.streams.sources import Files, Parquet, Source, check_path, identities, is_text
from perdure.streams.tables import check_image_column, csv_images, holds, read_csv, read_schema, table_files
from perdure.streams.topics import CaptionedData, CaptionedPart, arrange_captions


@stream(arrange_captions)
def captions(
    options: CaptionOptions, path: str, captions: str | Sequence[str] = "captions", image: str = "image"
) -> Callable[[bool], CaptionedData]:
    """Images with captions: parquet, JSONL or CSV files, a folder with `train*` and `test*` (or `val*`), or one file.

    Each task is one topic; see `by`. With several caption columns each task is one language: the same images, the
    captions of one column, in the order written. Rows with the same image are one image with all of their captions.
    Without a test part, 20 % of the images are held out; which ones never depends on the seed.

    Args:
        options: the common ones of captioned images.
        path: folder or file.
        captions: column of the captions, a text or a list of texts; or several such columns, one a language.
        image: column of the images: in parquet encoded ones or paths, else paths; relative to the file.

    Raises:
        ValueError: when the folder, a column or a caption is not as expected.
    """
    columns = (captions,) if isinstance(captions, str) else tuple(captions)
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(f"captions={captions!r}: expected a column, or several different ones")
    if len(columns) > 1:
        own = {"by": options.by, "tasks": options.tasks, "embed": options.embed}
        without_effect("with several caption columns, one task each", **own)

    def read(measured: bool) -> CaptionedData:
        parts = read_listings(Path(path), image, measured)
        return captioned_data(Path(path).name or path, parts, columns, options.column)

    return read


@dataclass(frozen=True)
class Listing:
    """One part of a data set, row by row: its columns, and which image each row has.

    `identities` tell images apart; None stands for an image of its own. `keys` name images wherever the data lies.
    """

    columns: Sequence[str]
    values: Callable[[str], list[Any]]
    identities: Sequence[str | None]
    keys: Sequence[str]
    source: Source
    rows: Sequence[int]
    where: Callable[[int], str]

    def take(self, rows: Sequence[int]) -> "Listing":
        """Some of the rows."""
        return replace(
            self,
            values=lambda column: [values[row] for values in (self.values(column),) for row in rows],
            identities=[self.identities[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            rows=[self.rows[row] for row in rows],
            where=lambda row: self.where(rows[row]),
        )


def captioned_data(name: str, parts: Sequence[Listing], columns: tuple[str, ...], by: str | None) -> CaptionedData:
    """The data set whose train and (perhaps) test part are listed."""
    if len(parts) > 1:
        check_apart(name, *(part.identities for part in parts))
    return with_each_caption_once(name, [_part(name, part, columns, by) for part in parts], columns)


def with_each_caption_once(
    name: str, parts: Sequence[CaptionedPart], columns: tuple[str, ...], **notes: Any
) -> CaptionedData:
    """The data set of these parts, with a remark where an image had a caption more than once in a column."""
    once = [
        replace(part, captions=tuple([list(dict.fromkeys(each)) for each in column] for column in part.captions))
        for part in parts
    ]
    before, after = (sum(len(e) for p in listed for column in p.captions for e in column) for listed in (parts, once))
    if gone := before - after:
        notes["remarks"] = [f"{gone} captions stand twice at the same image: each text of an image counts once"]
    return CaptionedData(name, once[0], once[1] if len(once) > 1 else None, columns, notes)


def check_apart(name: str, train: Sequence[str | None], test: Sequence[str | None]) -> None:
    """Raise a ValueError when an image, told by what identifies it, is in train and in test."""
    learnt = {each for each in train if each is not None}
    if both := [each for each in test if each in learnt]:
        shown = str(both[0]).partition("\n")[0]
        raise ValueError(f"{name}: image {shown!r} is in train and in test; remove it from one of them")


def read_listings(path: Path, image: str, measured: bool = False) -> list[Listing]:
    """The train and (when there is one) the test part of the parquet, JSONL or CSV files at `path`.

    Data that is only `measured` is one part: its test part, or all of it.
    """
    ending = path.suffix
    if path.is_dir():
        found = [each for each in (".parquet", ".jsonl", ".csv") if holds(path, each)]
        if not found:
            raise ValueError(f"path={str(path)!r} holds no .parquet, .jsonl or .csv file; expected train.* and test.*")
        ending = found[0]
    parts = [files for files in table_files(path, ending, measured) if files]
    if ending == ".jsonl":
        return [_json_lines(files, image) for files in parts]
    if ending == ".csv":
        return [_csv(files, image) for files in parts]
    return _parquet(parts, image)


def _part(name: str, part: Listing, columns: tuple[str, ...], by: str | None) -> CaptionedPart:
    for column in columns:
        require_column(name, part.columns, column, "captions")
    if by is not None and by not in part.columns:
        known = ", ".join(part.columns)
        raise ValueError(
            f"by={by!r}: {name} has no such column{meant(by, (*TOPICS, *part.columns))}; expected 'clusters', "
            f"'random', 'natural', or a column: {known}"
        )
    place: dict[str, int] = {}
    first: list[int] = []
    image_of = []
    for row, identity in enumerate(part.identities):
        known_at = len(first) if identity is None else place.setdefault(identity, len(first))
        if known_at == len(first):
            first.append(row)
        image_of.append(known_at)
    texts = []
    for column in columns:
        of_image: list[list[str]] = [[] for _ in first]
        for row, value in enumerate(part.values(column)):
            of_image[image_of[row]] += _lines(value, column, part.where, row)
        texts.append(of_image)
    topics = None if by is None else _topics(part, by, image_of, first)
    return CaptionedPart(
        part.source, [part.rows[r] for r in first], [part.keys[r] for r in first], tuple(texts), topics
    )


def _lines(value: Any, column: str, where: Callable[[int], str], row: int) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        shown = "is empty" if value is None else f"is {value!r:.60}"
        raise ValueError(f"{where(row)}: column {column!r} {shown}; expected a caption, or a list of captions")
    kept = [text.strip() for text in texts if text.strip()]
    if not kept:
        raise ValueError(f"{where(row)}: column {column!r} has no caption; write one or remove the row")
    return kept


def _topics(part: Listing, by: str, image_of: list[int], first: list[int]) -> list[str | int]:
    topics: dict[int, str | int] = {}
    for row, value in enumerate(part.values(by)):
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(f"{part.where(row)}: column {by!r} (by=) is {value!r:.60}; expected a name or an integer")
        if topics.setdefault(image_of[row], value) != value:
            other = topics[image_of[row]]
            raise ValueError(
                f"{part.where(row)}: column {by!r} (by=) is {value!r}, but {other!r} in row {first[image_of[row]]} of "
                "the same image; give an image one topic"
            )
    return [topics[i] for i in range(len(first))]


def _json_lines(files: Sequence[Path], image: str) -> Listing:
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
        # Not splitlines(): a caption may hold a line separator of Unicode.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            row = plain(line.encode(), f"{file}, line {number}", "write one object a line")
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: expected an object, got {line!r:.40}")
            rows.append(row)
            places.append(f"{file}, line {number}")
    if not rows:
        raise ValueError(f"{files[0]} has no rows; choose another data set")
    columns = list(rows[0])
    require_column(str(files[0]), columns, image, "image")

    def values(column: str) -> list[Any]:
        return [row.get(column) for row in rows]

    for place, path in zip(places, values(image), strict=True):
        if not isinstance(path, str) or not path:
            raise ValueError(f"{place}: column {image!r} (image=) is {path!r:.60}; expected the path of an image")
        check_path(path, f"{place}: column {image!r} (image=)")
    paths = [str(Path(path).as_posix()) for path in values(image)]
    return Listing(
        columns, values, paths, paths, Files(files[0].parent, paths), range(len(paths)), lambda row: places[row]
    )


def _csv(files: Sequence[Path], image: str) -> Listing:
    tables = [read_csv(file) for file in files]
    source = csv_images(files, tables, image)
    places = [f"{file}, row {row}" for file, table in zip(files, tables, strict=True) for row in range(len(table))]

    def values(column: str) -> list[Any]:
        for file, table in zip(files, tables, strict=True):
            require_column(str(file), table.column_names, column, "captions")
        cells = [value for table in tables for value in table[column].to_pylist()]
        return [str(value) for value in cells] if any(isinstance(value, str) for value in cells) else cells

    columns = list(tables[0].column_names)
    return Listing(columns, values, source.paths, source.paths, source, range(len(places)), lambda row: places[row])


def _parquet(parts: Sequence[Sequence[Path]], image: str) -> list[Listing]:
    for file in (file for files in parts for file in files):
        check_image_column(file, image)
    schema = read_schema(parts[0][0])
    sources = [Parquet(files, image) for files in parts]
    listed = []
    for files, source, names in zip(parts, sources, identities(sources), strict=True):
        by_path = is_text(read_schema(files[0]).field(image).type)
        keys = [name if by_path and name is not None else source.key(row) for row, name in enumerate(names)]
        values = partial(_column, files)
        listed.append(Listing(schema.names, values, names, keys, source, range(len(names)), source.where))
    return listed


def _column(files: Sequence[Path], column: str) -> list[Any]:
    for file in files:
        require_column(str(file), read_schema(file).names, column, "captions")
    return [value for file in files for value in pq.read_table(file, columns=[column])[column].to_pylist()]
