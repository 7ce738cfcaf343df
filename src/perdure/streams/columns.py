"""Classes and domains of a data set that is a table: from its columns to numbered names."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from perdure.schema import plain
from perdure.streams.arrange import Found, Part
from perdure.streams.options import near
from perdure.streams.sources import Source


@dataclass(frozen=True)
class Table:
    """One part of a data set: all columns but the images as an arrow table, and the images."""

    cells: pa.Table
    source: Source


@dataclass(frozen=True)
class Choice:
    """Which columns hold what."""

    label: str
    names: str | None
    domain: str | None


def read_table(
    name: str, train: Table, test: Table | None, choice: Choice, classes: Callable[[str], Sequence[str] | None]
) -> Found:
    """The data set whose parts are tables.

    Args:
        name: of the data set, for messages.
        train: or all of it, when there is no test part.
        test: may be None.
        choice: of columns.
        classes: column -> names of the integers in it, where the data set knows them.

    Raises:
        ValueError: for a missing column, or one whose values cannot be classes.
    """
    parts = [train] if test is None else [train, test]
    labels, names = _numbered(name, parts, choice.label, "label", choice.names, classes)
    domains = [np.zeros(len(p.source), dtype=np.int64) for p in parts]
    domain_names: tuple[str, ...] = ()
    if choice.domain is not None:
        domains, domain_names = _numbered(name, parts, choice.domain, "domain", None, classes)
    made = [
        Part(p.source, np.arange(len(p.source)), label, domain)
        for p, label, domain in zip(parts, labels, domains, strict=True)
    ]
    return Found(name, made[0], made[1] if test is not None else None, names, domain_names)


def require_column(name: str, columns: Sequence[str], column: str, option: str) -> None:
    """Raise a ValueError that names the columns when `column` is not one of them."""
    if column not in columns:
        hint = near(column, columns) or near(option, columns)
        raise ValueError(f"{name} has no column {column!r} ({option}=){hint}; its columns: {', '.join(columns)}")


def class_label(schema: pa.Schema, column: str) -> list[str] | None:
    """Names of a ClassLabel column, from what the `datasets` library writes into parquet files."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return list(facts["names"]) if facts["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def classes_file(folder: Path, column: str) -> list[str] | None:
    """Names from `classes.json` beside the data: a list, or an object with a list for each label column."""
    file = folder / "classes.json"
    if not file.is_file():
        return None
    facts = plain(file.read_bytes(), str(file), "repair or remove it")
    if isinstance(facts, dict):
        keys = [k for k in facts if k == column] or [k for k in facts if column.startswith(k)]
        facts = facts[keys[0]] if keys else None
    if isinstance(facts, list) and all(isinstance(each, str) for each in facts):
        return facts
    return None


def _numbered(
    name: str,
    parts: Sequence[Table],
    column: str,
    option: str,
    naming: str | None,
    classes: Callable[[str], Sequence[str] | None],
) -> tuple[list[np.ndarray[Any, np.dtype[np.int64]]], tuple[str, ...]]:
    columns = list(parts[0].cells.column_names)
    for part in parts:
        require_column(name, part.cells.column_names, column, option)
    values = [_values(part, column, option) for part in parts]
    kinds = {type(v) for each in values for v in each}
    if len(kinds) > 1:
        raise ValueError(f"{name}: column {column!r} holds integers in one part, strings in the other; make them equal")
    known = sorted({v for each in values for v in each})
    if not known:
        raise ValueError(f"{name} has no rows; choose another data set")
    names = _from_column(name, parts, values, naming, option) if naming is not None else None
    given = None if names or kinds == {str} else classes(column)
    if given is not None:
        names = {v: given[v] if 0 <= v < len(given) else str(v) for v in known}
    for guess in (f"{column}_name", "class_name" if option == "label" else f"{option}_name"):
        if names is None and kinds == {int} and guess in columns:
            names = _agreeing(parts, values, guess)
    names = names or {v: str(v) for v in known}
    place = {v: i for i, v in enumerate(known)}
    numbered = [np.array([place[v] for v in each], dtype=np.int64) for each in values]
    return numbered, _distinct([names[v] for v in known], known)


def _values(part: Table, column: str, option: str) -> list[Any]:
    cells = part.cells[column]
    whole = pa.types.is_integer(cells.type)
    text = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
    if pa.types.is_dictionary(cells.type):
        return _values(Table(pa.table({column: cells.cast(cells.type.value_type)}), part.source), column, option)
    if cells.null_count:
        row = cells.is_null().index(True).as_py()
        raise ValueError(f"{part.source.where(row)}: {option} column {column!r} is empty; fill it or remove the row")
    if not whole and not text:
        shown = f" ({part.source.where(0)}: {cells[0].as_py()!r:.40})" if len(cells) else ""
        raise ValueError(f"{option} column {column!r} holds {cells.type}{shown}; expected integers or strings")
    return list(cells.to_pylist())


def _from_column(
    name: str, parts: Sequence[Table], values: Sequence[list[Any]], naming: str, option: str
) -> dict[Any, str]:
    for part in parts:
        require_column(name, part.cells.column_names, naming, "names")
    found = _agreeing(parts, values, naming)
    if found is None:
        raise ValueError(f"{name}: column {naming!r} (names=) does not give each {option} one name; choose another")
    return found


def _agreeing(parts: Sequence[Table], values: Sequence[list[Any]], naming: str) -> dict[Any, str] | None:
    names: dict[Any, str] = {}
    for part, each in zip(parts, values, strict=True):
        if naming not in part.cells.column_names:
            return None
        for value, text in zip(each, part.cells[naming].to_pylist(), strict=True):
            if text is None or names.setdefault(value, str(text)) != str(text):
                return None
    return names


def _distinct(names: list[str], values: Sequence[Any]) -> tuple[str, ...]:
    # ImageNet has two classes "crane"; names tell classes apart wherever people meet them.
    count = Counter(names)
    return tuple(f"{n} ({v})" if count[n] > 1 else n for n, v in zip(names, values, strict=True))
