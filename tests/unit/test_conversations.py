"""Streams of conversations: formats, what is learnt and tested, and what is refused."""

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from perdure.backbones.preprocess import Preprocess, UnreadableImage
from perdure.streams.conversation_stream import as_questions, conversations, in_turn
from perdure.streams.conversations import Conversation, ConversationSet
from perdure.types import Stream, Task

SIZE = Preprocess(size=8, resize=8)


def png(number: int) -> bytes:
    """An image that tells its number by its colour."""
    made = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(made, "PNG")
    return made.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images."""
    place = tmp_path_factory.mktemp("data")
    (place / "pics").mkdir()
    for number in range(20):
        (place / "pics" / f"{number}.png").write_bytes(png(number))
    return place


def read(path: Path | list[str], seed: int = 0, **options: Any) -> Stream:
    return conversations(path if isinstance(path, list) else str(path), **options)(SIZE, seed)


def measured(path: Path, **options: Any) -> Any:
    """All conversations of one task, as data."""
    plan = conversations.measured(str(path), **options)  # type: ignore[attr-defined]
    (task,) = plan(SIZE, 0)
    assert len(task.train) == 0
    return task.test


def examples(*sets: Any) -> list[Conversation]:
    """All conversations, in the order of their first image, or their answer."""
    found = [each for data in sets for each in data.__getitems__(range(len(data)))["conversation"]]
    return sorted(found, key=lambda each: (each.images[0].getpixel((0, 0)) if each.images else (0,), each.where))


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(file: Path, rows: list[Any]) -> None:
    """Rows in the form that the ending says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        names = list(rows[0])
        text = [",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in rows)]
        file.write_text("\n".join(text))
    else:
        file.write_text(json.dumps(rows, indent=1) if file.suffix == ".json" else lines(rows))


def llava(i: int) -> dict[str, Any]:
    asked = {"from": "human", "value": f"<image>\nWhat is {i}?"}
    return {"id": i, "image": f"pics/{i}.png", "conversations": [asked, {"from": "gpt", "value": f"it is {i}"}]}


def spoken(i: int) -> dict[str, Any]:
    content = [{"type": "image", "image": f"pics/{i}.png"}, {"type": "text", "text": f"What is {i}?"}]
    answer = [{"type": "text", "text": f"it is {i}"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def marked(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>What is {i}?"}, {"role": "assistant", "content": f"it is {i}"}]
    return {"messages": turns, "images": [f"pics/{i}.png"]}


def row(i: int) -> dict[str, Any]:
    return {"image": f"pics/{i}.png", "question": f"What is {i}?", "answer": f"it is {i}"}


def inside(i: int) -> dict[str, Any]:
    return {**row(i), "image": {"bytes": png(i), "path": "x.png"}}


def several(i: int) -> dict[str, Any]:
    made = row(i)
    return {"images": [{"bytes": png(i), "path": None}], "question": made["question"], "answer": made["answer"]}


def uri(i: int) -> dict[str, Any]:
    return {**row(i), "image": f"data:image/png;base64,{base64.b64encode(png(i)).decode()}"}


FORMS = [
    (llava, ".json"),
    (llava, ".jsonl"),
    (llava, ".parquet"),
    (spoken, ".jsonl"),
    (spoken, ".parquet"),
    (marked, ".json"),
    (row, ".csv"),
    (row, ".parquet"),
    (row, ".jsonl"),
    (inside, ".parquet"),
    (several, ".parquet"),
    (uri, ".json"),
]


@pytest.mark.parametrize(("form", "ending"), FORMS, ids=[f"{form.__name__}{ending}" for form, ending in FORMS])
def test_every_form_and_file_gives_the_same_conversations(form: Any, ending: str, folder: Path) -> None:
    file = folder / f"{form.__name__}_{ending[1:]}{ending}"
    write(file, [form(i) for i in range(10)])
    stream = read(file, score="exact")
    (task,) = stream
    assert (task.name, task.score, task.total) == (file.stem, "exact", 1)
    assert (len(task.train), len(task.test)) == (8, 2)
    found = examples(task.train, task.test)
    for i, each in enumerate(found):
        content = [{"type": "image"}, {"type": "text", "text": f"What is {i}?"}]
        assert each.messages == ({"role": "user", "content": content},)
        assert each.images[0].getpixel((0, 0)) == (i, 0, 0)
        assert (each.answer, each.options, each.score) == (f"it is {i}", None, "exact")
        assert each["answer"] == each.answer and {**each}["images"] is each.images
        assert str(file) in each.where
    assert Task.described(task.describe()).score == "exact"


def test_conversations_may_show_several_images_or_none_and_have_many_turns(folder: Path) -> None:
    file = folder / "many.jsonl"
    turns = ["<image>\n<image>\nCompare the two.", "alike", "And <image> this?", "darker"]
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    rows = [{"system": "Be brief.", "image": [f"pics/{n}.png" for n in (1, 2, 3)], "conversations": said}]
    rows += [{"messages": [{"role": "user", "content": "Two and two?"}], "answers": ["5", "4", "4"]}]
    write(file, rows)
    text, shown = examples(measured(file))
    assert (text.images, text.answers, text.taught, text.question) == ((), ("4", "5", "4"), "4", "Two and two?")
    assert [each["role"] for each in shown.messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in shown.messages[1]["content"]] == ["image", "image", "text"]
    assert [part.get("text") for part in shown.messages[3]["content"]] == ["And ", None, " this?"]
    assert (len(shown.images), shown.answer) == (3, "darker")
    every = [(each.taught, len(each.images)) for each in examples(measured(file, every_turn=True))]
    assert every == [("4", 0), ("alike", 2), ("darker", 3)]
