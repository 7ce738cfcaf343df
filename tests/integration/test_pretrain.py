"""`perdure pretrain`: images without labels teach a learner before its first lesson and between two."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.folders import go_on, teach_folder
from perdure.api.learner import Learner
from perdure.core.checkpoint import read_record, whole
from perdure.reporting.runs import RunResults
from perdure.training.config import RunConfig, TrainConfig
from perdure.training.loop import Quiet
from perdure.training.summary import read_summary

MADE = ("--backbone", "tiny(text=True)", "--precision", "fp32", "--epochs", 2)


class Crash(Exception):
    """A power cut."""


class Breaks(Quiet):
    """Crashes at the fourth step."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if step == 4:
            raise Crash


def refused(answer: Any) -> str:
    """The one line of a refusal."""
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1
    return str(answer.err)


def test_before_a_lesson_and_between_two(perdure: Any, photos: Any) -> None:
    photos("new", "x y z", 5), photos("first", "cat dog"), photos("next", "emu fox")
    answer = perdure("pretrain", "new", "--into", "my learner", *MADE, "--method", "lora(rank=2) + replay(size=6)")
    assert "new: names of folders are no labels here, and are ignored" in answer.out
    said = answer.out.splitlines()[-1]
    assert said == "pre-trained on 15 images, masked(); teach it with: perdure learn FOLDER --into 'my learner'"
    assert "was only pre-trained, without labels" in refused(perdure("predict", "my learner", "new"))
    for words in (("export", "my learner", "--out", "x"), ("push", "my learner", "./x")):
        assert "was only pre-trained, without labels: teach it first" in refused(perdure(*words))
    first = perdure("learn", "first", "--into", "my learner", "--lr", "1e-2")
    score = read_summary(Path("my learner"))["acc"]
    assert re.search(rf"first +{score:.1%} +{score:.1%} ", first.out), "pre-training is no old task to be measured"
    before = dict(Learner.load("my learner").objective.state_dict())
    answer = perdure("pretrain", "new", "--into", "my learner", "--pretext", "distill()", "--replay", "first")
    assert "3 images of" in answer.out
    summary = read_summary(Path("my learner"))
    then, now = summary["matrix"][1][1], summary["matrix"][2][1]
    assert f"first: {then:.1%} before, {now:.1%} now" in answer.out
    assert summary["acc"] == now
    after = Learner.load("my learner").objective.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    taught = perdure("learn", "next", "--into", "my learner", "--json").events[-1]
    assert [row is None for row in taught["summary"]["matrix"][3]] == [True, False, True, False]
    assert taught["summary"]["forgetting"] is not None
    matrix = taught["summary"]["matrix"]
    new = RunResults.read(Path("my learner")).numbers()["new_task_acc"]
    assert new == pytest.approx((matrix[1][1] + matrix[3][3]) / 2)  # of lessons, each right after it
    assert [task.pretext for task in whole(Path("my learner"))[-1].tasks] == ["masked()", "", "distill()", ""]
    assert sorted(Learner.load("my learner").known) == ["cat", "dog", "emu", "fox"]
    shown = perdure("show", "my learner")
    assert "pre-training 3: new" in shown.out
    assert perdure("eval", "my learner").code == 0
    assert perdure("report", "my learner").code == 0
    shutil.rmtree("new")  # nothing is replayed from there
    assert perdure("learn", "first", "--into", "my learner").code == 0


