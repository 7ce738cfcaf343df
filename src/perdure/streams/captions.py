"""Streams of images with captions from parquet or JSONL files: retrieval by topic, or language after language."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.formatting import meant
from perdure.options.ranges import without_effect
from perdure.streams.columns import TablePart, require_column
from perdure.streams.options import TOPICS, CaptionOptions, stream
from perdure.streams.sources import Parquet, Source, identities
from perdure.streams.tables import holds, read_parts
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
        parts = read_tables(Path(path), image, measured)
        return captioned_data(Path(path).name or path, parts, columns, options.column)

    return read


def captioned_data(name: str, parts: Sequence[TablePart], columns: tuple[str, ...], by: str | None) -> CaptionedData:
    """The data set whose train and (perhaps) test part are tables; rows of the same image are one image.

    Raises:
        ValueError: for a missing column or caption, and when an image is in both parts.
    """
    told = identities([part.source for part in parts])
    keys = [_keys(part.source) for part in parts]
    if len(parts) > 1:
        learnt = {told[0][row] for row in parts[0].rows} - {None}
        if both := [row for row in parts[1].rows if told[1][row] in learnt]:
            raise ValueError(f"{name}: image {keys[1][both[0]]!r} is in train and in test; remove it from one of them")
    made = [_part(name, *each, columns, by) for each in zip(parts, told, keys, strict=True)]
    return with_each_caption_once(name, made, columns)


def _keys(source: Source) -> Sequence[str]:
    """What names each image wherever the data lies: its path, else file and row."""
    names = source.names() if isinstance(source, Parquet) and source.of_paths else [None] * len(source)
    return [source.key(row) if name is None else name for row, name in enumerate(names)]


def with_each_caption_once(
    name: str, parts: Sequence[CaptionedPart], columns: tuple[str, ...], **notes: Any
) -> CaptionedData:
    """The data set of these parts, with a remark where an image had a caption more than once in a column."""
    once = [
        replace(part, captions=[[list(dict.fromkeys(texts)) for texts in each] for each in part.captions])
        for part in parts
    ]
    before, after = (sum(len(t) for p in listed for each in p.captions for t in each) for listed in (parts, once))
    if gone := before - after:
        notes["remarks"] = [f"{gone} captions stand twice at the same image: each text of an image counts once"]
    return CaptionedData(name, once[0], once[1] if len(once) > 1 else None, columns, notes)


def read_tables(path: Path, image: str, measured: bool = False) -> list[TablePart]:
    """The train and (when there is one) the test part of the parquet, JSONL or CSV files at `path`.

    Data that is only `measured` is one part: its test part, or all of it.
    """
    ending = path.suffix
    if path.is_dir():
        found = [each for each in (".parquet", ".jsonl", ".csv") if holds(path, each)]
        if not found:
            raise ValueError(f"path={str(path)!r} holds no .parquet, .jsonl or .csv file; expected train.* and test.*")
        ending = found[0]
    elif ending not in (".jsonl", ".csv"):
        ending = ".parquet"
    return read_parts(path, ending, image, measured)


def _part(
    name: str,
    part: TablePart,
    told: Sequence[str | None],
    keys: Sequence[str],
    columns: tuple[str, ...],
    by: str | None,
) -> CaptionedPart:
    known = part.files[0].columns
    for column in columns:
        require_column(name, known, column, "captions")
    if by is not None and by not in known:
        raise ValueError(
            f"by={by!r}: {name} has no such column{meant(by, (*TOPICS, *known))}; expected 'clusters', 'random', "
            f"'natural', or a column: {', '.join(known)}"
        )
    positions: dict[str | int, list[int]] = {}
    for i, row in enumerate(part.rows):
        positions.setdefault(told[row] or row, []).append(i)
    images = list(positions.values())
    image_of = {i: number for number, each in enumerate(images) for i in each}
    texts: list[list[list[str]]] = [[[] for _ in columns] for _ in images]
    for c, column in enumerate(columns):
        for i, value in enumerate(part.values(column, "captions")):
            texts[image_of[i]][c] += _lines(value, column, part.where, i)
    topics = None if by is None else _topics(part, by, images)
    rows = [part.rows[each[0]] for each in images]
    return CaptionedPart(part.source, rows, [keys[row] for row in rows], texts, topics)


def _lines(value: Any, column: str, where: Callable[[int], str], row: int) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        shown = "is empty" if value is None else f"is {value!r:.60}"
        raise ValueError(f"{where(row)}: column {column!r} {shown}; expected a caption, or a list of captions")
    kept = [text.strip() for text in texts if text.strip()]
    if not kept:
        raise ValueError(f"{where(row)}: column {column!r} has no caption; write one or remove the row")
    return kept


def _topics(part: TablePart, by: str, images: Sequence[Sequence[int]]) -> list[str | int]:
    values = part.values(by, "by")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(f"{part.where(i)}: column {by!r} (by=) is {value!r:.60}; expected a name or an integer")
    for first, *others in images:
        if other := next((i for i in others if values[i] != values[first]), 0):
            raise ValueError(
                f"{part.where(other)}: column {by!r} (by=) is {values[other]!r}, but {values[first]!r} at the same "
                f"image in {part.where(first)}; give an image one topic"
            )
    return [values[first] for first, *_ in images]
