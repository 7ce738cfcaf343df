"""Classes and domains of a data set that is a table: from its columns to numbered names."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from perdure.formatting import meant
from perdure.storage.schema import decode_json
from perdure.streams.naming import class_name, natural, numbers
from perdure.streams.sources import Source, is_text
from perdure.streams.task_split import LabelledData, LabelledPart


@dataclass(frozen=True)
class Names:
    """What the values of a column stand for, and where that is written."""

    of: Mapping[Any, str]
    where: str


@dataclass(frozen=True)
class TableFile:
    """A file of a data set.

    It has `count` rows. `read` gives the cells of one of the `columns`, as arrow has them or as a list; `where` says
    file and row to people; `classes` is what the file knows of the integers in a column.
    """

    name: str
    count: int
    columns: Sequence[str]
    read: Callable[[str], Any]
    where: Callable[[int], str]
    classes: Callable[[str], Names | None] = lambda _: None


@dataclass(frozen=True)
class TablePart:
    """One part of a data set: some rows of its files, in the order of these, and the images of all."""

    files: Sequence[TableFile]
    source: Source
    rows: Sequence[int]

    def values(self, column: str, option: str) -> list[Any]:
        """The cells of a column; raises a ValueError when a file does not have it."""
        every: list[Any] = []
        for file in self.files:
            require_column(file.name, file.columns, column, option)
            cells = file.read(column)
            every += cells if isinstance(cells, list) else cells.to_pylist()
        return [every[row] for row in self.rows]

    def where(self, position: int) -> str:
        """File and row, for people."""
        row = self.rows[position]
        for file in self.files:
            if row < file.count:
                return file.where(row)
            row -= file.count
        raise IndexError(position)

    def take(self, positions: Sequence[int]) -> "TablePart":
        """The rows at `positions`."""
        return replace(self, rows=[self.rows[i] for i in positions])


@dataclass(frozen=True)
class LabelColumns:
    """Which columns hold what."""

    label: str
    names: str | None
    domain: str | None


def read_table(name: str, parts: Sequence[TablePart], choice: LabelColumns) -> LabelledData:
    """The data set whose parts are tables.

    Classes are the same where their names are: two files may number them differently, as long as each says how.

    Args:
        name: of the data set, for messages.
        parts: the train part, or all of it, and the test part if there is one.
        choice: of columns.

    Raises:
        ValueError: for a missing column, or one whose values cannot be classes.
    """
    labels, names, called = _numbered(name, parts, choice.label, "label", choice.names)
    domains: Sequence[list[int] | None] = [None] * len(parts)
    domain_names: tuple[str, ...] = ()
    if choice.domain is not None:
        domains, domain_names, _ = _numbered(name, parts, choice.domain, "domain", None)
    made = [LabelledPart.of(p.source, ids, places) for p, ids, places in zip(parts, labels, domains, strict=True)]
    return LabelledData(name, made[0], made[1] if len(made) > 1 else None, names, domain_names, numbers=called)


def require_column(name: str, columns: Sequence[str], column: str, option: str) -> None:
    """Raise a ValueError that names the columns when `column` is not one of them."""
    if column not in columns:
        hint = meant(column, columns) or meant(option, columns)
        raise ValueError(f"{name} has no column {column!r} ({option}=){hint}; its columns: {', '.join(columns)}")


def check_names(name: str, column: str, option: str, kind: pa.DataType) -> None:
    """Raise a ValueError unless a column of type `kind` can name classes or domains."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not is_text(kind) and not pa.types.is_integer(kind):
        raise ValueError(f"{name}: {option} column {column!r} holds {kind!s:.80}; expected integers or strings")


def class_label(schema: pa.Schema, column: str, where: str) -> Names | None:
    """Names of a ClassLabel column, from what the `datasets` library writes into parquet files."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return Names(dict(enumerate(facts["names"])), where) if facts["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def classes_file(folder: Path, column: str) -> Names | None:
    """Names from `classes.json` beside the data: a list, an object of names and numbers, or one of these a column.

    Raises:
        ValueError: when it is something else.
    """
    file = folder / "classes.json"
    if not file.is_file():
        return None
    facts = decode_json(file.read_bytes(), str(file), "repair or remove it")
    if isinstance(facts, dict) and facts and all(isinstance(each, list | dict) for each in facts.values()):
        keys = [k for k in facts if k == column] or [k for k in facts if column.startswith(k)]
        if not keys:
            return None
        facts = facts[keys[0]]
    of = _named(facts)
    if of is None:
        raise ValueError(
            f"{file}: expected a list of names, an object of names and their numbers, or one of these for each label "
            "column; repair or remove it"
        )
    return Names(of, file.name)


def _named(facts: Any) -> dict[int, str] | None:
    if isinstance(facts, list) and all(isinstance(each, str) for each in facts):
        return dict(enumerate(facts))
    if not isinstance(facts, dict) or not facts:
        return None
    keys, values = list(facts), list(facts.values())
    if all(isinstance(each, int) and not isinstance(each, bool) for each in values) and len(set(values)) == len(values):
        return dict(zip(values, keys, strict=True))
    called = numbers(keys)
    if called and all(isinstance(each, str) for each in values):
        return dict(zip(called, values, strict=True))
    return None


def _numbered(
    name: str, parts: Sequence[TablePart], column: str, option: str, naming: str | None
) -> tuple[list[list[int]], tuple[str, ...], tuple[int, ...] | None]:
    """Ids of each part's rows, the names of these, and the integers that the data has for them, if it has."""
    files = [file for part in parts for file in part.files]
    values = [_values(part, column, option) for part in parts]
    flat = [each for part in values for each in part]
    kinds = {type(v) for each in flat for v in each}
    if len(kinds) > 1:
        raise ValueError(f"{name}: column {column!r} holds integers in one part, strings in the other; make them equal")
    if not kinds:
        raise ValueError(f"{name} has no rows; choose another data set")
    if kinds == {str} and naming is None:
        named: list[Names | None] = [None] * len(files)
    else:
        named = [_names_in(*each, column, option, naming) for each in zip(files, flat, strict=True)]
    names, called, place = _joined(name, column, files, flat, named)
    ids = iter([of[v] for v in each] for each, of in zip(flat, place, strict=True))
    return [list(chain(*islice(ids, len(part.files)))) for part in parts], tuple(names), called


