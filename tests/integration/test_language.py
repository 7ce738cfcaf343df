"""A language model learns files of questions one after another: a whole run."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.api.folders import teach_folder
from perdure.api.measuring import evaluate
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet
from perdure.training.record import as_recorded, check_unchanged
from perdure.training.run import resume, run
from perdure.types import Stream, Task

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
METHOD = "lora(rank=4, tower='language', at='qkvo,mlp')"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tasks of 24 questions each: names of colours, and whether something is red."""
    folder, random = tmp_path_factory.mktemp("questions"), np.random.default_rng(0)
    asked: dict[str, tuple[str, Callable[[str], str]]] = {
        "colour": ("Which colour?", lambda name: name),
        "red": ("Is it red?", lambda name: "yes" if name == "red" else "no"),
    }
    for task, (question, answer) in asked.items():
        rows = []
        for i in range(24):
            name = list(COLOURS)[i % 3]
            picture = np.clip(np.array(COLOURS[name]) + random.integers(-20, 20, (28, 28, 3)), 0, 255)
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{task}{i}.png")
            rows.append({"image": f"{task}{i}.png", "question": question, "answer": answer(name)})
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / f"{task}.jsonl") for task in asked]


def config_of(files: list[str], backbone: str = "tiny_mllm()", **more: Any) -> RunConfig:
    settings = {"epochs": 8, "batch_size": 4, "lr": 2e-2, "precision": "fp32", "attention": "sdpa", "device": "cpu"}
    stream = f"conversations(path={files!r})"
    named: dict[str, Any] = {"method": METHOD, "stream": stream, "backbone": backbone, "objective": "generate"}
    return RunConfig(**named | settings | more)


