"""A language model is taught files of questions, asked, talked with, and exported, as people do it."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.api.folders import teach_folder
from perdure.api.learner import Learner
from perdure.core.checkpoint import whole
from perdure.training.config import RunConfig
from perdure.training.defaults import usual
from perdure.training.loop import Quiet

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
FAST = ["--epochs", 6, "--lr", 2e-2, "--batch-size", 4, "--precision", "fp32", "--device", "cpu"]
TINY = ["--backbone", "tiny_mllm()"]


def write(folder: Path, name: str, question: str, answer: Callable[[str], str], count: int = 18) -> Path:
    """A file of questions about as many plain pictures."""
    folder.mkdir(exist_ok=True)
    random, rows = np.random.default_rng(len(name)), []
    for i in range(count):
        colour = list(COLOURS)[i % 3]
        picture = np.clip(np.array(COLOURS[colour]) + random.integers(-20, 20, (28, 28, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{name}{i}.png")
        rows.append({"image": f"{name}{i}.png", "question": question, "answer": answer(colour)})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write(folder, "colour", "Which colour?", str)
    write(folder, "red", "Is it red?", lambda name: "yes" if name == "red" else "no")
    write(folder, "few", "Which colour?", str, 4)
    return folder


@pytest.fixture(scope="module")
def backbone(tiny_mllms: Callable[[str], Path]) -> str:
    return f"mllm(path={str(tiny_mllms('llava'))!r})"


@pytest.fixture(scope="module")
def taught(data: Path, backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner of the two files; not to be changed."""
    from perdure.cli.main import main

    into = tmp_path_factory.mktemp("taught") / "it"
    for name in ("colour", "red"):
        made = ["--backbone", backbone] if name == "colour" else []
        more = FAST if made else FAST[:6]
        main([str(word) for word in ("learn", data / f"{name}.jsonl", "--into", into, *made, *more)])
    return into


def test_a_file_of_questions_is_a_lesson_and_the_next_one_another(taught: Path, data: Path) -> None:
    written = json.loads((taught / "run.json").read_text())["config"]
    assert (written["objective"], written["method"].split("(")[0]) == ("generate()", "lora")
    summary = json.loads((taught / "summary.json").read_text())
    assert summary["score"] == "strict"
    assert summary["matrix"][0][0] >= 0.5
    assert summary["matrix"][1][1] >= 0.5
    assert summary["matrix"][1][0] is not None, "the first file is read again to be measured again"
    learner = Learner.load(taught)
    assert list(learner.known) == ["colour", "red"]


