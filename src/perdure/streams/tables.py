"""Streams from parquet files: a folder of train and test files, or one file that is split."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from perdure.images import Preprocess
from perdure.streams.arrange import Found, arrange
from perdure.streams.columns import Choice, Table, class_label, classes_file, read_table, require_column
from perdure.streams.options import Options, StreamPlan, near, stream
from perdure.streams.sources import Parquet
from perdure.types import Stream

_TEST = ("test", "val")


@stream()
def parquet(
    options: Options, path: str, label: str = "label", image: str = "image", names: str | None = None
) -> StreamPlan:
    """Parquet files with images: a folder with `train*.parquet` and `test*.parquet` (or `val*`), or one file.

    Without a test part, 20 % of each class are held out; which ones depends on file name and row only, never on the
    seed, so all runs are tested on the same images. Encoded images are read when first needed.

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

    def plan(preprocess: Preprocess, seed: int) -> Stream:
        return arrange(read_parquet(path, label, image, names, options.domain_column()), options, preprocess, seed)

    return plan


def read_parquet(path: str, label: str, image: str, names: str | None, domain: str | None) -> Found:
    """The data set in a folder of parquet files, or in one file."""
    train, test = table_files(Path(path))
    name = Path(path).name or path
    folder = train[0].parent
    schema = read_schema(train[0])
    parts = [_table(name, files, image) for files in (train, test) if files]

    def classes(column: str) -> Sequence[str] | None:
        return class_label(schema, column) or classes_file(folder, column)

    return read_table(name, parts[0], parts[1] if test else None, Choice(label, names, domain), classes)


def table_files(path: Path, ending: str = ".parquet") -> tuple[list[Path], list[Path]]:
    """The files of the train part and of the test part; the latter are none when the data set is not split."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"path={str(path)!r} does not exist{near(path.name, here)}; give a folder or a {ending} file")
    for folder in (path, path / "data"):
        files = sorted(folder.glob(f"*{ending}"))
        train = [f for f in files if f.name.startswith("train")]
        tests = [[f for f in files if f.name.startswith(word)] for word in _TEST]
        test = next((found for found in tests if found), [])
        if train or test or files:
            return (train, test) if train and test else (train or test or files, [])
    raise ValueError(f"path={str(path)!r} holds no {ending} file; expected train*{ending} and test*{ending}")


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of the data set at `path`."""
    return list(read_schema(table_files(path)[0][0]).names)


def _table(name: str, files: list[Path], image: str) -> Table:
    columns = read_schema(files[0]).names
    require_column(name, columns, image, "image")
    kept = [c for c in columns if c != image and _plain(read_schema(files[0]).field(c).type)]
    tables = []
    for file in files:
        for column in kept:
            require_column(str(file), read_schema(file).names, column, "label")
        tables.append(pq.read_table(file, columns=kept).replace_schema_metadata())
    try:
        cells = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{files[0].parent}: {files[0].name} and its sisters have other columns ({reason})") from error
    return Table(cells, Parquet(files, image))


def _plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def read_schema(file: Path) -> pa.Schema:
    """Names and types of the columns of a parquet file."""
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a parquet file ({str(error).splitlines()[0]}); give another path") from error
