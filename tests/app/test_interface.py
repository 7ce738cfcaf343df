"""What programs ask of a running app, several at once."""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("app")  # one app for all


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    noisy = np.array(colour) + np.random.default_rng(seed).normal(0, 12, (24, 24, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def files(*pictures: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{i}.png", content)) for i, content in enumerate(pictures)]


def test_what_no_request_reads_is_refused(client: Any) -> None:
    shown = files(picture((200, 30, 30), 0))
    for path, form, said in (
        (
            "teach",
            {"class": "x", "epochs": "2"},
            "'epochs' is not read by /api/teach; there are: archive, images, class",
        ),
        ("teach", {"clas": "x"}, "'clas' is not read by /api/teach; did you mean 'class'?"),
        ("teach", {"class": ["x", "y"]}, "class is given 2 times: keep one"),
        ("predict", {"topp": "1"}, "'topp' is not read by /api/predict; did you mean 'top'?"),
        ("predict?top=1", {}, "'top' is not read by /api/predict; there are: none"),
        ("predict", {"classes": ["a cat", ""]}, "classes=['a cat', '']: a name is empty; leave it out"),
    ):
        answer = client.post(f"/api/{path}", files=shown, data=form)
        assert answer.status_code == 422, (path, form)
        assert said in answer.json()["error"]
    answer = client.get("/api/search?text=red&tip=3")
    assert answer.status_code == 422
    assert answer.json()["error"] == "'tip' is not read by /api/search; did you mean 'top'?"
    assert client.post("/api/predict", files=shown, data={"classes": ["a", "b"]}).status_code == 200
    assert client.get("/api/nothing?a=b").status_code == 404


@pytest.fixture
def client(app: Any) -> httpx.Client:
    with httpx.Client(base_url=app.address, timeout=60, trust_env=False) as client:
        yield client


def ended(client: httpx.Client, lesson: str) -> dict[str, Any]:
    for _ in range(600):
        facts: dict[str, Any] = client.get(f"/api/lessons/{lesson}").json()
        if facts["state"] not in ("waiting", "learning"):
            return facts
        time.sleep(0.1)
    raise AssertionError(facts)


def test_fifty_requests_of_eight_clients_are_answered_right_while_a_task_is_taught(client: Any, app: Any) -> None:
    shown = [picture((20 * i, 240 - 20 * i, 12 * (i % 3)), i) for i in range(10)]

    def ask(i: int) -> tuple[int, Any]:
        with httpx.Client(base_url=app.address, timeout=60, trust_env=False) as one:
            answer = one.post("/api/predict", files=files(shown[i % 10]))
        assert answer.status_code == 200, answer.text
        return i % 10, answer.json()

    before = dict(map(ask, range(10)))
    teaching = client.post(
        "/api/teach", files=files(*(picture((200, 120, 10), i) for i in range(20))), data={"class": "orange"}
    )
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(50)))
    facts = ended(client, teaching.json()["lesson"])
    assert facts["state"] == "learnt", facts
    after = dict(map(ask, range(10)))
    assert len(answers) == 50
    assert [i for i, answer in answers if answer not in (before[i], after[i])] == []
    assert all("orange" in str(answer) for answer in after.values())


def test_a_lesson_that_is_stopped_leaves_the_learner_as_it_was(client: Any) -> None:
    known = client.get("/api/learner").json()
    many, few = (files(*(picture((10, 200, 200), i) for i in range(count))) for count in (900, 2))
    first = client.post("/api/teach", files=many, data={"class": "cyan"}).json()["lesson"]  # takes much longer than
    second = client.post("/api/teach", files=few, data={"class": "teal"}).json()["lesson"]  # two requests
    assert client.post(f"/api/lessons/{second}/stop").json()["state"] == "stopped"  # it waits
    client.post(f"/api/lessons/{first}/stop")
    assert [ended(client, lesson)["state"] for lesson in (first, second)] == ["stopped", "stopped"]
    assert client.get("/api/learner").json() == known


@pytest.mark.parametrize(
    ("path", "given", "files", "said"),
    [
        ("predict", {}, [("images", ("a.png", b"no picture"))], "cannot read image a.png"),
        ("predict", {"top": 0}, files(picture((9, 9, 9), 0)), "top=0: expected int from 1"),
        ("teach", {}, [], "there is nothing to learn"),
        ("teach", {"class": "../up"}, files(picture((9, 9, 9), 0)), "cannot be a folder's name"),
        ("teach", {"class": "cat", "captions": "a cat"}, files(picture((9, 9, 9), 0)), "have no effect"),
        ("teach", {}, [("archive", ("a.zip", b"no archive"))], "a.zip cannot be unpacked"),
        ("ask", {"question": "why?"}, [], "does not answer in words"),
        ("predict", {"top": "abc"}, files(picture((9, 9, 9), 0)), "top: Input should be a valid integer"),
        ("predict", {"top": 3}, [], "images: Field required; see docs/app.md"),
        ("teach", {"skip_bad": "maybe"}, [], "skip_bad: Input should be a valid boolean"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(client: Any, path: str, given: Any, files: Any, said: str) -> None:
    answer = client.post(f"/api/{path}", data=given, files=files or None)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/gradio_api/file=/etc/passwd", 403),
        ("/gradio_api/file=learner/run.json", 403),
        ("/gradio_api/file=https://example.org/", 403),
        ("/gradio_api/proxy=https://example.org/", 403),
        ("/show/report?grid=../..", 422),
        ("/api/nothing", 404),
        ("/api/lessons/none", 422),
    ],
)
def test_nothing_outside_is_reached(client: Any, app: Any, address: str, status: int) -> None:
    assert client.get(address).status_code == status
    assert not address.startswith("/api") or set(client.get(address).json()) == {"error"}
    inside = Path(app.folder).name
    assert inside not in client.get(address).text


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_app_that_is_asked_to_stop_leaves_no_upload_behind_and_says_one_line(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aside").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "aside"))
    served = start(tmp_path, "--backbone", "tiny()")
    assert list((tmp_path / "aside").glob("perdure-app-*"))
    served.process.terminate()
    assert served.process.wait(60) == 130
    assert (tmp_path / "errors.txt").read_text().count("stopped at once") == 1
    assert not list((tmp_path / "aside").glob("perdure-*"))
