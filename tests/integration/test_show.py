"""What a folder says of itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from perdure.api.learner import Learner

TINY = ("--backbone", "tiny()", "--epochs", 1)


def test_a_taught_learner_says_what_was_taught_from_where_and_how_well(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 6), photos("february", "cow", 6)
    perdure("learn", "january", "--into", "mine", *TINY, "--method", "ncm")
    perdure("learn", "february", "--into", "mine")
    summary = json.loads(Path("mine/summary.json").read_text())
    (found,) = perdure("show", "mine", "--json").events
    assert [(t["number"], t["name"], t["classes"], Path(t["folder"]).name) for t in found["tasks"]] == [
        (1, "january", ["cat", "dog"], "january"),
        (2, "february", ["cow"], "february"),
    ]
    assert [t["now"] for t in found["tasks"]] == summary["matrix"][-1]
    assert [t["when_learnt"] for t in found["tasks"]] == [summary["matrix"][i][i] for i in range(2)]
    assert all(t["train"] and t["finished"] for t in found["tasks"])
    said = perdure("show", "mine").out
    assert all(words in said for words in ("2 tasks learnt", "cat, dog", "january")), said


def test_tasks_that_were_saved_together_or_merged_are_all_told(perdure: Any, photos: Any) -> None:
    photos("pets", "cat dog", 4), photos("birds", "emu kea", 4), photos("cars", "van bus", 4)
    learner = Learner.create("tiny()", "lora(rank=2)", epochs=1, precision="fp32")
    learner.learn("pets"), learner.learn("birds")
    learner.save("saved")
    assert (
        perdure("learn", "cars", "--into", "more", *TINY, "--method", "lora(rank=2)", "--precision", "fp32").code == 0
    )
    assert perdure("combine", "saved", "more", "--into", "merged", "--merge", "average()").code == 0
    for folder, count in (("saved", 2), ("merged", 3)):
        (found,) = perdure("show", folder, "--json").events
        tasks = [("pets", ["cat", "dog"]), ("birds", ["emu", "kea"]), ("cars", ["bus", "van"])][:count]
        assert [(t["number"], t["name"], t["classes"]) for t in found["tasks"]] == [
            (i + 1, *task) for i, task in enumerate(tasks)
        ]
        assert f"{count} tasks learnt" in perdure("show", folder).out
        assert perdure("report", folder, "--out", f"{folder}.html").code == 0
        assert all(name in Path(f"{folder}.html").read_text() for name, _ in tasks)


def test_what_the_folder_holds_of_the_data_is_told_by_kind(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 6)
    held = {}
    for method in ("lora(rank=2)", "lora(rank=2) + replay(size=4)", "ncm", "moe_adapters(experts=2)", "head_gates"):
        perdure("learn", "january", "--into", method, *TINY, "--method", method)
        held[method] = " ".join(perdure("show", method, "--json").events[0]["holds"])
    assert "may be replayed" not in held["lora(rank=2)"]
    assert "statistics" not in held["lora(rank=2)"]
    assert "positions of 4 examples that may be replayed" in held["lora(rank=2) + replay(size=4)"]
    for method in ("ncm", "moe_adapters(experts=2)", "head_gates"):  # of the latter two a router keeps them
        assert "statistics of features" in held[method]


def test_what_a_killed_lesson_has_left_is_told_too(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 4), photos("february", "cow", 4)
    perdure("learn", "january", "--into", "mine", *TINY, "--method", "ncm")
    perdure("learn", "february", "--into", "mine")
    paths = perdure("show", "mine", "--json").events[0]["holds"][0]
    for name in ("summary.json", "results.jsonl"):
        Path("mine", name).unlink()
    Path("mine/examples.json").write_text('{"queries": [], "searched": [], "pictures": {}}')  # noted before a task
    for task in ("task-001", "task-000"):  # killed before the second was whole, and before the first was
        Path("mine", task, "manifest.json").unlink()
        held = perdure("show", "mine", "--json").events[0]["holds"]
        assert held[:2] == [paths, f"what was saved so far of a task that is not finished ({task})"]
        assert "small pictures of test images" in held[-1]
        assert json.loads(Path("mine", task, "source.json").read_text())["folder"]


def test_weights_that_allow_research_only_say_so(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 4)
    perdure("learn", "january", "--into", "mine", "--method", "ncm")
    assert "research use only" in perdure("show", "mine").out


def test_a_damaged_or_foreign_folder_is_one_line(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 4)
    perdure("learn", "january", "--into", "mine", *TINY, "--method", "ncm")
    assert "not a run's or a learner's folder" in perdure("show", "january").err
    path = Path("mine/task-000/learner.safetensors")
    whole = path.read_bytes()
    for left in (b"\0" * 12, b"", b"\xff" * 8, whole[:3], whole[:-1], whole + b"0"):
        path.write_bytes(left)
        answer = perdure("show", "mine")
        assert (answer.code, answer.err.count("\n")) == (2, 1), answer
        assert answer.err.startswith(f"perdure: {path} is damaged: ")
        assert "; restore it, or remove " in answer.err


def test_show_waits_for_no_torch(perdure: Any, photos: Any) -> None:
    photos("january", "cat dog", 4)
    perdure("learn", "january", "--into", "mine", *TINY, "--method", "ncm")
    code = "import sys; from perdure.cli.main import main; main(['show', 'mine']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cat, dog" in said
    assert said.splitlines()[-1] == "False"
