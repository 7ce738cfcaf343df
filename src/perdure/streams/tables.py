"""Streams from tables, parquet or CSV files: a folder of train and test files, or one file that is split."""

import csv as csv_format
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perdure.formatting import meant
from perdure.storage.schema import decode_json
from perdure.streams.columns import (
    LabelColumns,
    Names,
    TableFile,
    TablePart,
    class_label,
    classes_file,
    read_table,
    require_column,
)
from perdure.streams.naming import Role, role_of, told_role
from perdure.streams.options import Options, stream
from perdure.streams.parquet import batches
from perdure.streams.sources import Files, Parquet, check_images, check_path, is_text
from perdure.streams.task_split import LabelledData, arrange

_DELIMITERS = ",;\t|"
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")


@stream(arrange)
def parquet(
    options: Options, path: str, label: str = "label", image: str = "image", names: str | None = None
) -> Callable[[bool], LabelledData]:
    """Parquet files with images: a folder with `train*.parquet` and `test*.parquet` (or `val*`), or one file.

    Also the layouts of the hub: `data/train-*.parquet`, and `default/train/0000.parquet`. Without a test part, 20 % of
    each class are held out; which ones depends on file name and row only, never on the seed, so all runs are tested on
    the same images. Encoded images are read when first needed.

    Args:
        options: the common ones.
        path: folder or file.
        label: column of the class: integers or strings.
        image: column of the images: structs {bytes, path}, bytes, or paths relative to the file.
        names: column that names the class of an integer label. By itself found: ClassLabel names, `classes.json`
            beside the files, a column `<label>_name` or `class_name`.

    Raises:
        ValueError: when the folder, a column or a label is not as expected.
    """
    choice = LabelColumns(label, names, options.domain_column())
    return lambda measured: read_parquet(path, image, choice, measured)


@stream(arrange)
def csv(
    options: Options,
    path: str,
    label: str = "label",
    image: str = "image",
    names: str | None = None,
    images: str | None = None,
) -> Callable[[bool], LabelledData]:
    """CSV files with labels of images: a folder with `train*.csv` and `test*.csv` (or `val*`), or one file.

    The first line names the columns; they are divided by commas, semicolons or tabs. Otherwise as `parquet`.

    Args:
        options: the common ones.
        path: folder or file.
        label: column of the class: integers or strings.
        image: column of the images: paths relative to the file, or to the folder `images`.
        names: column that names the class of an integer label.
        images: the folder that paths of images are relative to; None: that of the file.

    Raises:
        ValueError: when a folder, a column or a label is not as expected.
    """
    choice = LabelColumns(label, names, options.domain_column())

    def read(measured: bool) -> LabelledData:
        if images is not None and not Path(images).is_dir():
            raise ValueError(f"images={images!r} is no folder: give the one that paths of images are relative to")
        parts = read_parts(Path(path), ".csv", image, measured, None if images is None else Path(images))
        return read_table(Path(path).name or path, parts, choice)

    return read


def read_parquet(path: str, image: str, choice: LabelColumns, measured: bool = False) -> LabelledData:
    """The data set in a folder of parquet files, or in one file; options as of `parquet`."""
    return read_table(Path(path).name or path, read_parts(Path(path), ".parquet", image, measured), choice)


def read_parts(path: Path, ending: str, image: str, measured: bool, images: Path | None = None) -> list[TablePart]:
    """The train and (when there is one) the test part of the files of that ending at `path`; see `table_files`.

    Paths of images in CSV files are relative to `images`, where it is given.
    """
    found = [files for files in table_files(path, ending, measured) if files]
    if ending == ".csv":
        return [_csv(files, image, images) for files in found]
    read = {".parquet": _parquet, ".jsonl": _json_lines}[ending]
    return [read(files, image) for files in found]


