"""What is wrong in a file of conversations is told in one line, with the file and the line."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perdure.backbones.preprocess import Preprocess, UnreadableImage
from perdure.streams.conversation_stream import conversations
from perdure.streams.single_task import conversation_task
from perdure.types import Stream

SIZE = Preprocess(size=8, resize=8)
GOOD = {
    "image": "0.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a dot"}],
}


def said(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns], **more}


def read(path: Path, **options: Any) -> Stream:
    return conversations(str(path), **options)(SIZE, 0)


def refused(path: Path, message: str, **options: Any) -> str:
    """The one line with which something is refused."""
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        read(path, **options)
    told = str(found.value)
    assert "\n" not in told
    return told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


ASKED, TOLD = ("human", "<image>\nWhat?"), ("gpt", "a dot")
WRONG: list[tuple[Any, str]] = [
    ('{"image": "0.png", ', "it is not JSON"),
    (f"{json.dumps(GOOD)} ]", "something follows the entry"),
    ("[" * 100_000, "nested too deeply"),
    (["not", "an object"], "expected an object"),
    ({"image": "0.png"}, "no question in question or text"),
    ({"image": "9.png", "question": "What?", "answer": "dot"}, "there is no image '9.png'"),
    ({"image": "http://a.b/c.png", "question": "What?", "answer": "dot"}, "download the images first"),
    ({"image": "data:image/png;base64,??", "question": "What?", "answer": "dot"}, "no base64"),
    ({"image": 7, "question": "What?", "answer": "dot"}, "expected the path of an image"),
    ({"image": "0.png", "question": "What?"}, "no answer"),
    ({"image": "0.png", "question": "What?", "answer": "  "}, "no answer"),
    ({"image": "0.png", "question": "What?", "answer": ["dot", ""]}, "no answer"),
    ({"image": "0.png", "question": "", "answer": "dot"}, "no question"),
    ({"image": "0.png", "question": "Is\ud800it?", "answer": "dot"}, "is no text"),
    ({"image": "0.png", "question": ["What?", "Who?"], "answer": ["dot"]}, "2 questions need as many answers"),
    ({"image": "0.png", "question": "What?", "answer": "green", "options": ["red", "blue"]}, "none of the options"),
    ({"image": "0.png", "question": "What?", "answer": "red", "options": ["red"]}, "expected a list of 2 to 26"),
    (
        {"image": "0.png", "question": "How many?", "answer": 2, "options": ["2", "3", "4"]},
        "the answer 2 is the text of option A, and the number from 0 of option C: write the letter",
    ),
    (
        {"image": "0.png", "question": "What?", "answer": ["red", "green"], "options": ["red", "blue"]},
        "the answer 'green' is none of the options red, blue",
    ),
    (
        {"image": "0.png", "question": "What?", "answer": "red", "answers": ["blue", "green"]},
        "the answer 'red' is none of the answers beside it",
    ),
    ('{"image": "0.png", "question": "What?", "answer": NaN}', "no answer; write one"),
    ('{"image": "0.png", "question": NaN, "answer": "dot"}', "no question in question or text"),
    ({"image": "0.png", "question": "What?", "answer": "an <image>"}, "<image> mark in the answer"),
    (said(ASKED), "no answer"),
    (said(("human", "<image><image> What?"), TOLD), "2 <image> mark(s) for 1 image(s)"),
    (said(("human", "What?"), TOLD), "0 <image> mark(s) for 1 image(s)"),
    (said(ASKED, TOLD, image=[]), "1 <image> mark(s) for 0 image(s)"),
    (said(("human", "What?"), ("gpt", "<image>")), "mark in the answer"),
    (said(ASKED, ("human", "And?"), TOLD), "a turn of the user after one of the user"),
    (said(TOLD, ASKED), "a turn of the assistant at the beginning"),
    (said(ASKED, ("system", "Be brief."), TOLD), "a turn of the system after one of the user"),
    (said(ASKED, ("robot", "a dot")), "is from 'robot'"),
    (said(ASKED, ("gpt", "")), "no answer"),
    (said(ASKED, TOLD, answers=["a line"]), "not among the answers"),
    ({"image": "0.png", "conversations": ["What?"]}, "turn 1: expected 'from' and 'value'"),
    ({"messages": [{"role": "user", "content": 3}]}, "turn 1: expected a text, or a list"),
    (said(ASKED, TOLD, video="a.mp4"), "it holds 'video'"),
    ({"audios": ["a.wav"], "question": "What?", "answer": "dot"}, "it holds 'audios'"),
    ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "only texts and images"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG, ids=[f"{i} {message}" for i, (_, message) in enumerate(WRONG)])
def test_a_wrong_entry_is_refused_in_one_line_with_its_file_and_line(entry: Any, message: str, folder: Path) -> None:
    listed = not isinstance(entry, str)
    text = json.dumps(entry) if listed else entry
    file = folder / "talk.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{text}\n{json.dumps(GOOD)}\n")
    told = refused(file, message)
    assert told.startswith(f"{file}, line 3: ")
    assert len(told) < 500
    if listed:  # the same in a list that is one JSON text
        file = folder / "talk.json"
        file.write_text(json.dumps([GOOD, entry], indent=1))
        again = refused(file, message)
        line = json.dumps([GOOD], indent=1).count("\n") + 1
        assert again == told.replace(f"{folder / 'talk.jsonl'}, line 3", f"{file}, line {line} (entry 2)")


def test_what_is_wrong_with_files_and_folders_is_told_in_one_line(folder: Path) -> None:
    good = "".join(json.dumps(GOOD | {"image": f"{i}.png", "kind": "a"}) + "\n" for i in range(6))
    (folder / "talk.jsonl").write_text(good)
    (folder / "list.json").write_text('[\n{"question": "What?", "answer": "dot"}\n{"question": 1}]')
    (folder / "end.json").write_text('[{"question": "What?", "answer": "dot"},\n]')
    (folder / "object.json").write_text('{\n"question": "What?", "answer": "dot"}')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9?"}')
    (folder / "talk.csv").write_text("image,question\n0.png,What?\n")
    (folder / "talk.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"image": [b"x"], "question": ["What?"], "answer": [None]}), folder / "none.parquet")
    pq.write_table(pa.table({"image": [{"a": 1}], "question": ["What?"], "answer": ["dot"]}), folder / "odd.parquet")
    for name in ("test", "beside/talk", "beside/deep/talk"):
        (folder / name).with_suffix(".jsonl").parent.mkdir(parents=True, exist_ok=True)
        (folder / name).with_suffix(".jsonl").write_text(good)
    for name, rows in (("train", 6), ("test", 1)):
        (folder / "same").mkdir(exist_ok=True)
        (folder / "same" / f"{name}.jsonl").write_text("".join(good.splitlines(True)[:rows]))
    (folder / "alone").mkdir()
    (folder / "alone" / "test.jsonl").write_text(good)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("talks.jsonl", {}, "does not exist; did you mean"),
        ("0.png", {}, "expected a file that ends with .json"),
        ("list.json", {}, "line 3: it is not JSON (no comma after an entry)"),
        ("end.json", {}, "line 2: it is not JSON (a comma before the end"),
        ("object.json", {}, "line 1: it is not JSON"),
        ("empty.jsonl", {}, "holds no conversation"),
        ("latin.jsonl", {}, "is no UTF-8 text"),
        ("talk.csv", {}, "row 0: no answer"),
        ("talk.parquet", {}, "is not a parquet file"),
        ("none.parquet", {}, "row 0: no answer"),
        ("odd.parquet", {}, "image column 'image' holds"),
        ("talk.jsonl", {"by": "kinds"}, "line 1: 'kinds' (by=) is missing; did you mean 'kind'"),
        ("talk.jsonl", {"only": ["talks"]}, "has no task 'talks'; did you mean 'talk'"),
        ("talk.jsonl", {"images": "nowhere"}, "images='nowhere' is no folder"),
        ("talk.jsonl", {"score": "exakt"}, "unknown score 'exakt'; did you mean 'exact'"),
        ("talk.jsonl", {"score": "vqa"}, "score 'vqa' needs the answers of at least 4 people"),
        ("talk.jsonl", {"score": "choice"}, "the right answer 'a dot' of a multiple-choice question is not"),
        ("beside", {}, "holds 'talk.jsonl' beside the folder 'deep'"),
        ("same", {"images": str(folder)}, "an image of this test conversation is also learnt"),
        ("alone", {"images": str(folder)}, "is a test file, and there is none to learn"),
    ]
    for name, options, message in wrong:
        refused(folder / name, message, **options)


def test_a_named_column_that_no_entry_has_is_refused_with_what_was_meant(folder: Path) -> None:
    rows = [{"img": f"{i}.png", "question": "What?", "answer": "dot"} for i in range(6)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    (folder / "q.csv").write_text("img,question,answer\n" + "".join(f"{i}.png,What?,dot\n" for i in range(6)))
    for name in ("q.jsonl", "q.parquet", "q.csv"):
        told = refused(folder / name, "no entry has image='imgg'; did you mean 'img'?; it has: img", image="imgg")
        assert told.startswith(f"{folder / name}: ")
        told = refused(folder / name, "no answer in 'answr'; did you mean 'answer'?; it has: img", answer="answr")
        assert re.match(rf"{re.escape(str(folder / name))}, (line 1|row 0): ", told)
        refused(folder / name, "no question in questio; did you mean 'question'?", question="questio")
    talk = [json.dumps(GOOD | {"image": f"{i}.png"}) + "\n" for i in range(6)]
    (folder / "talk.jsonl").write_text("".join(talk))
    refused(folder / "talk.jsonl", "line 1: no image in 'imag'; did you mean 'image'?", image="imag")
    for option in ("answer", "question"):
        refused(
            folder / "talk.jsonl", f"no entry has {option}='said'; it has: image, conversations", **{option: "said"}
        )
    # of several files one may have no images
    (folder / "text.jsonl").write_text("".join(json.dumps({"question": "Two?", "answer": i}) + "\n" for i in range(6)))
    stream = conversations([str(folder / "q.jsonl"), str(folder / "text.jsonl")], image="img")(SIZE, 0)
    assert [sum(len(each.images) for each in task.test.records) > 0 for task in stream] == [True, False]  # type: ignore[attr-defined]
    assert "remarks" not in stream.notes


def test_a_file_of_texts_tells_which_columns_are_not_read(folder: Path) -> None:
    rows = [{"id": i, "img": f"{i}.png", "question": "What?", "answer": "dot"} for i in range(6)]
    (folder / "q.json").write_text(json.dumps(rows))
    (remark,) = read(folder / "q.json").notes["remarks"]
    assert remark == f"no images in {folder / 'q.json'}: only texts are read; columns that are not read: id, img"
    told: list[str] = []
    conversation_task(folder / "q.json", {}, 0, tell=told.append)
    assert told == [remark]
    assert "remarks" not in read(folder / "q.json", image="img").notes


def test_missing_and_damaged_images_are_left_out_and_listed_when_asked(folder: Path) -> None:
    file = folder / "talk.jsonl"
    images = ["0.png", "1.png", "gone.png", "2.png", "bad.png", "3.png", "4.png", "5.png"]
    (folder / "bad.png").write_bytes(b"no image")
    file.write_text(
        "".join(json.dumps({"image": each, "question": "What?", "answer": "dot"}) + "\n" for each in images)
    )
    with pytest.raises(ValueError, match=r"line 3: there is no image 'gone.png' in .*; add it$"):
        read(file)
    (folder / "gone.png").write_bytes((folder / "0.png").read_bytes())
    (task,) = read(file)
    damaged = next(d for d in (task.train, task.test) if any("line 5" in each.where for each in d.records))  # type: ignore[attr-defined]
    with pytest.raises(UnreadableImage, match=r"talk.jsonl, line 5: cannot read image .*bad.png"):
        damaged.__getitems__(range(len(damaged)))
    cells = [{"bytes": (folder / "0.png").read_bytes(), "path": None}, {"bytes": b"no image", "path": None}]
    table = {
        "images": [cells[:1], [], cells],
        "question": ["<image>?", "What?", "<image> or <image>?"],
        "answer": ["dot"] * 3,
    }
    pq.write_table(pa.table(table), folder / "lists.parquet")
    plan = conversations(str(folder / "lists.parquet"))
    with pytest.raises(UnreadableImage, match=r"lists.parquet, row 2: cannot read image .*lists.parquet, row 2: "):
        plan(SIZE, 0, True).tasks[0].test.__getitems__(range(3))
    (folder / "gone.png").unlink()
    stream = read(file, skip_bad=True)
    assert stream.notes["skipped"] == [f"{file}, line 3", f"{file}, line 5"]
    (task,) = stream
    assert len(task.train) + len(task.test) == 6


def mutate(value: Any, draw: random.Random) -> Any:
    """A value with one thing in it changed, lost, doubled or put elsewhere."""
    others: list[Any] = [
        None,
        "",
        "<image>",
        3,
        True,
        1e999,
        [],
        {},
        ["x"],
        {"type": "image"},
        "\ud800",
        "0.png",
        "a" * 300,
    ]
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        made = dict(value)
        action = draw.randrange(4)
        if action == 0:
            del made[key]
        elif action == 1:
            made[draw.choice(["image", "messages", "role", "type", "video", "options"])] = made.pop(key)
        else:
            made[key] = mutate(made[key], draw)
        return made
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        replaced = draw.choice([[], [value[at]] * 2, [mutate(value[at], draw)], [draw.choice(others)]])
        return [*value[:at], *replaced, *value[at + 1 :]]
    return draw.choice(others)


def test_mutations_of_a_good_file_give_a_stream_or_one_line(folder: Path) -> None:
    draw = random.Random(0)
    content = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "And?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a dot"}]
    rows: list[Any] = [
        GOOD,
        {"messages": turns},
        {"image": "2.png", "question": "Which?", "options": ["red", "dot"], "answer": "dot"},
        {"images": ["3.png", "4.png"], "text": "<image> or <image>?", "answers": ["a", "b", "a"], "kind": "x"},
        {"question": "Two and two?", "answer": 4},
    ]
    file, told = folder / "fuzz.jsonl", list[str]()
    for number in range(400):
        changed = copy.deepcopy(rows)
        at = draw.randrange(len(changed))
        changed[at] = mutate(changed[at], draw)
        text = "".join(json.dumps(row) + "\n" for row in changed)
        if number % 4 == 0:
            cut = draw.randrange(len(text))
            text = text[:cut] + draw.choice(["", '"', "}", "\n", ",", "\\u12"]) + text[cut + draw.randrange(3) :]
        file.write_text(text)
        try:
            stream = read(file)
            for task in stream:
                for data in (task.train, task.test):
                    data.__getitems__(range(len(data)))
        except ValueError as error:
            told.append(str(error))
    assert [each for each in told if not each.startswith(str(file)) or "\n" in each] == []
    assert 40 < len(told) < 360
