"""What shows the same is held out together, and what is taught is told where it is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from perdure.api.learner import Learner
from perdure.backbones.tiny import tiny
from perdure.evaluation.held_out import held_out_of, remarks
from perdure.streams import build_stream
from perdure.types import Stream

PREPROCESS = tiny().preprocess


def photos(folder: Path, many: int = 10) -> list[tuple[str, str]]:
    """Paths within `folder` and classes of images that differ."""
    found = []
    for c in ("cat", "dog"):
        for i in range(many):
            path = folder / c / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i * 20, 40 * len(c) % 256, 250 if c == "cat" else 0)).save(path)
            found.append((f"{c}/{i}.png", c))
    return found


def as_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))


def as_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    images, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path)


def as_lines(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"image": image, "captions": [text]}) + "\n" for image, text in rows))


def shown(stream: Stream, side: str) -> list[str]:
    sets: list[Any] = [getattr(task, side) for task in stream]
    return [data.source.where(row).rpartition("/")[2] for data in sets for row in data.rows.tolist()]


@pytest.mark.parametrize(("kind", "write"), [("csv", as_csv), ("parquet", as_parquet)])
def test_rows_that_show_one_image_are_held_out_together(
    kind: str, write: Callable[[Path, list[tuple[str, str]]], None], tmp_path: Path
) -> None:
    rows = photos(tmp_path)
    write(tmp_path / f"all.{kind}", [*rows, *rows, ("dog/0.png", "cat")])  # a row for each box, or for each label
    stream = build_stream(f'{kind}(path="{tmp_path}/all.{kind}", tasks=2)', PREPROCESS, 0)
    learnt, tested = ({each for t in stream for each in getattr(t, side).identities()} for side in ("train", "test"))
    assert tested
    assert not learnt & tested
    once = build_stream(f'images(path="{tmp_path}", tasks=2)', PREPROCESS, 0)
    assert [len(task.test) for task in once] == [2, 2]


@pytest.mark.parametrize("names", [("mnist_train", "mnist_test"), ("labels.train", "labels.test"), ("train", "dev")])
@pytest.mark.parametrize(
    ("kind", "ending", "write"),
    [("csv", "csv", as_csv), ("parquet", "parquet", as_parquet), ("captions", "jsonl", as_lines)],
)
def test_a_file_is_for_what_the_first_or_the_last_word_of_its_name_says(
    names: tuple[str, str], kind: str, ending: str, write: Any, tmp_path: Path
) -> None:
    rows = photos(tmp_path)
    write(tmp_path / f"{names[0]}.{ending}", rows[:8] + rows[10:18])
    write(tmp_path / f"{names[1]}.{ending}", rows[8:10] + rows[18:])
    more = ', by="random"' if kind == "captions" else ""
    stream = build_stream(f'{kind}(path="{tmp_path}", tasks=2{more})', PREPROCESS, 0)
    assert stream.notes["split"]["kind"] == "given"
    assert [sum(len(getattr(task, side)) for task in stream) for side in ("train", "test")] == [16, 4]


def test_a_file_beside_train_whose_name_does_not_say_what_it_is_for_is_refused(tmp_path: Path) -> None:
    rows = photos(tmp_path)
    as_csv(tmp_path / "train.csv", rows[:10])
    as_csv(tmp_path / "other.csv", rows[10:])
    with pytest.raises(
        ValueError, match=r"train\.csv and other\.csv, whose name does not say what it is for: rename it"
    ):
        build_stream(f'csv(path="{tmp_path}")', PREPROCESS, 0)


@pytest.mark.parametrize("shows", [False, True])
def test_the_turns_of_a_dialogue_are_held_out_together(shows: bool, tmp_path: Path) -> None:
    photos(tmp_path)
    entries = [
        {
            "messages": [
                {"role": "user", "content": ("<image>" if shows and turn == 0 else "") + f"question {i} {turn}"}
                if who == "user"
                else {"role": "assistant", "content": f"answer {i} {turn}"}
                for turn in range(3)
                for who in ("user", "assistant")
            ]
        }
        | ({"images": [f"cat/{i % 4}.png"]} if shows else {})
        for i in range(20)
    ]
    (tmp_path / "qa.json").write_text(json.dumps(entries))
    shared = ", share_images=True" if shows else ""
    stream = build_stream(f'conversations(path="{tmp_path}/qa.json", every_turn=True{shared})', PREPROCESS, 0)
    sets: list[Any] = [stream.tasks[0].train, stream.tasks[0].test]
    learnt, tested = ({record.where for record in data.records} for data in sets)
    assert len(learnt) == 16
    assert len(tested) == 4
    assert stream.notes["split"]["kind"] == "20% of the conversations held out"


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (
            'sequence(as_questions(images(path="{0}", tasks=1), question="What?"), images(path="{0}"))',
            "has conversations: write",
        ),
        ('sequence(conversations(path="{0}/qa.json"), conversations(path="{0}/qa.json"))', "has conversations: write"),
        ('sequence(fewshot(images(path="{0}"), ways=1, base=1, shots=2), images(path="{0}"))', "has 2 tasks, and each"),
    ],
)
def test_what_is_no_single_data_set_is_refused_in_a_sequence(described: str, said: str, tmp_path: Path) -> None:
    rows = photos(tmp_path)
    (tmp_path / "qa.json").write_text(json.dumps([{"image": i, "question": "?", "answer": c} for i, c in rows]))
    with pytest.raises(ValueError, match=said):
        build_stream(described.format(tmp_path), PREPROCESS, 0)


def text_learner() -> Any:
    backbone = tiny(text=True)
    return SimpleNamespace(backbone=backbone, objective=SimpleNamespace(templates=None, asks=frozenset()))


def test_a_sequence_and_sessions_can_be_retained(tmp_path: Path) -> None:
    photos(tmp_path)
    for described in (
        'sequence(images(path="{0}"), images(path="{0}"))',
        'fewshot(images(path="{0}"), ways=1, base=1, shots=2)',
    ):
        held = held_out_of((described.format(tmp_path),), text_learner())
        assert sum(len(task.test) for each in held.sets.values() for task in each)


def test_labelled_images_that_are_taught_and_retained_are_told(tmp_path: Path) -> None:
    photos(tmp_path)
    stream = build_stream(f'images(path="{tmp_path}", tasks=2)', PREPROCESS, 0)
    held = held_out_of((f'images(path="{tmp_path}")',), text_learner(), True)
    assert remarks(held, stream) == [
        f"{tmp_path.name}: 16 of its 20 images are taught by the stream: they are not held out"
    ]


def test_conversations_and_questions_about_one_image_know_it_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = photos(tmp_path / "imgs")
    (tmp_path / "imgs/qa.json").write_text(json.dumps([{"image": i, "question": "?", "answer": c} for i, c in rows]))
    monkeypatch.chdir(tmp_path)
    asked = 'as_questions(images(path="imgs", tasks=1), question="What?")'
    stream = build_stream(f'in_turn(conversations(path="{tmp_path}/imgs/qa.json"), {asked})', PREPROCESS, 0)
    assert "test conversations show images that are learnt, in some task" in " ".join(stream.notes["remarks"])


def test_conversations_without_images_are_the_same_where_they_say_the_same(tmp_path: Path) -> None:
    for folder, word in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / folder).mkdir()
        entries = [{"question": f"{word} {i}", "answer": f"{i}"} for i in range(10)]
        (tmp_path / folder / "qa.json").write_text(json.dumps(entries))

    def numbers(folder: str) -> list[int]:
        task = build_stream(f'conversations(path="{tmp_path}/{folder}/qa.json")', PREPROCESS, 0).tasks[0]
        sets: list[Any] = [task.train, task.test]
        return sorted(torch.cat([data.pairs for data in sets]).tolist())

    assert numbers("a") == numbers("c")
    assert not {*numbers("a")} & {*numbers("b")}


@pytest.mark.parametrize(
    ("entry", "taught"),
    [
        ({"question": "What is it?\nA. cat\nB. dog", "options": ["cat", "dog"], "answer": 1}, "B"),
        ({"question": "What is it?\nA. cat\nB. dog", "options": ["cat", "dog"], "answer": "dog"}, "dog"),
        ({"question": "What?", "options": ["A. cat", "B. dog"], "answer": "B. dog"}, "B"),
        ({"question": "What?\nA. cat\nB. dog", "options": {"x": "cat", "y": "dog"}, "answer": "y"}, "B"),
    ],
)
def test_an_option_by_number_by_key_or_as_it_is_written_is_its_letter(
    entry: dict[str, Any], taught: str, tmp_path: Path
) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([entry, entry | {"question": f"Once more: {entry['question']}"}]))
    [task] = build_stream(f'conversations(path="{tmp_path}/qa.json")', PREPROCESS, 0).tasks
    sets: list[Any] = [task.train, task.test]
    assert {record.answers for data in sets for record in data.records} == {(taught,)}


def test_an_option_that_is_quoted_with_another_letter_is_refused(tmp_path: Path) -> None:
    entry = {"question": "What?", "options": ["A. cat", "B. dog"], "answer": "A. dog"}
    (tmp_path / "qa.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="none of the options"):
        build_stream(f'conversations(path="{tmp_path}/qa.json")', PREPROCESS, 0)


def test_joint_training_without_what_came_before_is_refused(tmp_path: Path) -> None:
    images, labels = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8), ["cat", "dog"] * 4
    learner = Learner.create("tiny()", "lora(rank=2) + joint", precision="fp32", epochs=1)
    learner.learn(images, labels).save(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"joint trains on all data so far, and that of task 1 .* is not at hand"):
        Learner.load(tmp_path / "kept").learn(images, ["emu", "fox"] * 4)
    learner.learn(images, ["emu", "fox"] * 4)
