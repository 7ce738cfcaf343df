"""The gate of the app, and what it does with uploads; without a server."""

import asyncio
import io
import stat
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from perdure.app import drawing
from perdure.app.gate import COOKIE, Gate, _pass
from perdure.app.lessons import Lesson, Lessons, Outcome, Stopped
from perdure.app.uploads import Limits, Store, looked_at
from perdure.app.words import CHINESE, ENGLISH, worded
from perdure.types import Task

LIMITS = Limits(upload=10_000, unpacked=50_000, files=20, pictures=3)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def packed(folder: Path, entries: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda _: None) -> Path:
    path = folder / "given.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, content)
    return path


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("entries", "change", "message"),
    [
        ({"../cat.png": png()}, None, "leads out of it"),
        ({"/etc/cat.png": png()}, None, "leads out of it"),
        ({"a\\..\\..\\cat.png": png()}, None, "leads out of it"),
        ({"C:/cat.png": png()}, None, "leads out of it"),
        ({"cats/cat.png": b"/etc/passwd"}, link, "leads out of it"),
        ({"cats/bomb.png": bytes(10_000_000)}, None, "holds more than 50.0 kB"),
        ({f"cats/{i}.png": b"" for i in range(21)}, None, "holds 21 files: give at most 20"),
        ({"cats/run.sh": b"", ".hidden/cat.png": png()}, None, "holds no picture"),
        ({f"cats/{'long' * 60}{i}.png": png() for i in range(2)}, None, "twice, or names that are too long"),
    ],
)
def test_an_archive_that_is_a_bomb_or_leads_elsewhere_leaves_nothing(
    tmp_path: Path, entries: dict[str, bytes], change: Any, message: str
) -> None:
    archive = packed(tmp_path, entries, change or (lambda _: None))
    with pytest.raises(ValueError, match=message):
        Store(tmp_path / "store", LIMITS).archive("given.zip", archive)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_an_archive_becomes_the_folder_of_its_classes(tmp_path: Path) -> None:
    names = ("photos/猫/1.png", "photos/dog/2.png", "__MACOSX/photos/x.png")
    archive = packed(tmp_path, dict.fromkeys(names, png()))
    found = Store(tmp_path / "store", LIMITS).archive("January photos.zip", archive)
    assert sorted(path.name for path in found.iterdir()) == ["dog", "猫"]
    assert tmp_path / "store" in found.parents


@pytest.mark.parametrize(
    ("entries", "classes"),
    [
        (("photos/cat/1.png", "photos/dog/1.png", "photos/dataset-metadata.json"), {"cat", "dog"}),
        (("photos/cat/1.png", "photos/dog/1.png", "labels.csv"), {"cat", "dog"}),
        (("photos/cat/1.png", "photos/dog/1.png", "photos/meta/labels.csv"), {"cat", "dog"}),
        (("photos/cat/1.png", "photos/cat/1.json", "photos/dog/1.png"), {"cat", "dog"}),
        (("photos/cat/1.png", "photos/dog/1.png", "cover.png"), {"cat", "dog"}),
        (("cat/1.png", "cover.png"), {"cat"}),
    ],
)
def test_a_learner_of_classes_takes_the_class_folders_whatever_lies_beside_them(
    tmp_path: Path, entries: tuple[str, ...], classes: set[str]
) -> None:
    archive = packed(tmp_path, dict.fromkeys(entries, png()))
    found = Store(tmp_path / "store", LIMITS).archive("a.zip", archive, tables=False)
    assert {path.name for path in found.iterdir() if path.is_dir()} == classes
    assert not [path for path in found.rglob("*") if path.suffix in (".json", ".csv")]


def test_an_archive_of_tables_only_has_nothing_for_a_learner_of_classes(tmp_path: Path) -> None:
    archive = packed(tmp_path, {"labels.csv": b"image,label"})
    store = Store(tmp_path / "store", LIMITS)
    assert store.archive("a.zip", archive).name == "labels.csv"
    with pytest.raises(ValueError, match="holds no picture: give a folder for each class"):
        store.archive("a.zip", archive, tables=False)


