"""Tables larger than memory: what is held of them does not grow with them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perdure.streams.sources import Parquet

GROUPS, ROWS, BYTES = 200, 20, 100_000  # 400 MB

READING = """
import random, sys, threading, time
from pathlib import Path
import datasets
from perdure.streams.sources import Parquet

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

done, peaks = [], []
Parquet(sys.argv[1:2], "image", memory=0).encoded(0)  # everything is imported
source = Parquet(sys.argv[2:], "image", memory=0)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
rows = random.Random(0).sample(range(len(source)), 300)
read = sum(len(source.encoded(row)) for row in rows)
done.append(True)
watcher.join()
print(read, max(peaks) - before)
"""


PIECES = """
import sys
from pathlib import Path
import pyarrow as pa
from perdure.streams.conversation_files import Reader
from perdure.streams.conversation_rows import Columns
from perdure.streams.question_rows import _holds_images
from perdure.streams.tables import check_image_column

table = Path(sys.argv[1])
check_image_column(table, "image")
_holds_images(table, "image")
for entry in Reader(Columns(image="image")).entries(table):
    pass
print(pa.default_memory_pool().max_memory())
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("table") / "train.parquet", GROUPS)


def written(path: Path, groups: int) -> Path:
    noise, schema = np.random.default_rng(0), pa.schema({"image": pa.binary(), "label": pa.int64()})
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for group in range(groups):
            images = [noise.bytes(BYTES) for _ in range(ROWS)]
            writer.write_table(pa.table({"image": images, "label": [group] * ROWS}, schema))
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what memory is a file's")
def test_reading_a_table_of_images_takes_no_more_memory_than_a_few_groups_of_rows(table: Path, tmp_path: Path) -> None:
    small = written(tmp_path / "small.parquet", 2)
    command = [sys.executable, "-c", READING, str(small), str(table)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HOME": str(tmp_path)}
    )
    read, grown = map(int, found.stdout.split())
    assert read == 300 * BYTES

    assert grown < GROUPS * ROWS * BYTES / 4


def test_what_reads_a_table_in_pieces_holds_no_more_than_a_few_hundred_rows(table: Path) -> None:
    found = subprocess.run([sys.executable, "-c", PIECES, str(table)], capture_output=True, text=True, check=True)
    assert 100 * BYTES < int(found.stdout) < 600 * BYTES


def test_rows_of_a_mapped_table_are_those_of_one_in_memory(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    mapped, held = (Parquet([table], "image", memory) for memory in (0, None))
    for row in (0, 99, 100, 731, GROUPS * ROWS - 1):
        assert mapped.encoded(row) == held.encoded(row)