def test_answers_are_the_same_in_python_on_the_command_line_in_a_batch_and_in_a_chat(
    taught: Path, data: Path, perdure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [data / f"colour{i}.png" for i in range(3)]
    learner = Learner.load(taught)
    said = learner.ask(files, ["Which colour?"] * 3, tokens=8)
    assert [learner.ask(file, "Which colour?", tokens=8) for file in files] == said
    with Image.open(files[0]) as picture:
        assert learner.ask([picture], "Which colour?", 8) == said[0]
        assert learner.ask(np.asarray(picture), "Which colour?", 8) == said[0]
    for question, said_of in ((5, "got 5, expected a text, or a list"), ([], "got an empty list for an image")):
        with pytest.raises(ValueError, match=f"^question: {said_of}"):
            learner.ask(files[0], question)  # type: ignore[call-overload]
    both, none = learner.ask(files[:2], "Which colour?", 8), learner.ask(None, "Which colour?", 8)
    assert learner.ask([files[:2], None], ["Which colour?"] * 2, 8) == [both, none]
    asked = perdure("ask", taught, files[0], "Which colour?", "--tokens", 8)
    assert (asked.code, asked.err, asked.out) == (0, "", f"{said[0]}\n")
    (event,) = perdure("ask", taught, *files[:2], "Which colour?", "--tokens", 8, "--json").events
    assert event == {"images": [str(each) for each in files[:2]], "question": "Which colour?", "answer": both}
    long = "Which colour has it, 图中是什么颜色? " * 8  # longer than the name of a file may be
    asked = perdure("ask", taught, files[0], long, "--tokens", 4)
    assert (asked.code, asked.out) == (0, f"{learner.ask(files[0], long, 4)}\n"), asked.err
    lines = [
        {"image": str(files[0]), "question": "Which colour?"},
        {"image": str(files[1]), "conversations": [{"from": "human", "value": "<image>\nWhich colour?"}]},
        {"messages": [{"role": "user", "content": "<image>\nWhich colour?"}], "images": [str(files[2])]},
        {"question": "Which colour?"},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    batch = perdure("ask", taught, "--stdin", "--tokens", 8, "--json")
    assert [each["answer"] for each in batch.events] == [*said, none]
    assert batch.events[3]["images"] == []
    typed = f"/image {files[0]}\nWhich colour?\n\nWhy?\n/new\nWhich colour?\n/quit\nx\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    talk = perdure("chat", taught, "--tokens", 8, "--json")
    assert talk.code == 0
    assert [each["answer"] for each in talk.events][::2] == [said[0], none]
    assert len(talk.events) == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("ask", "L", "gone.png", "What?"), "there is no image 'gone.png': give an image, and the question in quotes"),
        (("ask", "L", "How", "many?"), "there is no image 'How': give an image, and the question in quotes"),
        (("ask", "L", "D/red0.png"), "is a file, and no question comes after it"),
        (("ask", "L", "gone.png"), "there is no image 'gone.png', and no question comes after it: write perdure ask"),
        (("ask", "L"), "there is no question: write perdure ask"),
        (("ask", "L", " "), "there is no question: write perdure ask"),
        (("ask", "L", ""), "an empty word, number 2 after 'perdure ask', says nothing"),
        (("ask", "L", "D/red.jsonl", "What?"), "not an image"),
        (("ask", "L", "What?", "--stdin"), "'What?' has no effect beside --stdin"),
        (("ask", "L", "--stdin"), "standard input is empty"),
        (("ask", "L", "--stdin", '{"question": "a"}\n{"question": '), "standard input, line 2: it is not JSON"),
        (("ask", "L", "--stdin", '{"image": "gone.png", "question": "a"}'), "line 1: there is no image 'gone.png'"),
        (("ask", "L", "--stdin", '{"image": "D/red0.png"}'), "no conversations and no messages; it has: image\n"),
        (("chat", "L", "/image gone.png"), "there is no image 'gone.png': give /image cat.jpg"),
        (("chat", "L", "/imagine"), "there is no /imagine: /image PATH shows"),
        (("predict", "L", "D/red0.png"), "answers in words, which predict does not give: use ask"),
        (("search", "L", "D", "a dog"), "answers in words, which search does not give: use ask"),
        (("learn", "D/red.jsonl", "--into", "L", "--captions", "x"), "--captions x has no effect with generate()"),
        (("learn", "D/red.jsonl", "--into", "new"), "holds conversations, and pocket() cannot answer in words"),
        (("learn", "D", "--into", "new", *TINY), "holds 3 tasks (colour, few, red): teach"),
        (("learn", "D/red.jsonl", "--into", "new", *TINY, "--score", "exakt"), "did you mean 'exact'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(
    words: tuple[str, ...], line: str, taught: Path, data: Path, perdure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [{"L": str(taught), "D": str(data)}.get(word, word.replace("D/", f"{data}/")) for word in words]
    fed = typed.pop() if words[0] == "chat" or words[-1].startswith("{") else ""
    monkeypatch.setattr("sys.stdin", io.StringIO(fed))
    answer = perdure(*typed)
    assert (answer.code, answer.out) == (2, "")
    assert line in answer.err
    assert answer.err.count("\n") == 1


def test_few_questions_are_all_learnt_and_a_learner_that_sees_says_no_words(data: Path) -> None:
    learner = Learner.create("tiny_mllm()", epochs=1, precision="fp32", device="cpu")
    before = learner.ask(data / "few0.png", "Which colour?", tokens=4)
    learner.learn(data / "few.jsonl")
    picture = Image.open(data / "few0.png")
    asked = {"question": "Is it red?", "answer": "yes"}
    learner.learn(conversations=[{"image": picture, **asked}, {"image": data / "few1.png", **asked}])
    assert [len(task.train) for task in learner.tasks] == [4, 2]
    assert list(learner.known) == ["few", "conversations 2"]
    for given in (np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), 7):
        with pytest.raises(
            ValueError, match=r"^[^\n]*expected the path of an image, or in Python a Pillow image[^\n]*$"
        ):
            learner.learn(conversations=[{"image": given, **asked}])
    assert isinstance(before, str)
    with pytest.raises(ValueError, match="learns classes and does not answer in words"):
        Learner.create("tiny()", "probe").ask(None, "Why?")
    for wrong, line in (((None, " "), "the question is ' '"), ((["a.png"], ["a", "b"]), "got 1 for 2 questions"),
                        (("gone.png", "What?"), "gone.png"), ((None, "a", 0), "tokens=0")):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            learner.ask(*wrong)


def test_another_stream_is_measured_without_the_images_that_were_taught(taught: Path, data: Path, perdure: Any) -> None:
    write(data.parent / "other", "red", "Is it red?", lambda name: "yes" if name == "red" else "no", 6)
    path = str(data.parent / "other" / "red.jsonl")
    other = perdure("eval", taught, "--stream", f"conversations(path={path!r})", "--json")
    assert other.code == 0
    assert {"strict", "lenient", "empty", "unparsable"} <= {each["metric"] for each in other.events}
    own = perdure("eval", taught, "--stream", f"conversations(path={str(data / 'colour.jsonl')!r})")
    assert "4 questions are measured; 14 more were taught to this learner and are left out" in own.out
    assert own.out.splitlines()[1].split() == ["task", "strict", "lenient", "empty", "unparsable"]
    wrong = perdure("eval", taught, "--stream", "synthetic()")
    assert "learns conversations, which synthetic() has not" in wrong.err


def test_a_task_that_is_told_is_answered_by_what_it_taught(data: Path, backbone: str, perdure: Any) -> None:
    """An expert a task, of questions that no router could tell apart."""
    learner = Learner.create(backbone, "lora_experts(rank=4)", precision="fp32", device="cpu", epochs=6, lr=2e-2)
    for answer in ("yes", "no"):
        rows = [{"image": str(data / f"red{i}.png"), "question": "Is it?", "answer": answer} for i in range(6)]
        learner.learn(conversations=rows, batch_size=3)
    first, second = learner.known
    picture = data / "red0.png"
    assert [learner.ask(picture, "Is it?", 4, task=name) for name in (first, second)] == ["yes", "no"]
    learner.save("experts")
    assert perdure("ask", "experts", picture, "Is it?", "--task", first, "--tokens", 4).out == "yes\n"
    stream = f"conversations(path={str(data / 'red.jsonl')!r})"
    told = [perdure("eval", "experts", "--stream", stream, "--task", name, "--json") for name in (first, second)]
    assert [each.code for each in told] == [0, 0]
    for call in (("ask", "experts", "Why?"), ("predict", "experts", picture), ("eval", "experts", "--stream", stream)):
        wrong = perdure(*call, "--task", "conversation 1")
        assert wrong.code == 2
        assert "did you mean 'conversations 1'?" in wrong.err or call[0] == "predict"


def test_images_whose_task_is_told_are_answered_within_it(perdure: Any, photos: Any, tmp_path: Path) -> None:
    made = ["--backbone", "tiny()", "--epochs", 1, "--precision", "fp32", "--device", "cpu"]
    for name, method in (("l", "lora(rank=2)"), ("m", "moe_adapters(rank=2)")):
        for folder, classes in (("pets", "cat dog"), ("birds", "emu kea")):
            more = ["--method", method, *made] if folder == "pets" else []
            assert perdure("learn", photos(folder, classes), "--into", name, *more).code == 0
        learner, picture = Learner.load(name), Path("birds/emu/00.png")
        (told,), (free,) = learner.predict([picture], task="pets"), learner.predict([picture])
        assert {label for label, _ in told} == {"cat", "dog"}
        assert {label for label, _ in free} == {"cat", "dog", "emu", "kea"}
        assert sum(share for _, share in told) == pytest.approx(1)
    (labels,) = perdure("predict", "l", picture, "--task", "pets", "--json").events
    assert {label["name"] for label in labels["labels"]} == {"cat", "dog"}
    measured = perdure("eval", "l", "--stream", 'images(path="pets")', "--task", "pets", "--json")
    assert measured.code == 0
    shares = {each["metric"]: each["value"] for each in measured.events}
    assert shares["accuracy"] == shares["accuracy_with_task_id"]
    assert "task_id_accuracy" not in shares
    for call, line in (
        (("predict", "l", picture, "--task", "pet"), "no task 'pet'; did you mean 'pets'?"),
        (("predict", "l", picture, "--task", "pets", "--classes", "a", "b"), "has no effect: 'lora(rank=2)'"),
        (
            ("eval", "l", "--stream", 'images(path="birds")', "--task", "pets"),
            "is none of task 'pets': measure it without",
        ),
        (("eval", "l", "--retain", "synthetic()", "--task", "pets"), "--task has no effect beside --retain"),
    ):
        wrong = perdure(*call)
        assert (wrong.code, line in wrong.err) == (2, True), wrong.err


def test_a_task_is_refused_where_it_would_change_nothing(taught: Path, perdure: Any) -> None:
    wrong = perdure("ask", taught, "Why?", "--task", "colour")
    assert "task='colour' has no effect: \"lora(rank=16" in wrong.err


class Stops(Quiet):
    """A machine that fails in the third step."""

    def step(self, step: int, *_: Any) -> None:
        if step == 3:
            raise OSError("the power is out")


def test_a_stopped_lesson_of_questions_goes_on_as_its_file_was_read(data: Path, perdure: Any, content_of: Any) -> None:
    Path("apart.jsonl").write_text((data / "colour.jsonl").read_text())
    config = RunConfig(
        stream="", backbone="tiny_mllm()", **usual("tiny_mllm()") | {"batch_size": 4, "epochs": 2}, save_every=1
    )
    for folder, progress in (("whole", None), ("x", Stops())):
        reading = {"images": str(data), "score": "contains"}
        with suppress(OSError):
            teach_folder(Path("apart.jsonl"), Path(folder), config, {}, progress, **reading)
    assert not whole(Path("x"))
    said = perdure("learn", "apart.jsonl", "--into", "x", "--images", data)
    assert (said.code, "the scores differ" in said.err) == (2, True)
    assert perdure("resume", "x").code == 0
    assert content_of(Path("x")) == content_of(Path("whole"))


def test_what_is_taught_twice_in_a_row_is_learnt_once(perdure: Any, data: Path, backbone: str) -> None:
    for _ in range(2):
        answer = perdure("learn", data / "few.jsonl", "--into", "x", "--backbone", backbone, "--epochs", 1)
        assert answer.code == 0
        assert len(whole(Path("x"))) == 1
    assert "nothing is learnt twice" in answer.out


@pytest.mark.parametrize("method", ["lora(rank=2, tower='language')", "finetune(tower='language')"])
def test_a_model_whose_output_layer_is_its_embeddings_is_opened_again(
    method: str, data: Path, tiny_mllms: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = f"mllm(path={str(tiny_mllms('qwen2_vl'))!r})"
    options = {"epochs": 2, "lr": 1e-2, "batch_size": 4}
    exact: Any = {"precision": "fp32", "device": "cpu"}
    config = RunConfig(stream="", backbone=backbone, method=method, objective="generate()", **exact)
    into = tmp_path / "my.learner"
    for name in ("colour", "red"):
        teach_folder(data / f"{name}.jsonl", into, config, options if name == "colour" else {})
    learner = Learner.load(into)
    assert learner.backbone.model.lm_head.weight is learner.backbone.model.get_input_embeddings().weight
    asked = [data / "colour0.png"], "Which colour?"
    merged = learner.export(tmp_path / "merged", "merged")
    again = Learner.create(f"mllm(path={str(merged)!r})", "probe", precision="fp32", device="cpu")
    assert again.ask(*asked) == learner.ask(*asked)


def test_scores_of_unlike_scales_have_no_mean_on_the_screen_either(data: Path, perdure: Any) -> None:
    for name, more in (("colour", ()), ("red", ("--score", "cider"))):
        said = perdure("learn", data / f"{name}.jsonl", "--into", "my", *TINY, *FAST[:2], *more)
        assert said.code == 0, said.err
    few = perdure("learn", data / "few.jsonl", "--into", "other", *TINY, "--epochs", 1).out
    assert "learning rate 0.0002, as for language models; --lr gives another" in few
    assert "ask it with: perdure ask other IMAGE" in few  # though nothing of it was measured
    assert "no means over tasks are given: scores of different scales have no mean: exact (to 1), cider" in said.out
    (line,) = [line for line in said.out.splitlines() if line.split()[:2] == ["2", "red"]]
    assert line.split()[3:5] == ["–", "–"]
