"""What the app does with lessons and runs, without a server: uploads are taught, given up and removed."""

import io
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.app.lessons import Lesson, Outcome
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
    options = {"epochs": 1} | options
    made = {"backbone": "tiny()", "method": "finetune()", "device": "cpu", "precision": "fp32"}
    config = RunConfig(stream="", **made | options)
    return Service(folder / "learner", config, {"epochs": options["epochs"]}, folder / "uploads", runs=runs)


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


def kept(folder: Path) -> int:
    return len(list((folder / "uploads").rglob("*.png")))


def test_pictures_stay_of_what_was_learnt_only(tmp_path: Path) -> None:
    app = service(tmp_path)
    assert ended(app.give(shown("cat"))).state == "failed"  # a first task needs two
    assert kept(tmp_path) == 0
    assert ended(app.give(shown("cat", "dog"))).state == "learnt"
    again = ended(app.give(shown("cat", "dog")))
    assert "nothing is learnt twice" in again.notes[-1]
    assert kept(tmp_path) == 6
    assert ended(app.give(shown("emu", "fox"))).state == "learnt"
    assert kept(tmp_path) == 12


def test_a_refused_or_stopped_lesson_leaves_no_pictures(tmp_path: Path) -> None:
    app, goes_on = service(tmp_path), threading.Event()

    def teach(_: Lesson) -> Outcome:
        goes_on.wait(60)
        return Outcome((), [])

    first = app.lessons.put("first", teach)
    while first.state == "waiting":
        time.sleep(0.01)
    waiting = app.give(shown("cat", "dog"))
    others = [app.lessons.put("other", lambda _: Outcome((), [])) for _ in range(15)]
    assert kept(tmp_path) == 6
    with pytest.raises(ValueError, match="16 lessons wait already"):
        app.give(shown("emu", "fox"))
    assert kept(tmp_path) == 6
    assert app.lessons.stop(waiting.id).state == "stopped"
    assert kept(tmp_path) == 0
    assert app.give(shown("emu", "fox")).state == "waiting"
    goes_on.set()
    ended(others[-1])


@pytest.mark.parametrize("locked", [False, True])
def test_a_lesson_stopped_within_leaves_pictures_only_where_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    app = service(tmp_path, epochs=100_000, save_every=1)
    if locked:

        def give_up(_: Path) -> None:
            raise ValueError("another process is working in it")

        monkeypatch.setattr("perdure.app.service.give_up", give_up)
    lesson = app.give(shown("cat", "dog"))
    while not lesson.losses and not lesson.over:
        time.sleep(0.01)
    app.lessons.stop(lesson.id)
    assert ended(lesson).state == "stopped"
    assert kept(tmp_path) == 6 * locked
    assert (tmp_path / "learner" / "task-000").exists() == locked


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
