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

from perdure.backbones.preprocess import Preprocess
from perdure.scoring import measure
from perdure.streams.conversation_stream import as_questions, conversations, in_turn
from perdure.streams.conversations import Conversation
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
    plan = conversations(str(path), **options)
    (task,) = plan(SIZE, 0, True)
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
        assert {**each}["images"] is each.images
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


def test_all_images_of_a_conversation_are_decoded_once_and_pickled_ones_hold_none(folder: Path) -> None:
    file = folder / "again.jsonl"
    twice = {**row(0), "image": ["pics/0.png", "pics/0.png"], "question": "<image> or <image>?"}
    write(file, [twice, *({**row(i % 3), "question": f"{i}?"} for i in range(1, 12))])
    data = measured(file)
    left, data.pictures.budget.left = data.pictures.budget.left, 0
    opened: list[int] = []
    (source, _), *_ = data.pictures._places
    real = source.read
    source.read = lambda number: opened.append(number) or real(number)
    try:
        batch = data.__getitems__(range(12))
        assert (sorted(opened), data.images()) == ([0, 1, 2], 3)
        data.pictures.budget.left = left  # now what is decoded stays
        for _ in range(2):
            data.__getitems__([0, 3])
            assert sorted(opened) == [0, 0, 1, 2]
    finally:
        del source.read
    assert (batch["pair"].unique().numel(), batch["pair"][3]) == (4, batch["pair"][6])
    again = pickle.loads(pickle.dumps(data))
    assert (again.pictures._decoded, len(again.__getitems__([0])["conversation"])) == ({}, 1)
    assert torch.equal(again.pairs, data.pairs)


def shown(*sets: Any) -> set[int]:
    return {number for data in sets for each in data.records for number in each.images}


def test_no_image_is_learnt_in_one_task_and_tested_in_another(folder: Path) -> None:
    file = folder / "kinds.jsonl"
    write(file, [{**row(i), "kind": kind} for i in range(20) for kind in ("colour", "shape")])
    stream = read(file, by="kind")
    assert {task.name for task in stream} == {"colour", "shape"}
    learnt, tested = shown(*(task.train for task in stream)), shown(*(task.test for task in stream))
    assert (len(learnt), len(tested), learnt & tested) == (16, 4, set())
    assert (stream.notes["test_images"], stream.notes["conversations"]["train"]) == ([4, 4], [16, 16])
    # Neither the seed nor which tasks are kept changes what is tested; fewer are a part of more.
    one = read(file, seed=9, by="kind", only=("shape",), per_task=3)
    (task,) = one
    whole = next(each for each in stream if each.name == "shape")
    keys = [{each.key for each in data.records} for data in (task.train, whole.train, task.test, whole.test)]
    assert keys[0] < keys[1]
    assert (keys[2], len(task.train)) == (keys[3], 3)
    mixed = read(file, by="kind", share_images=True)
    assert shown(*(task.train for task in mixed)) & shown(*(task.test for task in mixed))
    assert mixed.notes["remarks"]
    joined = in_turn(
        *(conversations(str(file), by="kind", share_images=True, only=(kind,)) for kind in ("shape", "colour"))
    )
    assert "images that are learnt, in some task" in joined(SIZE, 0).notes["remarks"][-1]
    write(folder / "apart" / "a.train.json", [row(i) for i in range(4)])
    write(folder / "apart" / "a.test.json", [row(i) for i in range(4, 6)])
    write(folder / "apart" / "b.train.json", [row(i) for i in range(5, 9)])
    write(folder / "apart" / "b.test.json", [row(9)])
    with pytest.raises(ValueError, match=r"a.test.json, line 7 \(entry 2\): .* is also learnt, in task 'b'"):
        read(folder / "apart", images=str(folder))
    apart = read(folder / "apart", images=str(folder), share_images=True)
    assert apart.notes["remarks"] == ["task 'a': 1 of 2 test conversations show images that are learnt"]