@pytest.mark.parametrize("names", [("bird.",), ("cat.", "cat"), ("cat .",), ("猫" * 70,), ("x" * 201, "x" * 202)])
def test_a_name_that_would_be_another_class_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    store = Store(tmp_path / "store", LIMITS)
    message = "(ends in a dot|is longer than 200 bytes), and would be another name as a folder's: rename it"
    with pytest.raises(ValueError, match=f"class name .* {message}"):
        store.classes([(name, [("a.png", png())]) for name in names])
    archive = packed(tmp_path, {f"a/{name}/{i}.png": png() for i, name in enumerate(names)})
    with pytest.raises(ValueError, match=f"the archive's folder .* {message}"):
        store.archive("a.zip", archive)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_two_names_of_one_folder_are_refused_where_a_system_has_them_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: real(path) or real(path.with_name(path.name.lower())))
    store = Store(tmp_path / "store", LIMITS)
    with pytest.raises(ValueError, match="'Cat' and another name are one folder here: rename one of the two"):
        store.classes([(name, [("a.png", png())]) for name in ("cat", "Cat")])
    with pytest.raises(ValueError, match="'a/Cat' and another name are one folder here"):
        store.archive("a.zip", packed(tmp_path, {"a/cat/1.png": png(), "a/Cat/2.png": png()}))
    composed = packed(tmp_path, {"a/\u00e9/1.png": png(), "a/e\u0301/2.png": png()})
    assert len(list(store.archive("a.zip", composed).rglob("*.png"))) == 2  # one class, as readers of folders have it


@pytest.mark.parametrize("letter", ["x", "猫"])
def test_a_name_that_is_too_long_keeps_its_ending(tmp_path: Path, letter: str) -> None:
    found = Store(tmp_path / "store", LIMITS).archive("a.zip", packed(tmp_path, {f"dog/{letter * 90}.png": png()}))
    [path] = found.rglob("*.png")
    assert len(path.name.encode()) <= 200
    assert set(path.stem) == {letter}


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match="the upload cannot be written here: No space left on device"):
        Store(tmp_path / "store", LIMITS).classes([("dog", [("y.png", png())])])


def test_names_of_an_archive_made_by_chinese_windows_are_read(tmp_path: Path) -> None:
    archive = packed(tmp_path, {"XXXX/1.png": png(), "dog/1.png": png()})
    archive.write_bytes(archive.read_bytes().replace(b"XXXX", "小狗".encode("gb18030")))
    found = Store(tmp_path / "store", LIMITS).archive("a.zip", archive)
    assert {path.name for path in found.iterdir()} == {"小狗", "dog"}


def test_a_class_of_uploads_is_written_under_numbers_and_only_pictures(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", LIMITS)
    found = store.classes([("a cat", [("../../x.png", png()), ("y.PNG", png())]), ("a cat", [("z.jpg", png())])])
    assert sorted(path.name for path in (found / "a cat").iterdir()) == ["00000.png", "00001.png", "00002.jpg"]
    with pytest.raises(ValueError, match=r"cannot read image y\.png"):
        store.classes([("dog", [("y.png", b"?")])])
    for name in ("..", ".ssh", "a/b", "con:", "a\x00b"):
        with pytest.raises(ValueError, match="cannot be a folder's name"):
            store.classes([(name, [("y.png", png())])])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("What? | A cat", "1 lines for 2 pictures"),
        ("What? | A cat\nWhere", "'Where' is no question with its answer"),
    ],
)
def test_questions_without_a_picture_or_an_answer_are_refused(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Store(tmp_path, LIMITS).asked([("a.png", png()), ("b.png", png())], lines)


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pictures at once: give at most 3"):
        looked_at([("a.png", png())] * 4, LIMITS)


def test_both_languages_say_the_same_things_with_the_same_values() -> None:
    assert ENGLISH.keys() == CHINESE.keys()
    for key, text in ENGLISH.items():
        assert text.count("{") == CHINESE[key].count("{"), key
    assert worded("look", "zh-CN,zh;q=0.9") == CHINESE["look"]
    assert worded("look", "en-GB,zh;q=0.9") == worded("look", "") == ENGLISH["look"]


async def _behind(scope: Any, receive: Any, send: Any) -> None:
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def asked(gate: Gate, method: str, path: str, host: str = "127.0.0.1:7860", **more: Any) -> Any:
    async def once() -> Any:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **more)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("host", "token", "bearer", "status"),
    [
        ("127.0.0.1", "", None, 200),
        ("127.0.0.1", "secret", None, 401),
        ("0.0.0.0", "", None, 401),
        ("0.0.0.0", "", "", 401),
        ("0.0.0.0", "secret", None, 401),
        ("0.0.0.0", "secret", "guess", 401),
        ("0.0.0.0", "secret", "secret", 200),
    ],
)
@pytest.mark.parametrize("path", ["/api/teach", "/api/predict", "/gradio_api/upload"])
def test_uploads_and_lessons_need_a_token_where_other_machines_are_let_in(
    host: str, token: str, bearer: str | None, status: int, path: str
) -> None:
    gate = Gate(_behind, host, token, 1000)
    headers = {} if bearer is None else {"authorization": f"Bearer {bearer}"}
    assert asked(gate, "POST", path, headers=headers).status_code == status
    assert asked(gate, "GET", "/api/learner").status_code == 200