def _joined(
    name: str,
    column: str,
    files: Sequence[TableFile],
    values: Sequence[list[Any]],
    named: Sequence[Names | None],
) -> tuple[list[str], tuple[int, ...] | None, list[dict[Any, int]]]:
    """Names of all classes, their integers (None where files number them differently), and value -> id a file."""
    different = {v for each in values for v in each}
    known: list[Any] = natural(different) if isinstance(next(iter(different)), str) else sorted(different)
    agreed: dict[Any, str] = {}
    differing = False
    for each, names in zip(values, named, strict=True):
        for v in set(each) if names else ():
            differing |= names is not None and agreed.setdefault(v, names.of[v]) != names.of[v]
    if not differing:
        if unnamed := [v for v in known if agreed and v not in agreed]:
            raise ValueError(f"{name}: {column} {unnamed[0]} has no name in any file; name it, or remove its rows")
        texts = _distinct([agreed.get(v, str(v)) for v in known], known)
        called = numbers(list(map(str, known)))
        return texts, called, [{v: i for i, v in enumerate(known)}] * len(files)
    first = next(each for each in named if each)
    ids: dict[str, int] = {}
    place: list[dict[Any, int]] = []
    for file, each, names in zip(files, values, named, strict=True):
        own = {v: names.of[v] for v in set(each)} if names else {}
        if not names or len(set(own.values())) < len(own):
            other = f"{file.name} does not name them all, or two of them alike"
            raise ValueError(
                f"{name}: {column}: the files number the classes differently, and {other}; name all in each"
            )
        for v in sorted(own, key=lambda v: (first.of.get(v) != own[v], v)):
            ids.setdefault(own[v], len(ids))
        place.append({v: ids[own[v]] for v in own})
    return list(ids), None, place


def _names_in(file: TableFile, values: Sequence[Any], column: str, option: str, naming: str | None) -> Names | None:
    """What the values in a file stand for: by the column asked for, what the file knows, or a column that says so."""
    if naming is not None:
        require_column(file.name, file.columns, naming, "names")
        found = _agreeing(file, values, naming)
        if found is None:
            raise ValueError(
                f"{file.name}: column {naming!r} (names=) does not give each {option} one name; choose another"
            )
        return found
    if (known := file.classes(column)) is not None:
        if unnamed := [v for v in values if v not in known.of]:
            count, least = len(known.of), min(known.of, default=0)
            raise ValueError(
                f"{file.name}: {option} {unnamed[0]} has no name in {known.where} ({count} names, from {least}); name "
                "it there, or remove its rows"
            )
        return Names({v: class_name(known.of[v], f"{known.where}: name") for v in set(values)}, known.where)
    for guess in (f"{column}_name", "class_name" if option == "label" else f"{option}_name"):
        if guess in file.columns and (found := _agreeing(file, values, guess)):
            return found
    return None


def _values(part: TablePart, column: str, option: str) -> list[list[Any]]:
    """The column in each of the part's files, as integers or as names."""
    found = []
    for file in part.files:
        require_column(file.name, file.columns, column, option)
        cells = file.read(column)
        check_names(file.name, column, option, cells.type)
        values = cells.to_pylist()
        for row, value in enumerate(values):
            if value is None or value == "":
                shown = f"{option} column {column!r} is empty"
                raise ValueError(f"{file.where(row)}: {shown}; fill it or remove the row")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{file.where(row)}: {option} {value} stands for no {option}; remove the row")
        if values and isinstance(values[0], str):
            names = {text: class_name(text, f"{file.name}: {option}") for text in set(values)}
            values = [names[text] for text in values]
        found.append(values)
    return found


def _agreeing(file: TableFile, values: Sequence[int], naming: str) -> Names | None:
    names: dict[Any, str] = {}
    for value, text in zip(values, file.read(naming).to_pylist(), strict=True):
        if text is None or not str(text).strip():
            return None
        name = class_name(str(text), f"{file.name}: {naming}")
        if names.setdefault(value, name) != name:
            return None
    return Names(names, f"column {naming!r}")


def _distinct(names: list[str], values: Sequence[Any]) -> list[str]:
    # ImageNet has two classes "crane"; names tell classes apart wherever people meet them.
    count = Counter(names)
    return [f"{n} ({v})" if count[n] > 1 else n for n, v in zip(names, values, strict=True)]