LAYOUTS = [
    (["a.train.json", "a.test.json", "b.train.json", "b.test.json"], ["a", "b"]),
    (["a/train.json", "a/test.json", "b/train.jsonl", "b/val.jsonl"], ["a", "b"]),
    (["a/train_4w.json", "a/test_3000.json", "b/training_set.json", "b/test.json"], ["a", "b"]),
    (["train/a.json", "train/b.json", "test/a.json", "test/b.json"], ["a", "b"]),
    (["a.json", "b.csv"], ["a", "b"]),
    (["a/one.json", "b.d/two.json"], ["one", "two"]),
    (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"], ["layout"]),
]


@pytest.mark.parametrize(("files", "names"), LAYOUTS, ids=[files[0] for files, _ in LAYOUTS])
def test_files_and_folders_are_tasks_by_their_names(
    files: list[str], names: list[str], folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "layout"
    for number, file in enumerate(files):
        write(place / file, [row(i) for i in range(number * 5, number * 5 + 5)])
    stream = read(place, images=str(folder))
    assert sorted(task.name for task in stream) == names
    given = any("test" in file for file in files)
    assert [len(task.test) for task in stream] == [5 if given else 1] * len(names)
    assert stream.notes["split"]["kind"] == ("given" if given else "20% of the images held out")
    assert sum(len(task.train) + len(task.test) for task in stream) == 5 * len(files)


def test_a_list_of_files_is_in_order_and_a_folder_by_the_seed(folder: Path) -> None:
    for name in "cab":
        write(folder / "three" / f"{name}.json", [row(i) for i in range(5)])
    paths = [str(folder / "three" / f"{name}.json") for name in "cab"]
    for seed in range(3):
        assert [task.name for task in read(paths, seed, images=str(folder))] == ["c", "a", "b"]
    found = {tuple(t.name for t in read(folder / "three", seed, images=str(folder))) for seed in range(6)}
    assert len(found) > 1
    named = read(folder / "three", images=str(folder), order=["b", "c", "a"])
    assert [(task.name, task.classes) for task in named] == [("b", (0,)), ("c", (1,)), ("a", (2,))]


CHOICES: list[tuple[Any, Any, str]] = [
    (["red", "blue"], "blue", "B"),
    (["red", "blue"], 1, "B"),
    (["red", "blue"], "(b)", "B"),
    ("red|blue", "RED", "A"),
    ('["red", "blue"]', "A.", "A"),
    ({"A": "red", "B": "blue", "C": None}, "B", "B"),
    (["(A) red", "(B) blue"], "blue", "B"),
    (["2", "1"], "1", "B"),
]


def test_options_by_number_stand_in_the_order_of_numbers_and_the_answer_may_be_one(tmp_path: Path) -> None:
    options = {str(number): f"o{number}" for number in range(1, 13)}
    for answer in (11, "11", "o11"):
        write(tmp_path / "q.jsonl", [{"question": "Which?", "options": options, "answer": answer}])
        (each,) = examples(measured(tmp_path / "q.jsonl", score="choice"))
        assert each.options == tuple(options.values())
        assert each.answer == "K"


@pytest.mark.parametrize(("options", "answer", "letter"), CHOICES)
def test_options_are_written_out_and_the_answer_is_a_letter(
    options: Any, answer: Any, letter: str, tmp_path: Path
) -> None:
    file = tmp_path / "choice.jsonl"
    write(file, [{"question": "Which?", "options": options, "answer": answer}])
    (each,) = examples(measured(file, score="choice"))
    first, second = each.options or ()
    asked = f"Which?\nA. {first}\nB. {second}\nAnswer with the option's letter from the given choices directly."
    assert (each.question, each.answer, first.startswith("(")) == (asked, letter, False)
    write(file, [{"question": "Which?\n(A) red\n(B) blue", "options": ["red", "blue"], "answer": "B"}])
    (each,) = examples(measured(file, suffix="One letter."))
    assert (each.question, each.answer) == ("Which?\n(A) red\n(B) blue\nOne letter.", "B")


def test_all_right_options_are_right(tmp_path: Path) -> None:
    asked = {"question": "Which?", "options": ["red", "blue", "green"]}
    for given in (["green", "red", "green"], ["C", "A"], [2, 0], ["C. green", "A."]):
        write(tmp_path / "q.jsonl", [asked | {"answer": given}])
        (each,) = examples(measured(tmp_path / "q.jsonl", score="choice"))
        assert each.answers == ("C", "A")
        assert [measure([said], [each.reference], "choice")["strict"] for said in "ABC"] == [1, 0, 1]


def test_what_people_answered_is_right_and_the_answer_beside_it_is_taught(tmp_path: Path) -> None:
    people = ["2", "two", "2", "three"]
    for answers in (people, [{"answer": each, "answer_id": i} for i, each in enumerate(people)]):
        write(tmp_path / "q.jsonl", [{"question": "How many?", "answer": "Three", "answers": answers}])
        (each,) = examples(measured(tmp_path / "q.jsonl", score="vqa"))
        assert (each.taught, sorted(each.answers)) == ("Three", ["2", "2", "Three", "two"])
        (each,) = examples(measured(tmp_path / "q.jsonl", answer="answer"))
        assert each.answers == ("Three",)
    write(tmp_path / "q.jsonl", [{"question": "How many?", "answers": people}])
    (each,) = examples(measured(tmp_path / "q.jsonl", score="vqa"))
    assert each.answers == ("2", "two", "2", "three")


def test_a_missing_cell_of_pandas_is_nothing_and_its_integers_stay_integers(tmp_path: Path) -> None:
    nan = float("nan")
    rows: list[dict[str, Any]] = [
        {"question": "How long?", "answer": 2.5, "options": nan, "image": nan, "kind": nan},
        {"question": "How many?", "answer": 3.0, "options": nan, "image": nan, "kind": "number"},
        {"question": "Which?", "answer": 1.0, "options": ["red", "blue"], "image": nan, "kind": nan},
    ]
    write(tmp_path / "q.jsonl", rows)  # as NaN, which Python's json reads
    columns = {name: [row[name] for row in rows] for name in ("question", "answer")}
    options = [None if row["options"] is nan else row["options"] for row in rows]
    pq.write_table(pa.table(columns | {"options": options, "kind": [nan, nan, nan]}), tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.parquet"):
        found = examples(measured(tmp_path / name))
        assert [each.answer for each in found] == ["2.5", "3", "B"]
        assert [each.options for each in found] == [None, None, ("red", "blue")]


def test_any_stream_of_images_becomes_questions_and_streams_follow_each_other(folder: Path) -> None:
    table = folder / "labels.parquet"
    rows = [
        {"image": {"bytes": png(i), "path": None}, "label": ("big_dog", "cat", "cow", "pig")[i % 4]} for i in range(20)
    ]
    write(table, rows)
    images = f"parquet(path={str(table)!r}, tasks=2, order='natural')"
    asked = as_questions(images, "What is in the picture?")(SIZE, 0)
    assert [(task.names, task.score) for task in asked] == [(("big_dog", "cat"), "exact"), (("cow", "pig"), "exact")]
    for task in asked:
        for each, label in zip(
            task.train.__getitems__(range(8))["conversation"], task.train.labels.tolist(), strict=True
        ):
            colour = each.images[0].getpixel((0, 0))[0]
            assert (
                each.answer == ("big dog", "cat", "cow", "pig")[colour % 4] == ("big dog", "cat", "cow", "pig")[label]
            )
            assert (each.question, each.where.startswith(str(table))) == ("What is in the picture?", True)
    file = folder / "talk.jsonl"
    write(file, [row(i) for i in range(10)])
    joined = in_turn(conversations(str(file)), as_questions(images, question="What?"))(SIZE, 0)
    assert {each.gives for each in (asked, joined)} == {"conversations"}
    assert [(task.index, task.classes, task.total) for task in joined] == [(0, (0,), 3), (1, (1, 2), 3), (2, (3, 4), 3)]
    assert [sorted(set(task.train.labels.tolist())) for task in joined] == [[0], [1, 2], [3, 4]]
    last = in_turn(
        conversations(str(file)),
        conversations(str(folder / "three"), images=str(folder)),
        order=["talk", "a", "c", "b"],
    )
    assert [task.name for task in last(SIZE, 0)] == ["talk", "a", "c", "b"]
    with pytest.raises(ValueError, match="write as_questions"):
        in_turn(images, conversations(str(file)))(SIZE, 0)
    with pytest.raises(ValueError, match="expected a text"):
        as_questions(images)
    with pytest.raises(ValueError, match="no stream of labelled images"):
        as_questions(conversations(str(file)), "What?")(SIZE, 0)
