"""A learner is taught whenever new pictures arrive: from folders by the command line, from anything in Python."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.api.folders import teach_folder
from perdure.api.learner import Learner
from perdure.core.checkpoint import whole
from perdure.mechanisms import replay
from perdure.mechanisms.replay import ReplayBuffer
from perdure.storage.files import write_sealed
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet
from perdure.training.summary import read_summary
from perdure.types import Task

MADE = ("--backbone", "tiny()", "--precision", "fp32", "--epochs", 2)


def refused(answer: Any) -> str:
    """The one line of a refusal."""
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1
    return str(answer.err)


def classes(folder: str) -> list[str]:
    return [name for task in whole(Path(folder))[-1].tasks[-1:] for name in task.names]


def test_folder_after_folder_is_learnt_and_exported(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog", 4)  # too few to hold some out
    photos("next/train", "emu fox")
    photos("next/test", "emu", 2)
    pocket = ("--method", "inflora(rank=4)", "--epochs", 2, "--precision", "fp32")
    taught = perdure("learn", "first", "--into", "my learner", *pocket)
    assert "no test" in taught.out
    assert taught.out.splitlines()[-1] == "learnt cat, dog; ask it with: perdure predict 'my learner' IMAGE"
    taught = perdure("learn", "next", "--into", "my learner", "--json").events[-1]
    assert (taught["event"], taught["task"]["names"]) == ("learnt", ["emu", "fox"])
    matrix = taught["summary"]["matrix"]
    assert matrix[0] == [None, None]
    assert matrix[1][0] is None
    assert matrix[1][1] is not None
    assert Path("my learner/report.html").is_file()
    seen = perdure("predict", "my learner", "first/cat", "first/dog/00.png", "--json", "--top", 4).events
    assert [Path(s["image"]).name for s in seen] == ["00.png", "01.png", "02.png", "03.png", "00.png"]
    assert {label["name"] for label in seen[0]["labels"]} == {"cat", "dog", "emu", "fox"}
    assert sum(label["score"] for label in seen[0]["labels"]) == pytest.approx(1, abs=1e-5)
    for to in ("merged", "peft"):
        written = perdure("export", "my learner", "--out", f"out/{to}", "--to", to)
        assert (written.code, written.out.splitlines()[0]) == (0, f"written: out/{to}")
        assert "research use only" in written.out
    assert "out/peft" in refused(perdure("export", "my learner", "--out", "out/peft"))


def test_classes_that_are_known_keep_their_place(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("mixed", "dog emu"), photos("known", "cat emu")
    for folder in ("first", "mixed", "known", "first"):
        assert perdure("learn", folder, "--into", "x", *MADE).code == 0
    assert Learner.load("x").known == {"cat": 0, "dog": 1, "emu": 2}
    assert [task.classes for task in whole(Path("x"))[-1].tasks] == [(0, 1), (1, 2), (0, 2), (0, 1)]
    photos("one", "cat")
    assert perdure("learn", "one", "--into", "x").code == 0


def test_names_and_paths_may_hold_anything(perdure: Any, photos: Any) -> None:
    photos("照片 2024", "猫 狗 Üñï", 5)
    Path("照片 2024/猫").rename("照片 2024/大 猫")
    taught = perdure("learn", "照片 2024", "--into", "学习 者", *MADE)
    assert "学习 者" in taught.out
    assert set(Learner.load("学习 者").known) == {"大 猫", "狗", "Üñï"}
    assert "大 猫" in perdure("predict", "学习 者", "照片 2024/狗/00.png").out
    assert "大 猫" in perdure("predict", "学习 者", "照片 2024/狗/00.png", "--json").out


def test_options_without_effect_are_refused(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    assert perdure("learn", "first", "--into", "x", *MADE, "--method", "lora(rank=2)").code == 0
    for flags in (
        ("--method", "inflora"),
        ("--backbone", "pocket()"),
        ("--objective", "zeroshot()"),
        ("--seed", 1),
        ("--precision", "bf16"),
    ):
        name = flags[0][2:]
        said = refused(perdure("learn", "more", "--into", "x", *flags))
        assert f"x was made with {name}=" in said
        assert "would have no effect: leave it out, or teach a new learner" in said
    same = ("--method", "lora( rank = 2 )", "--backbone", "tiny", "--seed", 0)
    assert perdure("learn", "more", "--into", "x", *same, "--epochs", 1, "--lr", "1e-4").code == 0


def test_replay_needs_the_old_pictures(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox"), photos("last", "gnu yak")
    assert perdure("learn", "first", "--into", "x", *MADE, "--method", "lora + replay(size=8)").code == 0
    assert perdure("learn", "more", "--into", "x").code == 0
    matrix = read_summary(Path("x"))["matrix"]
    assert matrix[1][0] is not None
    before = perdure("predict", "x", "more/emu").out
    shutil.move("first", "elsewhere")
    said = refused(perdure("learn", "last", "--into", "x"))
    assert "the memory refers to examples of task 1 (first)" in said
    assert "restore the folder" in said
    assert perdure("predict", "x", "more/emu").out == before
    shutil.move("elsewhere", "first")
    shutil.copy("first/cat/00.png", "first/cat/000.png")  # a memory refers to pictures by their position
    assert "the memory refers to examples of task 1" in refused(perdure("learn", "last", "--into", "x"))
    Path("first/cat/000.png").unlink()
    assert perdure("learn", "last", "--into", "x").code == 0


def test_without_replay_old_pictures_may_go(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    assert perdure("learn", "first", "--into", "x", *MADE).code == 0
    shutil.rmtree("first")
    taught = perdure("learn", "more", "--into", "x")
    assert taught.code == 0
    assert "first is gone or has changed since it was learnt (task 1): it is not evaluated again" in taught.out
    assert read_summary(Path("x"))["matrix"][1][0] is None


def test_a_run_must_be_finished_before_it_learns_more(perdure: Any, small: Any, photos: Any) -> None:
    assert perdure("run", *small, "--out", "x").code == 0
    shutil.rmtree("x/task-001")
    photos("new", "cat dog")
    assert "finish it with 'perdure resume x'" in refused(perdure("learn", "new", "--into", "x"))
    assert perdure("resume", "x").code == 0
    assert perdure("learn", "new", "--into", "x").code == 0
    assert len(read_summary(Path("x"))["matrix"]) == 3


KEPT = ("results.jsonl", "summary.json", "report.html")


@pytest.mark.parametrize("command", [("learn", "february", "--into", "x"), ("resume", "x")])
def test_a_lesson_killed_after_it_was_saved_is_finished_and_not_taught_twice(
    command: tuple[str, ...], perdure: Any, photos: Any
) -> None:
    photos("january", "cat dog"), photos("february", "emu fox")
    assert perdure("learn", "january", "--into", "x", *MADE).code == 0
    before = {name: Path("x", name).read_bytes() for name in KEPT}
    assert perdure("learn", "february", "--into", "x", "--epochs", 3).code == 0
    after = {name: Path("x", name).read_bytes() for name in KEPT}
    for killed in (KEPT, KEPT[1:], KEPT[2:]):  # what was not written yet when the process was killed
        for name in killed:
            Path("x", name).write_bytes(before[name])
        mended = perdure(*command)
        assert mended.code == 0
        assert {name: Path("x", name).read_bytes() for name in KEPT} == after
        assert [task.name for task in whole(Path("x"))[-1].tasks] == ["january", "february"]
        if command[0] == "learn":
            assert "february is what x was taught last, as task 2: nothing is learnt twice" in mended.out


def test_what_was_taught_last_is_known_by_its_images_and_classes(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    for folder in ("first", "more"):
        assert perdure("learn", folder, "--into", "x", *MADE).code == 0
    shutil.move("more", "moved")
    Path("moved/emu/00.png").rename("moved/emu/99.png")
    assert "nothing is learnt twice" in perdure("learn", "moved", "--into", "x").out
    said = refused(perdure("learn", "moved", "--into", "x", "--lr", "1e-4"))
    assert "--lr 0.0001 would have no effect now: remove x/task-001 to teach it anew" in said
    Path("moved/emu/99.png").rename("moved/fox/99.png")
    assert "nothing is learnt twice" not in perdure("learn", "moved", "--into", "x").out
    assert len(whole(Path("x"))) == 3
    shutil.rmtree("x/task-002")
    assert perdure("learn", "first", "--into", "x").code == 0  # taught before, but not last
    assert len(whole(Path("x"))) == 3


def test_resume_goes_on_with_a_lesson_that_was_stopped(perdure: Any, photos: Any, content_of: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    assert perdure("learn", "first", "--into", "whole", *MADE).code == 0
    shutil.copytree("whole", "broken")
    assert perdure("learn", "more", "--into", "whole", "--epochs", 3, "--skip-bad").code == 0
    given = {"epochs": 3}
    with pytest.raises(OSError, match="power"):
        teach_folder(Path("more"), Path("broken"), RunConfig(stream="", **given), given, PowerCut(), skip_bad=True)
    assert perdure("resume", "broken").code == 0
    assert content_of(Path("broken")) == content_of(Path("whole"))
    assert "was taught nothing yet" in refused(perdure("resume", taught_nothing("empty")))


def test_who_asks_a_learner_that_was_killed_in_its_first_lesson_is_told_what_goes_on(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog")
    assert perdure("learn", "first", "--into", "whole", *MADE).code == 0
    answer = perdure("predict", taught_nothing("empty"), "first/cat/00.png")  # the lesson was not written down yet
    assert "go on with 'perdure learn FOLDER --into empty'" in refused(answer)
    Path("empty/task-000").mkdir()
    shutil.copy("whole/task-000/source.json", "empty/task-000")
    assert "go on with 'perdure resume empty'" in refused(perdure("predict", "empty", "first/cat/00.png"))
    assert perdure("resume", "empty").code == 0
    assert perdure("predict", "empty", "first/cat/00.png").code == 0


class PowerCut(Quiet):
    def step(self, step: int, *more: Any) -> None:
        if step == 2:
            raise OSError("the power is out")


def taught_nothing(name: str) -> str:
    Path(name).mkdir()
    write_sealed(Path(name, "run.json"), json.loads(Path("whole/run.json").read_text()))
    return name


def test_a_taught_learner_is_measured_on_a_stream_by_the_names_of_its_classes(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox"), photos("all", "fox emu dog cat")
    for folder in ("first", "more"):
        assert perdure("learn", folder, "--into", "x", *MADE, "--method", "ncm").code == 0
    rows = perdure("eval", "x", "--stream", "images(path='all', tasks=2, order='natural')", "--json").events
    # nearest class means tell colours apart, whatever the order of the classes
    assert {row["value"] for row in rows if row["metric"] == "accuracy_with_task_id"} == {1.0}
    photos("all", "dogs gnuu")
    answer = perdure("eval", "x", "--stream", "images(path='all', tasks=3, order='natural')", "--json")
    assert "16 images of 2 classes that were never learnt are left out: dogs; did you mean 'dog'?, gnuu" in answer.err
    assert {row["value"] for row in answer.events if row["metric"] == "accuracy_with_task_id"} == {1.0}
    photos("strange", "gnuu yak")
    assert "no class is among what x has learnt, but gnuu, yak" in refused(
        perdure("eval", "x", "--stream", "images(path='strange', tasks=1)")
    )


def test_eval_of_a_taught_learner_measures_the_test_images_of_all_its_folders(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog", 8), photos("more", "emu fox", 8)
    for folder in ("first", "more"):
        assert perdure("learn", folder, "--into", "x", *MADE, "--method", "ncm").code == 0
    score = [row for row in perdure("eval", "x", "--json").events if row["metric"] == "accuracy"]
    assert [row["value"] for row in score] == json.loads(Path("x/summary.json").read_text())["matrix"][-1]
    shutil.rmtree("first")
    answer = perdure("eval", "x", "--json")
    assert "first is gone" in answer.err
    assert "without test images, and not measured: first" in answer.err
    assert [row["on"] for row in answer.events if row["metric"] == "accuracy"] == [1]
    assert "task 'first' has no test images at hand: measure it on others" in refused(
        perdure("eval", "x", "--task", "first")
    )
    shutil.rmtree("more")
    assert "say what to measure on with --stream" in refused(perdure("eval", "x"))


def colours(names: str, count: int = 6) -> tuple[list[np.ndarray[Any, Any]], list[str]]:
    labels = [name for name in names.split() for _ in range(count)]
    draw = np.random.default_rng(0)
    shades = {name: draw.integers(40, 215, 3) for name in labels}
    return [np.clip(shades[n] + draw.normal(0, 9, (20, 20, 3)), 0, 255).astype(np.uint8) for n in labels], labels


def test_python_learner_takes_images_of_every_kind(tmp_path: Path) -> None:
    arrays, labels = colours("cat dog")
    pictures = [Image.fromarray(array) for array in arrays]
    paths = [tmp_path / f"{i}.png" for i in range(len(arrays))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    tensor = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    answers = []
    for images, names in (
        (arrays, labels),
        (pictures, labels),
        (paths, tuple(labels)),
        ([str(path) for path in paths], labels),
        (tensor, labels),
        (np.stack(arrays), np.array(labels)),
    ):
        learner = Learner.create("tiny()", "ncm", precision="fp32", attention="sdpa")
        learner.learn(images, names)
        answers.append(learner.predict(images))
        assert [best[0][0] for best in answers[-1]] == labels
    assert all(answer == answers[0] for answer in answers)
    alone = [learner.predict(one)[0] for one in (arrays[0], paths[0], pictures[0], str(paths[0]))]
    assert all(answer == alone[0] for answer in alone)
    assert [name for name, _ in alone[0]] == [name for name, _ in answers[0][0]]
    # close, not equal: matrix products round by the number of rows
    assert [score for _, score in alone[0]] == pytest.approx([score for _, score in answers[0][0]], rel=1e-5)
    assert learner.predict(str(paths[0]), top=1) == [alone[0][:1]]
    assert learner.predict([]) == []
    numbers = Learner.create("tiny()", "ncm", precision="fp32", attention="sdpa")
    numbers.learn(arrays, torch.tensor([0] * 6 + [1] * 6))
    assert [best[0][0] for best in numbers.predict(arrays)] == ["0"] * 6 + ["1"] * 6


def test_saved_twice_loaded_and_taught_on(tmp_path: Path, perdure: Any, photos: Any) -> None:
    arrays, labels = colours("cat dog")
    more, names = colours("emu fox")
    learner = Learner.create("tiny()", "lora(rank=2)", epochs=2, precision="fp32", attention="sdpa")
    with pytest.raises(ValueError, match="learnt nothing yet"):
        learner.save(tmp_path / "x")
    with pytest.raises(ValueError, match="learnt nothing yet"):
        learner.predict(arrays)
    learner.learn(arrays, labels).save(tmp_path / "x")
    once = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*.*")}
    learner.save(tmp_path / "x")
    assert {p: p.read_bytes() for p in (tmp_path / "x").rglob("*.*")} == once

    loaded = Learner.load(tmp_path / "x")
    assert loaded.predict(arrays) == learner.predict(arrays)
    assert loaded.learn(more, names).predict(more) == learner.learn(more, names).predict(more)
    loaded.save(tmp_path / "x")
    learner.save(tmp_path / "x")
    assert Learner.load(tmp_path / "x").predict(more) == learner.predict(more)
    assert "cat" in perdure("predict", "x", photos("new", "cat"), "--top", 4).out

    # saved for the first time after its second task
    learner.save(tmp_path / "y")
    assert Learner.load(tmp_path / "y").predict(more) == learner.predict(more)
    photos("late", "gnu yak")
    for folder in ("x", "y"):
        assert perdure("learn", "late", "--into", folder).code == 0
        assert perdure("predict", folder, "late/gnu", "--top", 9).out.count("cat") == 8
        assert perdure("report", folder).code == 0
    assert "saved" not in json.loads(Path("y/run.json").read_text())
    learner.learn(arrays, labels)
    with pytest.raises(ValueError, match="learnt something else since; save to a new folder"):
        learner.save(tmp_path / "x")
    with pytest.raises(ValueError, match="holds another learner"):
        Learner.create("tiny()", "ncm", precision="fp32").learn(arrays, labels).save(tmp_path / "x")


def test_creating_with_an_unknown_option_names_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"^Learner\.create has no option 'epoch'; did you mean 'epochs'\?"):
        Learner.create("tiny()", epoch=3)
    with pytest.raises(ValueError, match=r"^Learner\.learn has no option 'epoch'; did you mean 'epochs'\?"):
        Learner.create("tiny()").learn(*colours("cat dog"), epoch=3)
    with pytest.raises(ValueError, match=r"^Learner\.create\(evaluate='last'\) has no effect: leave it out$"):
        Learner.create("tiny()", evaluate="last")
    with pytest.raises(
        ValueError, match="precision='fp61': expected 'auto', 'fp32', 'bf16' or 'fp16'; did you mean 'fp16'"
    ):
        Learner.create("tiny()", precision="fp61")


def test_folders_of_one_name_are_tasks_of_two(perdure: Any, photos: Any) -> None:
    for year, classes in (("2024", "cat dog"), ("2025", "emu fox")):
        photos(f"{year}/january", classes)
        assert perdure("learn", f"{year}/january", "--into", "x", *MADE, "--method", "ncm").code == 0
    learner = Learner.load("x")
    assert [task.name for task in learner.tasks] == ["january", "january (2)"]
    assert {name for name, _ in learner.predict(["2025/january/emu/00.png"], task="january (2)")[0]} == {
        "emu",
        "fox",
    }
    learner.learn("2024/january", epochs=1)
    assert learner.tasks[-1].name == "january (3)"


def test_a_name_that_tasks_of_older_learners_share_is_refused(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    for folder in ("first", "more"):
        assert perdure("learn", folder, "--into", "x", *MADE, "--method", "ncm").code == 0
    learner = Learner.load("x")
    learner.tasks[1] = replace(learner.tasks[1], name="first")
    with pytest.raises(ValueError, match="tasks 1 and 2 of this learner are both called 'first'"):
        learner.predict(["first/cat/00.png"], task="first")


def test_a_stopped_lesson_goes_on_where_its_data_was_moved_to(perdure: Any, photos: Any, content_of: Any) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")
    assert perdure("learn", "first", "--into", "whole", *MADE).code == 0
    shutil.copytree("whole", "resumed")
    shutil.copytree("whole", "taught")
    given = {"epochs": 3}
    for stopped in ("resumed", "taught"):
        with pytest.raises(OSError, match="power"):
            teach_folder(Path("more"), Path(stopped), RunConfig(stream="", **given), given, PowerCut())
    shutil.move("more", "moved")
    assert perdure("learn", "moved", "--into", "whole", "--epochs", 3).code == 0
    for stopped, words in (("resumed", ("resume", "resumed")), ("taught", ("learn", "moved", "--into", "taught"))):
        assert perdure("move", stopped, "more=moved").code == 0
        assert perdure(*words, *(["--epochs", 3] if words[0] == "learn" else [])).code == 0
        assert content_of(Path(stopped)) == content_of(Path("whole"))


def test_an_empty_word_is_no_folder_and_what_is_refused_makes_none(perdure: Any, photos: Any) -> None:
    photos("first", "cat dog")
    for words in (("learn", "", "--into", "x"), ("predict", ""), ("learn", "first", "", "--into", "x")):
        assert "an empty word, number " in refused(perdure(*words))
    Path("empty").mkdir()
    refused(perdure("learn", "empty", "--into", "x", *MADE))
    assert not Path("x").exists()


def test_a_lesson_begun_and_given_up_is_told(perdure: Any, photos: Any) -> None:
    class AtOnce(Quiet):
        def task(self, *_: Any) -> None:
            raise OSError("the power is out")

    photos("first", "cat dog"), photos("more", "emu fox")
    with pytest.raises(OSError, match="power"):
        teach_folder(Path("first"), Path("x"), RunConfig(stream="", backbone="tiny()"), {}, AtOnce())
    said = perdure("learn", "more", "--into", "x")
    assert "first, begun before, is given up: nothing was learnt of it yet" in said.out + said.err


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"early_stop": 1}), ({"early_stop": 1}, {}), ({"early_stop": 1}, {"early_stop": 2, "early_stop_share": 0.5})],
)
def test_a_memory_reads_what_it_remembered_whatever_a_later_lesson_holds_out(
    first: dict[str, Any], second: dict[str, Any], perdure: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos("first", "cat dog"), photos("more", "emu fox")

    def shown(tasks: Sequence[Task], references: Any) -> list[str]:
        data = [(tasks[index].train, position) for index, position in references[:, :2].tolist()]
        return [each.source.key(int(each.rows[position])) for each, position in data]  # type: ignore[attr-defined]

    def remembered(buffer: ReplayBuffer, task: Task, *more: Any) -> None:
        add(buffer, task, *more)
        own = buffer.refs[buffer.refs[:, 0] == task.index]
        kept.update(zip(map(tuple, own.tolist()), shown([task] * 2, own), strict=True))

    def read(tasks: Sequence[Task], references: Any) -> Any:
        seen.update(zip(map(tuple, references.tolist()), shown(tasks, references), strict=True))
        return reading(tasks, references)

    kept: dict[Any, str] = {}
    seen: dict[Any, str] = {}
    add, reading = ReplayBuffer.add, replay.read_references
    monkeypatch.setattr(ReplayBuffer, "add", remembered)
    monkeypatch.setattr(replay, "read_references", read)
    for folder, options in (("first", first), ("more", second)):
        given = {"backbone": "tiny()", "method": "lora(rank=2) + replay(size=6)", "precision": "fp32", "epochs": 4}
        given |= options
        teach_folder(Path(folder), Path("x"), RunConfig(stream="", **given), given)
    assert seen
    assert seen.items() <= kept.items()


def test_a_lesson_that_a_version_without_numbers_has_begun_goes_on(
    perdure: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for year, classes in (("2024", "cat dog"), ("2025", "emu fox")):
        photos(f"{year}/january", classes)
    made = {"backbone": "tiny()", "precision": "fp32", "method": "lora(rank=2)", "save_every": 1, "epochs": 3}
    config = RunConfig(stream="", **made)
    teach_folder(Path("2024/january"), Path("x"), config, {"epochs": 3})
    with monkeypatch.context() as former:
        former.setattr("perdure.api.folders.free_name", lambda name, _: name)
        with pytest.raises(OSError, match="power"):
            teach_folder(Path("2025/january"), Path("x"), config, {"epochs": 3}, PowerCut())
    assert len([*Path("x/task-001").glob("step-*")])
    assert perdure("resume", "x").code == 0
    assert [task.name for task in whole(Path("x"))[-1].tasks] == ["january", "january"]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("a cat", r"^classes='a cat': expected a list of names"),
        (["a cat", 3], r"^classes=\['a cat', 3\]: expected a list of names"),
        (["a cat", " "], "a name is empty; leave it out"),
        (["a cat", "a dog", "a cat"], "^classes: 'a cat' stands there 2 times: keep one"),
        ([], "classes is empty"),
    ],
)
def test_words_to_choose_among_are_different_names(classes: Any, said: str) -> None:
    learner = Learner.create("tiny(text=True)", "probe", precision="fp32")
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        learner.predict(images, classes=classes)
    assert len(learner.predict(images, classes=("a cat", "a dog"))[0]) == 2


def test_names_that_the_text_encoder_cannot_read_are_told_wherever_it_reads_them(perdure: Any, photos: Any) -> None:
    photos("jan", "红 蓝", 2)
    photos("feb", "绿 黄", 2)
    said = "the text encoder cannot read Chinese script"
    made = ("--backbone", "pocket()", "--method", "probe", "--epochs", 1, "--precision", "fp32")
    taught = perdure("learn", "jan", "--into", "words", *made, "--objective", "zeroshot", "--method", "lora(rank=1)")
    assert said in taught.out
    assert said not in perdure("learn", "jan", "--into", "one", *made).out  # a head needs no words
    assert perdure("learn", "feb", "--into", "two", *made).code == 0
    assert perdure("combine", "one", "two", "--into", "team").code == 0
    for asked in (("predict", "team", "jan/红/00.png", "--classes", "红", "蓝"), ("search", "team", "jan", "红")):
        answer = perdure(*asked)
        assert answer.code == 0
        assert f"one: {said}" in answer.err