def test_the_learning_rate_is_warmed_up_again_in_each_step_and_in_no_lesson(
    perdure: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, rate = [], TrainConfig.rate

    def noted(train: TrainConfig, step: int, steps: int) -> float:
        used.append(rate(train, step, steps) / train.peak)
        return used[-1]

    monkeypatch.setattr(TrainConfig, "rate", noted)
    photos("new", "x y", 15), photos("first", "cat dog", 15)
    learner = Learner.create("tiny()", "lora(rank=2)", epochs=20, batch_size=16, precision="fp32")
    more = ("--epochs", 20, "--batch-size", 16)
    for teach, warm in (
        (lambda: perdure("pretrain", "new", "--into", "my", *MADE[:4], "--method", "lora(rank=2)", *more), True),
        (lambda: perdure("learn", "first", "--into", "my", *more), False),
        (lambda: perdure("pretrain", "new", "--into", "my", *more), True),
        (lambda: learner.pretrain("new"), True),
        (lambda: learner.learn("first"), False),
    ):
        used.clear()
        teach()
        assert len(used) > 20
        top = used.index(max(used))
        assert (top > 0) == warm
        assert used[:top] == sorted(used[:top])
        assert used[top:] == sorted(used[top:], reverse=True)
        assert used[-1] < 0.1


def test_python_mixes_old_images_in_as_the_command_does(perdure: Any, photos: Any) -> None:
    photos("new", "x y z", 5), photos("old", "cat dog", 9)
    assert perdure("pretrain", "new", "--into", "by command", *MADE, "--replay", "old").code == 0
    made = read_record(Path("by command"))["config"]
    given = {name: made[name] for name in ("epochs", "lr", "batch_size", "seed", "precision", "device")}
    learner = Learner.create(made["backbone"], made["method"], made["objective"], **given)
    learner.pretrain("new", replay="old").save("by python")
    found = [whole(Path(folder))[-1].manifest["source"] for folder in ("by command", "by python")]
    assert found[0]["replay"] == found[1]["replay"] == str(Path("old").resolve())
    assert found[0]["train_sha256"] == found[1]["train_sha256"]
    assert len(learner.tasks[0].train) == 15 + 3
    with pytest.raises(ValueError, match="replay='old' has no effect with images that are given themselves"):
        learner.pretrain([*Path("new").rglob("*.png")], replay="old")
    with pytest.raises(ValueError, match="replay=3: expected str"):
        learner.pretrain("new", replay=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replay='old' has no effect with contrast"):
        learner.pretrain("new", "contrast()", replay=Path("old"))


def test_the_same_command_again_is_no_second_step_but_another_objective_is(perdure: Any, photos: Any) -> None:
    photos("new", "x", 6)
    for _ in range(2):
        answer = perdure("pretrain", "new", "--into", "x", *MADE)
    assert "nothing is learnt twice" in answer.out
    assert len(whole(Path("x"))) == 1
    assert perdure("pretrain", "new", "--into", "x", "--pretext", "masked(ratio=0.5)").code == 0
    assert len(whole(Path("x"))) == 2


def test_test_images_are_not_looked_at(perdure: Any, photos: Any) -> None:
    photos("set/train", "cat dog", 3), photos("set/test", "cat dog", 9)
    assert "pre-trained on 6 images" in perdure("pretrain", "set", "--into", "x", *MADE).out


def test_captions_teach_a_learner_of_classes(perdure: Any, photos: Any) -> None:
    photos("album", "cat dog")
    rows = [{"image": f"album/{k}/{i:02}.png", "words": f"a {k} {i}"} for k in ("cat", "dog") for i in range(8)]
    Path("album.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    how = ("--pretext", "contrast()", "--captions", "words")
    assert "pre-trained on 16 images" in perdure("pretrain", "album.jsonl", "--into", "x", *how, *MADE).out
    assert perdure("learn", "album", "--into", "x").code == 0
    assert Learner.load("x").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gone --into x", "does not exist"),
        ("new --into x --method ncm", "trains nothing that makes features"),
        ("new --into x --method ewc+lora", "ewc takes no part in a step without labels"),
        ("new --into x --captions words", "--captions words has no effect with masked()"),
        ("new --into x --pretext contrast() --replay new", "new has no effect with contrast(): leave it out\n"),
        ("new --into x --pretext contrast() --replay new --method lora", ": leave it out, or add feature_distill to"),
        ("new --into x --pretext mask()", "mask"),
        ("new --into taught", "ncm keeps statistics of the features of classes that were taught"),
        ("new --into taught --method lora", "taught was made with method="),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, message: str, perdure: Any, photos: Any) -> None:
    photos("new", "x y", 3)
    if "taught" in words:
        assert perdure("learn", "new", "--into", "taught", *MADE, "--method", "lora + ncm").code == 0
    made = () if "taught" in words else ("--backbone", "tiny()")
    assert message in refused(perdure("pretrain", *words.split(), *made))
    assert not Path("x/run.json").exists()


def test_a_refused_step_leaves_the_learner_as_it_was(perdure: Any, photos: Any, content_of: Any) -> None:
    photos("new", "x y", 3)
    assert perdure("learn", "new", "--into", "taught", *MADE, "--method", "probe + align").code == 0
    before = content_of(Path("taught"))
    assert "probe takes no part" in refused(perdure("pretrain", "new", "--into", "taught"))
    assert content_of(Path("taught")) == before
    assert not Path("taught/task-001").exists()
    assert perdure("forget", "taught", "x").code == 0


def test_a_task_that_is_saved_stays_whatever_is_refused_after_it(
    perdure: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos("new", "x y", 3), photos("first", "cat dog", 3)
    assert perdure("learn", "first", "--into", "taught", *MADE, "--method", "ncm").code == 0

    def full(*_: Any) -> None:
        raise ValueError("no room for the summary")

    with monkeypatch.context() as patched:
        patched.setattr("perdure.training.tasks.write_summary", full)
        assert "no room" in refused(perdure("learn", "new", "--into", "taught"))
    assert len(whole(Path("taught"))) == 2
    assert Learner.load("taught").class_names == ("cat", "dog", "x", "y")


@pytest.mark.parametrize("pretext", ["masked()", "distill()", "distill(teacher='tiny(seed=3)')"])
def test_a_killed_step_goes_on_bit_for_bit(pretext: str, perdure: Any, photos: Any) -> None:
    photos("new", "x", 8), photos("first", "cat dog")
    method = "lora(rank=2) + feature_distill"
    config = RunConfig(stream="", backbone="tiny()", method=method, precision="fp32", batch_size=4, save_every=1)
    options = {"epochs": 3, "batch_size": 4}

    def learn(into: str, progress: Quiet | None = None) -> None:
        teach_folder(Path("new"), Path(into), config, options, progress, pretext=pretext, replay="first")

    for into in ("whole", "killed", "resumed"):
        teach_folder(Path("first"), Path(into), config, options)
    learn("whole")
    for into in ("killed", "resumed"):
        with pytest.raises(Crash):
            learn(into, Breaks())
    learn("killed")
    go_on(Path("resumed"))
    wanted = Learner.load("whole").learnt_state()
    for into in ("killed", "resumed"):
        found = Learner.load(into).learnt_state()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, found[key]) for key, value in wanted.items())
        assert whole(Path(into))[-1].manifest["rows"] == whole(Path("whole"))[-1].manifest["rows"]