def table_files(path: Path, ending: str = ".parquet", measured: bool = False) -> tuple[list[Path], list[Path]]:
    """The files of the train part and of the test part; the latter are none when the data set is not split.

    Args:
        path: a file, a folder of files whose names begin or end with what they are for, or one of folders called so.
        ending: of the files.
        measured: whether the data is only measured: then a test part may stand alone.
    """
    if path.is_file():
        return [path], []
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"path={str(path)!r} does not exist{meant(path.name, here)}; give a folder or a {ending} file")
    files, roles = _listed(path, ending)
    if not files:
        raise ValueError(f"path={str(path)!r} holds no {ending} file; expected train*{ending} and test*{ending}")
    of = {role: [f for f, r in zip(files, roles, strict=True) if r == role] for role in ("train", "test", "val", None)}
    train, test, others = of["train"], of["test"] or of["val"], of[None]
    if measured and test:
        return test, []
    if test and not train and others:
        raise ValueError(
            f"path={str(path)!r} holds {test[0].name} and {others[0].name}, but no train*{ending}: rename "
            "the files to learn from, or give path= of one"
        )
    if train and others:
        raise ValueError(
            f"path={str(path)!r} holds {train[0].name} and {others[0].name}, whose name does not say what it is for: "
            f"rename it (train*{ending}, test*{ending}), or move it elsewhere"
        )
    return (train, test) if train and test else (train or test or files, [])


def holds(path: Path, ending: str) -> bool:
    """Whether `table_files` finds files of that ending in a folder."""
    return bool(_listed(path, ending)[0])