class Noted(Quiet):
    """Remembers what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_learns_what_is_asked_about_pictures(files: list[str], tmp_path: Path) -> None:
    summary = run(config_of(files), str(tmp_path))
    assert resume(str(tmp_path)) == summary
    assert summary["score"] == "strict"
    assert summary["matrix"][0][0] > 0.5
    assert summary["matrix"][1][1] > 0.5
    measured = {json.loads(line)["metric"] for line in (tmp_path / "results.jsonl").read_text().splitlines()}
    assert {"strict", "lenient", "empty", "unparsable"} <= measured


@pytest.mark.parametrize("more", [{"augment": "flip"}, {"method": f"{METHOD} + replay(size=4, augment='crop')"}])
def test_views_of_images_are_refused_where_questions_are_asked_about_them(
    more: dict[str, str], files: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^augment='(flip|crop)' has no effect on conversations.*: leave it out$"):
        run(config_of(files, **more), tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_questions_with_options_are_multiple_choice_in_runs_and_lessons(files: list[str], tmp_path: Path) -> None:
    rows = [json.loads(line) | {"options": [*COLOURS]} for line in Path(files[0]).read_text().splitlines()]
    file = Path(files[0]).with_name("offered.json")
    file.write_text(json.dumps(rows))
    stream = f"conversations(path={str(file)!r})"
    out, quick = tmp_path / "run", {"epochs": 1, "stream": stream}
    assert run(config_of(files, **quick), out)["scores"] == ["choice"]
    written = json.loads((out / "run.json").read_text())["stream"]
    assert [task["score"] for task in written["tasks"]] == ["choice"]
    # a run that began when there was no such rule goes on as it began
    older = written | {"tasks": [{k: v for k, v in task.items() if k != "score"} for task in written["tasks"]]}
    settled = Stream("offered", "class", (Task(0, "offered", (0,), ("offered",), 1, score="choice"),))
    assert [as_recorded(settled, facts).tasks[0].score for facts in (written, older)] == ["choice", ""]
    told = {"a": {"remarks": ["no images"], "tasks": 1}}
    check_unchanged(out, "held-out data", {"a": {"tasks": 1}}, told)
    with pytest.raises(ValueError, match=r"held-out data of .* has changed since the run began \(a\)"):
        check_unchanged(out, "held-out data", {"a": {"tasks": 2}}, told)
    # what was measured by choice still is when more is taught
    assert teach_folder(Path(files[1]), out, config_of(files, stream=""), {"epochs": 1})[1]["scores"] == [
        "choice",
        "exact",
    ]
    tasks, _, _ = evaluate(out, None)
    assert [task.score for task in tasks] == ["choice", "exact"]
    with pytest.raises(ValueError, match=r"colour\.jsonl, line \d+: score 'vqa' needs the answers"):
        run(config_of(files, objective="generate(score='vqa')"), tmp_path / "vqa")
    with pytest.raises(ValueError, match="likelihood=True\\) has no effect"):
        run(config_of(files, objective="generate(likelihood=True)"), tmp_path / "likelihood")
    assert not (tmp_path / "likelihood" / "run.json").exists()


def test_a_run_tells_before_it_learns_that_its_files_show_no_images(files: list[str], tmp_path: Path) -> None:
    file, told = tmp_path / "img.json", Noted()
    file.write_text(json.dumps([{"img": "0.png", "question": f"Which {i}?", "answer": "dot"} for i in range(6)]))
    run(config_of([str(file)], epochs=1), tmp_path / "run", told)
    at = [
        i for i, note in enumerate(told.notes) if note.endswith("only texts are read; columns that are not read: img")
    ]
    assert len(at) == 1
    assert at[0] < next(i for i, note in enumerate(told.notes) if "measuring the pre-trained model" in note)


def test_answers_that_are_cut_are_counted_and_a_question_that_is_too_long_is_refused_with_its_line(
    files: list[str], tmp_path: Path
) -> None:
    asked = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]}
    prompt = tiny_mllm().dialogue(asked | {"images": [f"{Path(files[0]).parent}/colour0.png"]}).prompt
    told = Noted()
    run(config_of(files[:1], f"tiny_mllm(length={prompt + 5})", epochs=1), tmp_path / "cut", told)
    (note,) = [each for each in told.notes if "were cut" in each]
    assert re.search(
        rf"^\d+ answers were cut, to fit into {prompt + 5} tokens .*, the first of .*colour\.jsonl, line", note
    )
    with pytest.raises(ValueError, match=r"colour\.jsonl, line \d+: a conversation takes \d+ tokens"):
        run(config_of(files[:1], f"tiny_mllm(length={prompt})", epochs=1), tmp_path / "long")


def test_a_question_to_learn_that_is_too_long_is_refused_before_the_tasks_in_front_of_it(
    files: list[str], tmp_path: Path
) -> None:
    folder = Path(files[0]).parent
    rows = [{"image": f"red{i}.png", "question": "Why?", "answer": "so"} for i in range(8)]
    rows[5]["question"] = "Why " * 100
    for part, some in (("train", rows[:6]), ("test", rows[6:])):
        (tmp_path / f"why.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    stream = f"in_turn(conversations(path={files[0]!r}), conversations(path={str(tmp_path)!r}, images={str(folder)!r}))"
    wrong = replace(config_of(files, "tiny_mllm(length=120)", epochs=1), stream=stream)
    told = Noted()
    with pytest.raises(ValueError, match=r"why\.train\.jsonl, line 6: a conversation takes \d+ tokens"):
        run(wrong, tmp_path / "out", told)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("task-*")), "nothing was learnt"


def test_a_task_in_which_nothing_is_trained_is_told(files: list[str], tmp_path: Path) -> None:
    said: dict[str, list[str]] = {}
    for method in ("lora(rank=2, tower='language', tasks=1)", "lora(rank=2, tower='language')", "probe"):
        noted = Noted()
        run(config_of(files, method=method, epochs=1), tmp_path / str(len(said)), noted)
        said[method] = [note for note in noted.notes if "trains nothing in it" in note]
    once, always, never = said.values()
    assert once == [f"task 2, red: {next(iter(said))} trains nothing in it, so answers stay as they were"]
    assert always == never == []
