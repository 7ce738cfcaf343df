"""What a seed changes: the order of classes, the images drawn, the start; and what tables say of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.backbones.tiny import tiny
from perdure.experiments.grid import cells, compare
from perdure.reporting.papers import write_tables
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults, varied
from perdure.reporting.tables import markdown
from perdure.streams.options import redrawn
from perdure.training.config import RunConfig, make_stream
from perdure.training.run import resume
from perdure.types import Stream

NAMES = ("apple", "bear", "car", "dog")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of ten noisy pictures."""
    root, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        (root / name).mkdir()
        for j in range(10):
            pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., i % 3] += 20 * i
            Image.fromarray(pixels).save(root / name / f"{j}.png")
    return root


def config(photos: Path, **more: Any) -> RunConfig:
    given = {"backbone": "tiny(dim=16)", "method": "ncm", "precision": "fp32", "attention": "sdpa", "device": "cpu"}
    return RunConfig(stream=f"images(path={str(photos)!r}, tasks=2, per_class=4)", **given | more)


def shown(stream: Stream) -> tuple[list[str], set[str], set[str]]:
    """Class names in order, train images, test images."""
    names = [name for task in stream for name in task.names]
    both = [
        {data.source.key(row) for task in stream for data in [which(task)] for row in data.rows.tolist()}
        for which in (lambda task: task.train, lambda task: task.test)
    ]
    return names, both[0], both[1]


def test_a_seed_changes_what_is_varied_and_nothing_else(photos: Path) -> None:
    preprocess = tiny().preprocess
    streams = {
        (vary, seed): shown(make_stream(config(photos, vary=vary, seed=seed), preprocess))
        for vary in ("order", "images", "start", "order,start")
        for seed in (0, 3)
    }
    for (vary, seed), (names, train, test) in streams.items():
        first = streams[vary, 0]
        assert (names != first[0]) == (seed != 0 and "order" in vary)
        assert (train != first[1]) == (seed != 0 and vary == "images")
        assert test == first[2]
        assert len(train) == 16
    assert streams["images", 0] == streams["order,start", 0]
    assert [config(photos, vary=v, seed=3).seed_of("start") for v in ("order", "start")] == [0, 3]


def test_a_spread_says_what_it_is_of(photos: Path, tmp_path: Path) -> None:
    spreads = {}
    for vary in ("order,start", "images", " start,images , order"):
        out = tmp_path / vary.strip().replace(",", "-")
        setting = config(photos, vary=vary)
        grid = cells(["ncm"], [0, 1, 2], out)
        (row,) = compare(setting, grid, out, steps=False)
        spreads[setting.vary] = row
        assert f"runs that differ in {row['varied']}." in markdown([row])
        assert (
            f"runs that differ in {row['varied']}."
            in write_report([c.folder for c in grid], out / "r.html").read_text()
        )
        tex = write_tables([c.folder for c in grid], out / "t", as_csv=False, as_latex=True)[0].read_text()
        assert f"% ± is the standard deviation over 3 runs that differ in {row['varied']}\n" in tex
        made = RunResults.read(grid[1].folder)
        assert (made.config["vary"], made.seed) == (setting.vary, 1)
    assert {vary: row["varied"] for vary, row in spreads.items()} == {
        "order,start": "class order, start",
        "images": "images drawn",
        "order,images,start": "class order, images drawn, start",
    }
    # class means depend on the images only
    assert spreads["order,start"]["acc"][1] == pytest.approx(0, abs=1e-9)
    assert spreads["images"]["acc"][1] > 0
    with pytest.raises(ValueError, match="was made with vary='images', not 'order,start'"):
        compare(config(photos), cells(["ncm"], [0], tmp_path / "images"), tmp_path / "images", steps=False)


def test_an_older_record_varies_what_it_always_did(photos: Path, tmp_path: Path) -> None:
    grid = cells(["ncm"], [0, 1], tmp_path)
    compare(config(photos), grid, tmp_path, steps=False)
    runs = [RunResults.read(cell.folder) for cell in grid]
    for run in runs:
        del run.facts["config"]["vary"]
    assert varied(runs) == "class order, start"
    assert resume(grid[1].folder)["acc"] == runs[1].summary["acc"]


@pytest.mark.parametrize(
    ("stream", "drawn"),
    [
        ("images(path='p', per_class=2)", "images(path='p', per_class=2, draw=5)"),
        ("fewshot(cifar100())", "fewshot(cifar100(), draw=5)"),
        ("sequence(cub200(per_class=3), cifar100())", "sequence(cub200(per_class=3, draw=5), cifar100())"),
        ("captions(path='p', captions='c', per_task=9)", "captions(path='p', captions='c', per_task=9, draw=5)"),
    ],
)
def test_the_draw_is_set_wherever_images_are_drawn(stream: str, drawn: str) -> None:
    from perdure.options.spec import parse_one

    assert str(redrawn(parse_one(stream), 5)) == drawn


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("images(path={p!r}, tasks=2)", "draws none: give per_class"),
        ("synthetic(tasks=2)", "draws none: give per_class"),
        ("images(path={p!r}, tasks=2, per_class=4, draw=1)", "fixes the images that vary names"),
        ("images(path={p!r}, tasks=2, per_class=8)", "all 32 train examples are kept"),
    ],
)
def test_images_that_are_not_drawn_cannot_vary(photos: Path, stream: str, message: str) -> None:
    made = RunConfig(stream=stream.format(p=str(photos)), vary="images")
    with pytest.raises(ValueError, match=message):
        make_stream(made, tiny().preprocess)


def test_what_cannot_vary_is_named() -> None:
    with pytest.raises(ValueError, match="vary='order,strat': expected some of order,images,start, not 'strat'"):
        RunConfig(stream="synthetic()", vary="order,strat")
