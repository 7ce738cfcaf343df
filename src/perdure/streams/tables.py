"""Streams from tables, parquet or CSV files: a folder of train and test files, or one file that is split."""

import csv as csv_format
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perdure.formatting import meant
from perdure.streams.columns import (
    LabelColumns,
    Names,
    TableFile,
    TablePart,
    check_names,
    class_label,
    classes_file,
    read_table,
    require_column,
)
from perdure.streams.naming import Role, role_of
from perdure.streams.options import Options, stream
from perdure.streams.sources import Files, Parquet, check_images, check_path
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
    options: Options, path: str, label: str = "label", image: str = "image", names: str | None = None
) -> Callable[[bool], LabelledData]:
    """CSV files with labels of images: a folder with `train*.csv` and `test*.csv` (or `val*`), or one file.

    The first line names the columns; they are divided by commas, semicolons or tabs. Otherwise as `parquet`.

    Args:
        options: the common ones.
        path: folder or file.
        label: column of the class: integers or strings.
        image: column of the images: paths relative to the file.
        names: column that names the class of an integer label.

    Raises:
        ValueError: when the folder, a column or a label is not as expected.
    """
    choice = LabelColumns(label, names, options.domain_column())

    def read(measured: bool) -> LabelledData:
        parts = [_csv_part(files, image) for files in table_files(Path(path), ".csv", measured) if files]
        return read_table(Path(path).name or path, parts, choice)

    return read


def read_parquet(path: str, image: str, choice: LabelColumns, measured: bool = False) -> LabelledData:
    """The data set in a folder of parquet files, or in one file; options as of `parquet`."""
    parts = [_table(files, image, choice) for files in table_files(Path(path), measured=measured) if files]
    return read_table(Path(path).name or path, parts, choice)


def table_files(path: Path, ending: str = ".parquet", measured: bool = False) -> tuple[list[Path], list[Path]]:
    """The files of the train part and of the test part; the latter are none when the data set is not split.

    Args:
        path: a file, a folder of files whose names begin with what they are for, or one of folders called so.
        ending: of the files.
        measured: whether the data is only measured: then a test part may stand alone.
    """
    if path.is_file():
        return [path], []
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"path={str(path)!r} does not exist{meant(path.name, here)}; give a folder or a {ending} file")
    for folder in (path, path / "data"):
        if files := sorted(folder.glob(f"*{ending}")):
            roles = [role_of(file.name.removesuffix(ending), whole=False) for file in files]
            return _divided(folder, files, roles, ending, measured)
    folders = sorted({file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/*{ending}")})
    configurations = sorted({folder.parent for folder in folders if role_of(folder.name)})
    if len(configurations) > 1:
        shown = ", ".join(str(each) for each in configurations)
        raise ValueError(f"path={str(path)!r} holds several data sets: give one of {shown}")
    if configurations:
        files = [file for folder in folders for file in sorted(folder.glob(f"*{ending}"))]
        return _divided(path, files, [role_of(file.parent.name) for file in files], ending, measured)
    raise ValueError(f"path={str(path)!r} holds no {ending} file; expected train*{ending} and test*{ending}")


def holds(folder: Path, ending: str) -> bool:
    """Whether `table_files` would find files of that ending in a folder."""
    return any(any(folder.glob(f"{depth}*{ending}")) for depth in ("", "data/")) or any(
        role_of(file.parent.name) for depth in ("*/", "*/*/") for file in folder.glob(f"{depth}*{ending}")
    )


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


def csv_images(files: Sequence[Path], tables: Sequence[pa.Table], image: str) -> Files:
    """The images that a column of CSV files names."""
    placed: list[str] = []
    for file, table in zip(files, tables, strict=True):
        require_column(str(file), table.column_names, image, "image")
        for row, path in enumerate(map(str, table[image].to_pylist())):
            if not path:
                raise ValueError(
                    f"{file}, row {row}: column {image!r} (image=) is empty; expected the path of an image"
                )
            check_path(path, f"{file}, row {row}: column {image!r} (image=)")
            placed.append(Path(os.path.relpath(file.parent / path, files[0].parent)).as_posix())
    return Files(files[0].parent, placed)


def _csv_part(files: Sequence[Path], image: str) -> TablePart:
    tables = [read_csv(file) for file in files]
    source = csv_images(files, tables, image)
    pieces = [_piece(file, table, None) for file, table in zip(files, tables, strict=True)]
    return TablePart(pieces, source)


def _table(files: Sequence[Path], image: str, choice: LabelColumns) -> TablePart:
    pieces = []
    for file in files:
        check_image_column(file, image)
        schema = read_schema(file)
        wanted = {"label": choice.label, "domain": choice.domain, "names": choice.names}
        for option, column in ((option, column) for option, column in wanted.items() if column is not None):
            require_column(str(file), schema.names, column, option)
            if option != "names":
                check_names(str(file), column, option, schema.field(column).type)
        kept = [c for c in schema.names if c != image and _plain(schema.field(c).type)]
        pieces.append(_piece(file, pq.read_table(file, columns=kept), schema))
    return TablePart(pieces, Parquet(files, image))


def _piece(file: Path, cells: pa.Table, schema: pa.Schema | None) -> TableFile:
    def classes(column: str) -> Names | None:
        known = class_label(schema, column, file.name) if schema is not None else None
        return known or classes_file(file.parent, column)

    return TableFile(str(file), cells, classes)


def _divided(
    folder: Path, files: Sequence[Path], roles: Sequence[Role | None], ending: str, measured: bool
) -> tuple[list[Path], list[Path]]:
    """The files of the train and of the test part, by what each is for."""
    of = {role: [f for f, r in zip(files, roles, strict=True) if r == role] for role in ("train", "test", "val")}
    train, test = of["train"], of["test"] or of["val"]
    others = [f for f, r in zip(files, roles, strict=True) if r is None]
    if measured and test:
        return test, []
    if test and not train and others:
        raise ValueError(
            f"path={str(folder)!r} holds {test[0].name} and {others[0].name}, but no train*{ending}: rename the files "
            "to learn from, or give path= of one"
        )
    return (train, test) if train and test else (train or test or list(files), [])


def _plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _cells(file: Path, image: str) -> Iterator[Any]:
    """What is in the column of the images, without the empty cells, from the beginning."""
    for piece in pq.ParquetFile(file).iter_batches(batch_size=1, columns=[image]):
        yield from (cell for cell in piece.column(0).to_pylist() if cell is not None)