def test_a_browser_that_was_opened_with_the_token_may_upload() -> None:
    gate = Gate(_behind, "0.0.0.0", "secret", 1000)
    assert "set-cookie" not in asked(gate, "GET", "/?token=guess").headers
    cookie = asked(gate, "GET", "/?token=secret").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "secret" not in cookie
    assert asked(gate, "POST", "/api/teach", headers={"cookie": cookie.split(";")[0]}).status_code == 200


def test_a_token_of_other_letters_opens_nothing() -> None:
    gate = Gate(_behind, "0.0.0.0", "a token", 1000)
    for given in ({"cookie": "perdure_token=é"}, {"authorization": "Bearer é"}):
        assert not gate.opens(given)
    assert gate.opens({"authorization": "Bearer a token"})


def test_other_sites_and_other_names_are_refused() -> None:
    gate = Gate(_behind, "127.0.0.1", "", 1000)
    assert asked(gate, "GET", "/", host="evil.example").status_code == 403
    assert asked(gate, "POST", "/api/teach", headers={"origin": "http://evil.example"}).status_code == 403
    assert asked(gate, "POST", "/api/teach", headers={"origin": "http://127.0.0.1:7860"}).status_code == 200


def test_a_request_is_cut_off_where_it_is_too_large_whatever_it_says() -> None:
    gate = Gate(_behind, "127.0.0.1", "", 1000)

    async def endless() -> Any:
        for _ in range(100):
            yield bytes(100)

    assert asked(gate, "POST", "/api/teach", content=bytes(1001)).status_code == 413
    assert asked(gate, "POST", "/api/teach", content=endless()).status_code == 413


def test_a_page_event_fetches_nothing_from_elsewhere_and_pages_load_nothing_from_there() -> None:
    gate = Gate(_behind, "127.0.0.1", "", 1000)
    event = {"data": [[{"path": "http://169.254.169.254/secret", "meta": {"_type": "gradio.FileData"}}]]}
    assert asked(gate, "POST", "/gradio_api/queue/join", json=event).status_code == 403
    mine = {"data": [{"path": "/tmp/x/cat.png", "url": "http://127.0.0.1:7860/gradio_api/file=/tmp/x/cat.png"}]}
    answer = asked(gate, "POST", "/gradio_api/queue/join", json=mine)
    assert answer.status_code == 200
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("error", "state", "given_up"),
    [
        (ValueError("the folder is gone"), "failed", [False]),
        (Stopped(), "stopped", [True]),
        (None, "learnt", []),
    ],
)
@pytest.mark.parametrize("locked", [False, True])
def test_a_lesson_that_ended_is_over_and_what_it_began_is_given_up(
    error: Exception | None, state: str, given_up: list[bool], locked: bool
) -> None:
    calls: list[bool] = []

    def give_up(_: Lesson, stopped: bool) -> None:
        calls.append(stopped)
        if locked:
            raise ValueError("another process is working in it")

    def teach(lesson: Lesson) -> Outcome:
        if error is not None:
            raise error
        return Outcome((), [])

    lesson = Lessons(give_up).put("a lesson", teach)
    until = time.monotonic() + 60
    while not lesson.over and time.monotonic() < until:
        time.sleep(0.01)
    assert lesson.state == state
    assert calls == given_up
    refused = "another process is working in it" if locked and given_up else ""
    assert lesson.said == (str(error) if state == "failed" else refused)


