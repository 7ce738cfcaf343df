"""What the app does with lessons and runs, without a server: uploads are taught, given up and removed."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.api.folders import teach_folder
from perdure.app import uploads
from perdure.app.lessons import Lesson, Outcome
from perdure.app.service import Service
from perdure.app.uploads import Limits, Store
from perdure.app.waiting import WaitingLesson
from perdure.storage.files import locked, write_sealed
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def shown(*classes: str, count: int = 3) -> list[tuple[str, list[tuple[str, bytes | Path]]]]:
    return [(name, [(f"{i}.png", png(10 * len(name) + ord(name[0]) + i)) for i in range(count)]) for name in classes]


def made(**options: Any) -> RunConfig:
    return RunConfig(stream="", backbone="tiny()", method="finetune()", device="cpu", precision="fp32", **options)


def service(folder: Path, runs: Path | None = None, **options: Any) -> Service:
    options = {"epochs": 1} | options
    given = {"epochs": options["epochs"]}
    return Service(folder / "learner", made(**options), given, folder / "uploads", runs=runs)


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


def test_a_class_that_was_taught_twice_is_named_once(tmp_path: Path) -> None:
    app = service(tmp_path)
    for classes in (("cat", "dog"), ("dog", "emu")):
        ended(app.give(shown(*classes)))
    assert app.names() == ["cat", "dog", "emu"]


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
    app = service(tmp_path, epochs=2000, save_every=1)
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


class Killed(Exception):
    """Nothing in the package knows it: what was begun stays as it was."""


class Kills(Quiet):
    """Ends the process that learns at its third step."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if step == 3:
            raise Killed


def begun(folder: Path, where: Path) -> Path:
    """A lesson on what lies at `where`, of a process that was killed within it; returns its snapshot."""
    with pytest.raises(Killed):
        teach_folder(where, folder / "learner", made(epochs=4, save_every=1), {}, Kills())
    (snapshot,) = (folder / "learner" / "task-000").glob("step-*")
    return snapshot


def resumed(app: Service) -> Lesson:
    return ended(next(iter(app.lessons._known.values())))


def test_what_was_killed_with_the_app_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, Store(tmp_path / "uploads", Limits()).classes(shown("cat", "dog")))
    lesson = resumed(service(tmp_path, epochs=4, save_every=1))
    assert (lesson.state, lesson.title, lesson.losses[0][0]) == ("learnt", "cat, dog", 3)
    assert kept(tmp_path) == 6


