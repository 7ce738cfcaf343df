"""Parquet files that may be larger than memory: read in pieces, and from a copy that is mapped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PIECE = 64


def batches(file: Path, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a file, so many at a time; of what is not asked for yet no more is held than a row group."""
    # without pre_buffer=False pyarrow reads the whole file ahead
    yield from pq.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=rows, columns=columns)


def memory_mapped(files: Sequence[Path], column: str) -> pa.ChunkedArray:
    """The cells of a column, from a copy in the cache of `datasets`, which is made where there is none yet."""
    # Its own reader of parquet files, Arrow's scanner, may hold a GiB of what is not written yet.
    states = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    with quietly() as datasets:
        data = datasets.Dataset.from_generator(
            lambda: _cells(files, column),
            features=datasets.Features.from_arrow_schema(pa.schema([pq.read_schema(files[0]).field(column)])),
            fingerprint=sha256(repr((states, column)).encode()).hexdigest(),
            writer_batch_size=_PIECE,
        )
    return data.data.column(column)


def _cells(files: Sequence[Path], column: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for piece in batches(file, _PIECE, [column]):
            yield from piece.to_pylist()


@contextmanager
def quietly() -> Iterator[Any]:
    """The `datasets` library without progress bars; imported here, for it takes a second and is seldom needed."""
    datasets = import_module("datasets")
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()