def test_a_lesson_that_is_to_stop_stops_while_examples_are_encoded_too() -> None:
    def teach(lesson: Lesson) -> Outcome:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            lesson.encoded(256)  # the steps are not reached
            time.sleep(0.01)
        return Outcome((), [])

    lessons = Lessons(lambda *_: None)
    lesson = lessons.put("a lesson", teach)
    while lesson.state == "waiting":
        time.sleep(0.01)
    lessons.stop(lesson.id)
    until = time.monotonic() + 60
    while not lesson.over and time.monotonic() < until:
        time.sleep(0.01)
    assert lesson.state == "stopped"


def test_a_lesson_that_waits_is_stopped_at_once_and_its_place_is_free() -> None:
    goes_on = threading.Event()
    tidied: list[int] = []

    def teach(_: Lesson) -> Outcome:
        goes_on.wait(60)
        return Outcome((), [])

    lessons = Lessons(lambda *_: None)
    first = lessons.put("first", teach)
    while first.state == "waiting":
        time.sleep(0.01)
    waiting = [lessons.put(str(i), lambda _: Outcome((), []), lambda i=i: tidied.append(i)) for i in range(16)]
    with pytest.raises(ValueError, match="16 lessons wait already"):
        lessons.put("one more", lambda _: Outcome((), []))
    assert lessons.stop(waiting[3].id).state == "stopped"
    assert tidied == [3]
    assert lessons.before(waiting[4]) == 4
    last = lessons.put("one more", lambda _: Outcome((), []))
    goes_on.set()
    until = time.monotonic() + 60
    while not last.over and time.monotonic() < until:
        time.sleep(0.01)
    assert [each.state for each in (first, *waiting, last)].count("learnt") == 17
    assert tidied == [3, *(i for i in range(16) if i != 3)]


@pytest.mark.parametrize("root", [f"uploads {i}" for i in range(10)])  # in as many orders of a set
def test_what_is_said_of_an_upload_does_not_tell_where_a_relative_folder_lies(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(Path(root), LIMITS)
    where = store.classes([("cat", [("a.png", png())])])
    for place in (where, where.absolute()):
        assert store.unplaced(f"{place}/cat/0.png is torn") == f"{where.name}/cat/0.png is torn"


def test_only_an_upload_of_the_store_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", LIMITS)
    first, second = (store.classes([("cat", [("a.png", png())])]) for _ in range(2))
    others = [tmp_path / "store" / "january" / "cat", tmp_path / "elsewhere" / first.parent.name, tmp_path / "store"]
    for place in others:
        place.mkdir(parents=True, exist_ok=True)
        store.drop(place)
    store.drop(first, [str(first / "cat")])
    assert all(place.exists() for place in (*others, first, second))
    store.drop(first, [str(second)])
    assert not first.parent.exists()
    assert second.exists()


def test_before_its_first_step_a_lesson_says_how_much_it_has_looked_at() -> None:
    lesson = Lesson("a lesson", lambda _: Outcome((), []), state="learning")
    lesson.encoded(256), lesson.encoded(44)
    assert lesson.describe()["encoded"] == 300
    assert "Learning: 300 looked at" in drawing.lesson(lesson, 0, "en")
    lesson.task(Task(0, "x", (), ()), None, 1, 5)
    lesson.step(1, torch.tensor(0.5), 8)
    assert "Learning: step 1 of 5" in drawing.lesson(lesson, 0, "en")


@pytest.mark.parametrize("beside", ['prefs={"a": 1}; ', "foo@bar=1; ", "a=b; "])
def test_cookies_of_other_ports_do_not_hide_the_token(beside: str) -> None:
    gate = Gate(_behind, "0.0.0.0", "secret", 1000)
    assert gate.opens({"cookie": f"{beside}{COOKIE}={_pass('secret')}"})
    assert not gate.opens({"cookie": f"{beside}{COOKIE}=other"})