def _killed_app(folder: Path) -> None:
    """The body of a child process: an app that is killed within a lesson, behind which others wait or are uploaded."""
    step, reached = Lesson.step, threading.Event()

    def held(lesson: Lesson, number: int, *facts: Any) -> None:
        step(lesson, number, *facts)
        if number == 3:
            reached.set()
            threading.Event().wait()  # until all is killed

    Lesson.step = held  # type: ignore[method-assign]
    app = service(folder, epochs=60, save_every=1)
    lessons = [app.give(shown(*classes)) for classes in (("cat", "dog"), ("emu", "fox"), ("gnu", "hen"))]
    (folder / "ids").write_text(" ".join(each.id for each in lessons))
    reached.wait(60)
    written = uploads._write

    def killed(within: Path, files: Any) -> list[Path]:
        written(within, files)
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    uploads._write = killed
    app.give(shown("ibis", "jay"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_lessons_that_waited_when_the_app_was_killed_are_learnt_by_the_next_one(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_killed_app, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    ids = (tmp_path / "ids").read_text().split()
    assert kept(tmp_path) == 21  # of the last upload one class only
    app = service(tmp_path, epochs=1)
    assert kept(tmp_path) == 18
    assert Store(tmp_path / "uploads", Limits()).left(tmp_path / "learner") == []  # an app beside it takes over none
    assert [ended(app.lessons[id]).state for id in ids] == ["learnt"] * 3
    assert [app.lessons[id].title for id in ids] == ["cat, dog", "emu, fox", "gnu, hen"]
    assert [task["classes"] for task in app.describe()["tasks"]] == [["cat", "dog"], ["emu", "fox"], ["gnu", "hen"]]
    assert kept(tmp_path) == 18
    assert not list((tmp_path / "uploads").glob("*/lesson.json"))


def waiting(folder: Path) -> Path:
    """Where an upload lies that an app which is no more was to teach."""
    store = Store(folder / "uploads", Limits())
    where = store.classes(shown("cat"))
    store.note(WaitingLesson("1" * 16, "cat", where, False, folder / "learner", 1.0))
    return where


def left(folder: Path, learner: str = "learner") -> list[Path]:
    return [each.where for each in Store(folder / "uploads", Limits()).left(folder / learner)]


def test_what_waits_is_found_where_learner_and_uploads_were_moved_together(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    where = waiting(tmp_path / "here").relative_to(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert left(tmp_path / "there") == [tmp_path / "there" / where]


def test_what_waits_for_another_learner_is_not_held_up(tmp_path: Path) -> None:
    where, other = waiting(tmp_path), Store(tmp_path / "uploads", Limits())
    assert other.left(tmp_path / "other") == []
    assert left(tmp_path) == [where]


def test_an_upload_that_was_half_removed_is_removed_by_the_next_app(tmp_path: Path) -> None:
    def killed(*_: Any, **_more: Any) -> None:
        raise Killed

    where = waiting(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)  # as the pictures are removed
        with pytest.raises(Killed):
            Store(tmp_path / "uploads", Limits()).drop(where)
    assert kept(tmp_path) == 3
    assert left(tmp_path) == []
    assert not list((tmp_path / "uploads").iterdir())


@pytest.mark.parametrize("facts", [{"place": "a\0b"}, {"place": "../away"}, {"id": 7}, {}])
def test_a_note_that_says_nothing_is_left_alone(tmp_path: Path, facts: Any) -> None:
    where = waiting(tmp_path)
    note = where.parent / "lesson.json"
    if facts:
        write_sealed(note, {k: v for k, v in json.loads(note.read_text()).items() if k != "seal"} | facts)
    else:
        note.write_text("{}")
    assert left(tmp_path) == []
    assert kept(tmp_path) == 3


def test_a_lesson_that_failed_is_not_taught_by_the_next_app_though_nobody_knows_what_the_learner_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = service(tmp_path)
    monkeypatch.setattr("perdure.app.service.lesson_paths", lambda _folder: json.loads("damaged"))
    with locked(tmp_path / "learner"):
        assert ended(app.give(shown("cat", "dog"))).state == "failed"
    assert left(tmp_path) == []


@pytest.mark.parametrize("gone", [".", "cat", "cat/00000.png"])
@pytest.mark.parametrize("later", [False, True])
def test_a_lesson_whose_uploads_are_gone_blocks_no_later_one(tmp_path: Path, gone: str, later: bool) -> None:
    where = Store(tmp_path / "uploads", Limits()).classes(shown("cat", "dog"))
    snapshot = begun(tmp_path, where)
    place = where / gone if gone != "." else tmp_path / "uploads"
    if later:  # the app could not go on at first
        with locked(tmp_path / "learner"):
            app = service(tmp_path, epochs=4, save_every=1)
            assert "another process is working in learner" in resumed(app).said
        assert snapshot.exists()
        assert kept(tmp_path) == 6
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if not later or gone != ".":
        app = service(tmp_path, epochs=4, save_every=1)
        assert resumed(app).state == "failed"
        assert not snapshot.exists()
        assert kept(tmp_path) == 0
    for classes in (("emu", "fox"), ("gnu", "hen")):
        lesson = ended(app.give(shown(*classes)))
        assert lesson.state == "learnt", lesson.said
    assert [task["classes"] for task in app.describe()["tasks"]] == [["emu", "fox"], ["gnu", "hen"]]


def test_a_lesson_that_another_process_began_is_kept_and_it_is_said_how_it_goes_on(tmp_path: Path) -> None:
    photos = Store(tmp_path / "aside", Limits()).classes(shown("cat", "dog")).rename(tmp_path / "photos")
    snapshot = begun(tmp_path, photos)
    photos.rename(tmp_path / "away")
    app = service(tmp_path, epochs=4, save_every=1)
    for lesson in (resumed(app), ended(app.give(shown("emu", "fox")))):
        assert lesson.state == "failed"
        assert lesson.said.endswith(f"; to go on with {photos}, have it as it was and start the app again")
        assert snapshot.exists()
    assert "remove learner/task-000 to give it up" in lesson.said
    assert kept(tmp_path) == 0
    (tmp_path / "away").rename(photos)
    lesson = resumed(service(tmp_path, epochs=4, save_every=1))
    assert lesson.state == "learnt", lesson.said


def test_what_took_the_place_of_a_lesson_of_another_process_is_given_up_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Store(tmp_path / "aside", Limits()).classes(shown("cat", "dog")).rename(tmp_path / "photos")
    shutil.rmtree(begun(tmp_path, photos))  # killed before its first snapshot
    photos.rename(tmp_path / "away")
    app = service(tmp_path, epochs=4, save_every=1)
    resumed(app)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as once:
        once.setattr("perdure.app.lessons.Lesson.step", full)
        assert "No space left" in ended(app.give(shown("emu", "fox"))).said
    assert not (tmp_path / "learner" / "task-000").exists()
    assert ended(app.give(shown("gnu", "hen"))).state == "learnt"


def test_a_lesson_tells_no_place_of_the_machine(tmp_path: Path) -> None:
    app = service(tmp_path)
    assert ended(app.give(shown("cat"))).said == "cat: one class only, 'cat'; a first task needs at least two"
    ended(app.give(shown("cat", "dog")))
    shutil.rmtree(tmp_path / "uploads")
    notes = ended(app.give(shown("emu", "fox"))).notes
    assert notes
    assert str(tmp_path) not in " ".join(notes)


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
