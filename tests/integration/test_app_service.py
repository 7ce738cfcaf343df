"""What the app does with lessons and runs, without a server: uploads are taught, given up and removed."""

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.app.lessons import Lesson
from perdure.app.service import Service
from perdure.training.config import RunConfig


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def shown(*classes: str, count: int = 3) -> list[tuple[str, list[tuple[str, bytes | Path]]]]:
    return [(name, [(f"{i}.png", png(10 * len(name) + ord(name[0]) + i)) for i in range(count)]) for name in classes]


def service(folder: Path, runs: Path | None = None, **options: Any) -> Service:
    config = RunConfig(stream="", backbone="tiny()", method="finetune()", device="cpu", precision="fp32", epochs=1)
    return Service(folder / "learner", config, {"epochs": 1} | options, folder / "uploads", runs=runs)


def ended(lesson: Lesson) -> Lesson:
    until = time.monotonic() + 60
    while not lesson.over and time.monotonic() < until:
        time.sleep(0.01)
    assert lesson.over, lesson.describe()
    return lesson


def test_a_stray_table_in_an_archive_of_class_folders_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as packed:
        for name, files in shown("cat", "dog"):
            for file, content in files:
                packed.writestr(f"photos/{name}/{file}", bytes(content))  # type: ignore[arg-type]
        packed.writestr("photos/dataset-metadata.json", '{"title": "x"}')
    app = service(tmp_path)
    lesson = ended(app.give([], ("photos.zip", tmp_path / "photos.zip")))
    assert lesson.state == "learnt", lesson.said
    assert [task["classes"] for task in app.describe()["tasks"]] == [["cat", "dog"]]


@pytest.mark.parametrize("at", ["grid/probe", "grid", "."])
def test_runs_are_a_folder_of_grids_a_grid_or_one_run(
    tmp_path: Path, lab: Any, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    lab.but(tasks=2).run("probe", tmp_path / "runs" / "grid" / "probe")
    monkeypatch.chdir(tmp_path / "runs" / at)
    name = {".": "grid"}.get(at, Path(at).name)
    for place in (Path(), Path.cwd()):
        app = service(tmp_path, place)
        assert {grid: [run.resolve() for run in runs] for grid, runs in app.grids().items()} == {
            name: [tmp_path / "runs" / "grid" / "probe"]
        }
        assert "probe" in app.compared(name)
