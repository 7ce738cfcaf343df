"""Streams from data sets of the Hugging Face hub, or any folder that the `datasets` library loads."""

from typing import Any

import pyarrow as pa

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.streams.columns import Choice, Names, Piece, Table, check_names, read_table, require_column
from perdure.streams.options import Options, StreamPlan, stream
from perdure.streams.sources import Rows, check_images, quietly
from perdure.streams.task_split import Found, arrange
from perdure.types import Stream


@stream()
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
) -> StreamPlan:
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

    def plan(preprocess: Preprocess, seed: int) -> Stream:
        choice = Choice(label, names, options.domain_column())
        found = read_hub(name, choice, image, (train, test), config, revision)
        return arrange(found, options, preprocess, seed)

    return plan


def read_hub(
    name: str,
    choice: Choice,
    image: str,
    parts: tuple[str, str | None],
    config: str | None = None,
    revision: str | None = None,
) -> Found:
    """The data set `name` of the hub; `parts` are its train and its test part."""
    with quietly() as datasets:
        try:
            loaded = datasets.load_dataset(name, config, revision=revision)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot load data set {name!r}: {reason}; check the name and the connection") from error
        train, *test = [_table(datasets, loaded, name, part, image, choice) for part in parts if part is not None]
        return read_table(name, train, test[0] if test else None, choice)


def _table(datasets: Any, loaded: Any, name: str, part: str, image: str, choice: Choice) -> Table:
    if part not in loaded:
        raise ValueError(f"{name} has no part {part!r}{meant(part, list(loaded))}; its parts: {', '.join(loaded)}")
    data = loaded[part]
    features = data.features
    require_column(name, data.column_names, image, "image")
    if isinstance(features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    first = next((cell for cell in (row[image] for row in data.select_columns([image])) if cell is not None), None)
    check_images(f"{name} {part}", image, data.features.arrow_schema.field(image).type, first)
    for option, column in (("label", choice.label), ("domain", choice.domain)):
        if column is not None and column in features:
            check_names(f"{name} {part}", column, option, features.arrow_schema.field(column).type)
    small = [k for k, f in features.items() if k != image and isinstance(f, datasets.Value | datasets.ClassLabel)]
    cells: pa.Table = data.select_columns(small).with_format("arrow")[:]

    def classes(column: str) -> Names | None:
        feature = features[column]
        where = f"the features of {name} {part}"
        return Names(dict(enumerate(feature.names)), where) if isinstance(feature, datasets.ClassLabel) else None

    whole = f"{name} {part}"
    return Table([Piece(whole, cells, classes)], Rows(data.select_columns([image]), image, whole))