def _listed(path: Path, ending: str) -> tuple[list[Path], list[Role | None]]:
    """The files in a folder, in its folder `data`, or in folders called train, test and so on; and what each is for."""
    for folder in (path, path / "data"):
        if files := sorted(folder.glob(f"*{ending}")):
            stems = [file.name.removesuffix(ending) for file in files]
            return files, [role_of(stem, whole=False) or told_role(stem)[1] for stem in stems]
    folders = sorted({file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/*{ending}")})
    configurations = sorted({str(folder.parent) for folder in folders if role_of(folder.name)})
    if len(configurations) > 1:
        raise ValueError(f"path={str(path)!r} holds several data sets: give one of {', '.join(configurations)}")
    files = [file for folder in folders if configurations for file in sorted(folder.glob(f"*{ending}"))]
    return files, [role_of(file.parent.name) for file in files]


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of the data set at `path`."""
    return list(read_schema(table_files(path)[0][0]).names)


def read_schema(file: Path) -> pa.Schema:
    """Names and types of the columns of a parquet file."""
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a parquet file ({str(error).splitlines()[0]}); give another path") from error


def check_image_column(file: Path, image: str) -> None:
    """Raise a ValueError unless the column `image` of a parquet file is there and can hold images."""
    schema = read_schema(file)
    require_column(str(file), schema.names, image, "image")
    if not pq.read_metadata(file).num_rows:
        return
    kind = schema.field(image).type
    check_images(str(file), image, kind, None)
    check_images(str(file), image, kind, next(_cells(file, image), None))


def read_csv(file: Path) -> pa.Table:
    """The columns of a CSV file: texts, or integers where all of a column are.

    Raises:
        ValueError: when a line has another number of values than the first, which names the columns.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            head = opened.readline()
            opened.seek(0)
            reader = csv_format.reader(opened, delimiter=max(_DELIMITERS, key=head.count))
            names = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    raise ValueError(f"line {reader.line_num} has {len(row)} values, the first {len(names)} columns")
                rows += [row] if row else []
    except (ValueError, csv_format.Error) as error:
        raise ValueError(
            f"{file}: {error}; save it as UTF-8 with a line of names, and commas in texts quoted"
        ) from error
    if not rows:
        raise ValueError(f"{file} has no rows; choose another data set")
    columns: list[list[Any]] = [list(each) for each in zip(*rows, strict=True)]
    for i, texts in enumerate(columns):
        if all(map(_WHOLE.fullmatch, texts)):
            columns[i] = list(map(int, texts))
    return pa.table(dict(zip(names, columns, strict=True)))


def _csv(files: Sequence[Path], image: str, images: Path | None) -> TablePart:
    root = images or files[0].parent
    tables = [read_csv(file) for file in files]
    texts = {name for table in tables for name in table.column_names if is_text(table[name].type)}
    placed: list[str] = []
    made = []
    for file, table in zip(files, tables, strict=True):
        require_column(str(file), table.column_names, image, "image")
        # Numbers in one file are texts where another has a text in this column.
        fields = [pa.field(f.name, pa.string() if f.name in texts else f.type) for f in table.schema]
        cells = table.cast(pa.schema(fields))
        made.append(_file(file, len(cells), cells.column_names, cells.column))
        for row, path in enumerate(map(str, cells[image].to_pylist())):
            where = f"{made[-1].where(row)}: column {image!r} (image=)"
            if not path:
                raise ValueError(f"{where} is empty; expected the path of an image")
            check_path(path, where)
            placed.append(Path(os.path.relpath((images or file.parent) / path, root)).as_posix())
    return TablePart(made, Files(root, placed), range(len(placed)))


def _json_lines(files: Sequence[Path], image: str) -> TablePart:
    made: list[TableFile] = []
    paths: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
        # Not splitlines(): a caption may hold a line separator of Unicode.
        lines = {f"{file}, line {n}": line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
        rows = [decode_json(line.encode(), place, "write one object a line") for place, line in lines.items()]
        if strange := next((place for place, row in zip(lines, rows, strict=True) if not isinstance(row, dict)), None):
            raise ValueError(f"{strange}: expected an object, got {lines[strange]!r:.40}")
        if not rows:
            continue
        columns, places = list(rows[0]), list(lines)
        require_column(str(file), columns, image, "image")
        made.append(TableFile(str(file), len(rows), columns, partial(_json_column, rows), places.__getitem__))
        for place, path in zip(places, _json_column(rows, image), strict=True):
            where = f"{place}: column {image!r} (image=)"
            if not isinstance(path, str) or not path:
                raise ValueError(f"{where} is {path!r:.60}; expected the path of an image")
            check_path(path, where)
            paths.append(Path(path).as_posix())
    if not made:
        raise ValueError(f"{files[0]} has no rows; choose another data set")
    return TablePart(made, Files(files[0].parent, paths), range(len(paths)))


def _json_column(rows: Sequence[dict[str, Any]], column: str) -> list[Any]:
    return [row.get(column) for row in rows]


def _parquet(files: Sequence[Path], image: str) -> TablePart:
    made = []
    for file in files:
        check_image_column(file, image)
        schema = read_schema(file)
        count = pq.read_metadata(file).num_rows
        made.append(_file(file, count, schema.names, partial(_parquet_column, file), schema))
    source = Parquet(files, image)
    return TablePart(made, source, range(len(source)))


def _parquet_column(file: Path, column: str) -> pa.ChunkedArray:
    cells = pq.read_table(file, columns=[column])[column]
    return cells.cast(cells.type.value_type) if pa.types.is_dictionary(cells.type) else cells


def _file(
    file: Path,
    count: int,
    columns: Sequence[str],
    read: Callable[[str], pa.ChunkedArray],
    schema: pa.Schema | None = None,
) -> TableFile:
    def classes(column: str) -> Names | None:
        known = class_label(schema, column, file.name) if schema is not None else None
        return known or classes_file(file.parent, column)

    return TableFile(str(file), count, columns, read, lambda row: f"{file}, row {row}", classes)


def _cells(file: Path, image: str) -> Iterator[Any]:
    """What is in the column of the images, without the empty cells, from the beginning."""
    for piece in batches(file, 1, [image]):
        yield from (cell for cell in piece.column(0).to_pylist() if cell is not None)
