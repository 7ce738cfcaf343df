"""Streams from data sets of the Hugging Face hub, or any folder that the `datasets` library loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from perdure.formatting import meant
from perdure.streams.columns import LabelColumns, Names, TableFile, TablePart, read_table, require_column
from perdure.streams.options import Options, stream
from perdure.streams.parquet import quietly
from perdure.streams.sources import Source, check_images, unpacked
from perdure.streams.task_split import LabelledData, arrange


@stream(arrange)
def hub(
    options: Options,
    name: str,
    label: str = "label",
    image: str = "image",
    train: str = "train",
    test: str | None = "test",
    names: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Callable[[bool], LabelledData]:
    """A data set of the Hugging Face hub; downloaded to the cache of the `datasets` library when it is not there.

    Args:
        options: the common ones.
        name: of the data set, or a local folder.
        label: column of the class.
        image: column of the images.
        train: which part is learnt.
        test: which part is tested; None holds out 20 % of each class of `train`, the same ones in every run.
        names: column that names the class of an integer label; ClassLabel names are found by themselves.
        config: of a data set with several.
        revision: commit or tag; the newest when None.

    Raises:
        ValueError: when the data set cannot be loaded, or a part, a column or a label is not as expected.
    """
    choice = LabelColumns(label, names, options.domain_column())
    return lambda measured: read_hub(name, choice, image, (train, test), config, revision)


def read_hub(
    name: str,
    choice: LabelColumns,
    image: str,
    parts: tuple[str, str | None],
    config: str | None = None,
    revision: str | None = None,
) -> LabelledData:
    """The data set `name` of the hub; `parts` are its train and its test part."""
    loaded = load(name, "check the name and the connection", config, revision)
    return read_table(name, [_part(loaded, name, part, image, choice) for part in parts if part is not None], choice)


def load(name: str, remedy: str, config: str | None = None, revision: str | None = None) -> Any:
    """The parts of a data set, by name; raises a ValueError with the remedy when it cannot be loaded."""
    with quietly() as datasets:
        try:
            return datasets.load_dataset(name, config, revision=revision)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot load data set {name!r}: {reason}; {remedy}") from error


def hub_images(name: str, data: Any, column: str) -> "HubRows":
    """The images of a part; raises a ValueError when it has no such column."""
    require_column(name, data.column_names, column, "image")
    images = data.select_columns([column])
    with quietly() as datasets:
        if isinstance(data.features[column], datasets.Image):
            images = images.cast_column(column, datasets.Image(decode=False))
    return HubRows(images, column, name)


def hub_table(name: str, data: Any, classes: Callable[[str], Names | None] = lambda _: None) -> TableFile:
    """The columns of a part."""

    def read(column: str) -> pa.ChunkedArray:
        with quietly():
            return data.select_columns([column]).with_format("arrow")[:][column]

    return TableFile(name, len(data), data.column_names, read, lambda row: f"{name}, row {row}", classes)


class HubRows(Source):
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

    def encoded(self, row: int) -> bytes | Path:
        """The content of the cell, or the file that it names; raises `UnreadableImage` for an empty one."""
        return unpacked(self.data[row][self.column], self.where(row), Path())

    def where(self, row: int) -> str:
        """The data set and the row."""
        return f"{self.name}, row {row}"

    def key(self, row: int) -> str:
        """The part's name and the row."""
        return f"{self.name.rpartition(' ')[2]}:{row}"

    def names(self) -> list[str | None]:
        """The data set and the rows."""
        return list(map(self.where, range(len(self))))


def _part(loaded: Any, name: str, part: str, image: str, choice: LabelColumns) -> TablePart:
    if part not in loaded:
        raise ValueError(f"{name} has no part {part!r}{meant(part, list(loaded))}; its parts: {', '.join(loaded)}")
    data, whole = loaded[part], f"{name} {part}"
    features = data.features
    source = hub_images(whole, data, image)
    first = next((cell for cell in (row[image] for row in source.data) if cell is not None), None)
    check_images(whole, image, features.arrow_schema.field(image).type, first)

    def classes(column: str) -> Names | None:
        known = getattr(features[column], "names", None)  # of a ClassLabel
        return known and Names(dict(enumerate(known)), f"the features of {whole}")

    return TablePart([hub_table(whole, data, classes)], source, range(len(source)))
