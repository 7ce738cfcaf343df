"""A paper to write: an own method beside known ones over three seeds, a search for two options, tables and figures.

The short form has two methods, two seeds and random pictures, and is part of `make test`; the whole, in `make
test-all`, four, three, and CIFAR-100.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from perdure.core.method import METHODS
from perdure.options.own_methods import OWN_METHODS

CIFAR = Path(__file__).parents[3] / "shared/data/cifar100"
PAGE = Path(__file__).parents[2] / "docs/write-a-method.md"
Shell = Callable[[str], str]


@pytest.fixture
def own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example of the page on own methods, saved as it says."""
    (code,) = re.findall(r"^<!-- tested: l2sp -->\n```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.M | re.S)
    (tmp_path / "l2sp.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv(OWN_METHODS, "")  # set by --import, for processes of a grid, and put back after the test
    yield "l2sp.py"
    METHODS.pop("l2sp", None)
    sys.modules.pop("l2sp", None)


METHODS_COMPARED = ("ncm", "lora(rank=4) + l2sp(strength=0.5)", "lora(rank=4)", "inflora(rank=4)")


def write(typed: Shell, own: str, setting: str, methods: Sequence[str], seeds: Sequence[int], trials: int) -> None:
    """Compares methods over seeds, searches for two options of the own one, and makes the tables and figures."""
    listed = " ".join(f"'{method}'" for method in methods)
    orders = " ".join(map(str, seeds))
    typed(f"perdure compare {setting} --methods {listed} --seeds {orders} --out runs/grid --import {own}")
    space = "'rank=2..4, strength=0.01..10 log'"
    typed(
        f"perdure tune {setting} --method 'lora(rank=?) + l2sp(strength=?)' --space {space} --trials {trials} "
        f"--out runs/sweep --import {own}"
    )
    best = json.loads(Path("runs/sweep/study.json").read_text("utf-8"))["best"]
    assert best["options"].keys() == {"rank", "strength"}
    typed(f"perdure report runs/grid --csv --latex --figures paper --import {own}")
    with Path("paper/methods.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["method"] for row in rows) == sorted(methods)
    assert {row["runs"] for row in rows} == {str(len(seeds))}
    with Path("paper/runs.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(methods) * len(seeds)
    assert "\\begin{tabular}" in "".join(file.read_text("utf-8") for file in Path("paper").glob("*.tex"))
    figures = {suffix: {file.stem for file in Path("paper").glob(f"*.{suffix}")} for suffix in ("pdf", "png")}
    assert figures["pdf"] == figures["png"] != set()


def test_a_grid_with_an_own_method_a_sweep_and_its_tables(typed: Shell, own_method: str) -> None:
    stream = "synthetic(tasks=2, classes_per_task=2, per_class=6, test_per_class=4)"
    write(
        typed, own_method, f"--stream '{stream}' --backbone 'tiny()' --epochs 1", METHODS_COMPARED[:2], (0, 1), trials=2
    )


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-100 in ../shared/data")
def test_the_same_on_cifar(typed: Shell, own_method: str) -> None:
    stream = f'parquet(path="{CIFAR}", label="fine_label", tasks=5, per_class=10, test_per_class=5)'
    write(
        typed,
        own_method,
        f"--stream '{stream}' --backbone 'pocket()' --epochs 1",
        METHODS_COMPARED,
        (0, 1, 2),
        trials=4,
    )
