"""A class is forgotten: never answered again, gone from the folder, and whoever is killed leaves it old or new."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perdure.api.forgetting import forget_in
from perdure.api.given import shown
from perdure.api.learner import Learner
from perdure.api.measuring import evaluate
from perdure.core.checkpoint import whole
from perdure.export.head import head_of
from perdure.reporting.contents import contents

MADE = ("--backbone", "tiny()", "--precision", "fp32", "--epochs", 2)
METHODS = (
    "inflora(rank=2) + align",
    "probe + align(covariance='full')",
    "probe + align(covariance='lowrank', rank=2)",
    "ncm",
    "lora(rank=2) + ranpac(dim=32)",
    "lora(rank=2) + replay(size=12)",
    "lora(rank=2) + derpp(size=12)",
    "lora(rank=2) + gem(size=12)",
    "lora(rank=2) + icarl(size=12)",
    "lora(rank=2) + ewc",
    "lora(rank=2) + lwf",
    "finetune + si",
    "joint",
    "hide_lora",
    "lora_experts",
    "moe_adapters",
    "dualprompt",
    "coda_prompt",
    "l2p",
    "sd_lora(rank=2)",
    "lora(rank=2) + feature_distill",
)
KILLS = range(1, 100, 4)
_KEPT = ("statistics.means", "counts", "sums", "covariances")
OF_B = tuple(f"{kept}.1{form}" for kept in _KEPT for form in ("", "/rest"))


def pictures(classes: str, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Eight noisy pictures of a colour each, uint8 (n, 3, 16, 16), with a letter for a class."""
    found, labels = [], []
    for name in classes:
        draw = torch.Generator().manual_seed(ord(name))
        colour = torch.randint(40, 215, (3, 1, 1), generator=draw)
        draw.manual_seed(ord(name) + 1000 * (seed + 1))
        noise = torch.randn(8, 3, 16, 16, generator=draw) * 12
        found.append((colour + noise).clamp(0, 255).to(torch.uint8))
        labels += [name] * 8
    return torch.cat(found), labels


def taught(method: str, *months: str, **options: Any) -> Learner:
    learner = Learner.create("tiny()", method, precision="fp32", attention="sdpa", epochs=1, batch_size=12, **options)
    for month in months:
        learner.learn(*pictures(month), epochs=1)
    return learner


def scores(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    with learner.inference():
        return learner.scores_of(shown(images, learner)).clone()


def test_the_others_are_answered_as_before_and_it_goes_on(subtests: Any, tmp_path: Path) -> None:
    images = pictures("abcdef", seed=1)[0]
    for number, method in enumerate(METHODS):
        with subtests.test(method):
            learner = taught(method, "abc", "def")
            before, names = scores(learner, images), list(learner.class_names)
            learner.forget("b")
            assert learner.class_names == tuple("acdef")
            assert {name for line in learner.predict(images) for name, _ in line} == set("acdef")
            kept = [names.index(name) for name in "acdef"]
            # routers look at means of classes: an image may go elsewhere when one is gone
            if method not in ("hide_lora", "lora_experts", "moe_adapters"):
                torch.testing.assert_close(scores(learner, images), before[:, kept], atol=1e-5, rtol=1e-4)
            learner.save(tmp_path / f"{number}")
            loaded = Learner.load(tmp_path / f"{number}")
            assert torch.equal(loaded.predict_proba(images), learner.predict_proba(images))
            assert not [key for key in loaded.learnt_state() if key.endswith(OF_B)]
            learner.forget("d").forget("e").forget("f")  # of a whole task nothing is left
            learner.learn(*pictures("bg"), epochs=1)
            assert learner.class_names == tuple("acbg")
            assert learner.predict_proba(images).shape == (48, 4)


def test_what_is_learnt_after_does_not_depend_on_a_stop_in_between(tmp_path: Path) -> None:
    for method in ("inflora(rank=2) + align", "lora(rank=2) + ewc", "ncm"):
        learner = taught(method, "abc", "def").forget("b")
        folder = learner.save(tmp_path / method.partition("(")[0])
        loaded = Learner.load(folder)
        for each in (learner, loaded):
            each.learn(*pictures("bg"), epochs=1)
        mine, theirs = learner.learnt_state(), loaded.learnt_state()
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


def test_a_class_taught_again_is_known_again() -> None:
    learner = taught("inflora(rank=2) + align", "abc", "de").forget("e").forget("a")
    learner.learn(*pictures("ae"), epochs=1)
    assert learner.class_names == tuple("bcdae")
    right = [line[0][0] for line in learner.predict(pictures("ae", seed=1)[0])]
    assert sum(a == b for a, b in zip(right, pictures("ae")[1], strict=True)) >= 12


def test_more_images_of_an_old_class_count_as_if_they_had_come_at_once() -> None:
    apart, more = taught("ncm", "abc"), pictures("b", seed=2)
    apart.learn(*more)
    images, labels = pictures("abc")
    at_once = Learner.create("tiny()", "ncm", precision="fp32", attention="sdpa")
    at_once.learn(torch.cat([images, more[0]]), [*labels, *more[1]])
    assert apart.class_names == at_once.class_names
    shown = pictures("abc", seed=3)[0]
    torch.testing.assert_close(apart.predict_proba(shown), at_once.predict_proba(shown))


def test_the_folder_forgets(perdure: Any, photos: Any) -> None:
    photos("jan", "cat dog emu"), photos("feb", "fox owl")
    made = (*MADE, "--method", "inflora(rank=2) + align")
    for month in ("jan", "feb"):
        assert perdure("learn", month, "--into", "x", *(made if month == "jan" else ())).code == 0
    refused = perdure("forget", "x", "Dgo")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "did you mean 'dog'?" in refused.err
    images = ("jan/dog", "feb/owl")
    before = [
        {label["name"]: label["score"] for label in each["labels"]}
        for each in perdure("predict", "x", *images, "--top", 9, "--json").events
    ]
    said = perdure("forget", "x", "dog", "--json").events[-1]
    assert said == {"event": "forgotten", "class": "dog", "classes": ["cat", "emu", "fox", "owl"]}
    now = [
        {label["name"]: label["score"] for label in each["labels"]}
        for each in perdure("predict", "x", *images, "--top", 9, "--json").events
    ]
    for old, new in zip(before, now, strict=True):
        assert new.keys() == {"cat", "emu", "fox", "owl"}
        if old["dog"] < 0.5:
            rest = {name: score / (1 - old["dog"]) for name, score in old.items() if name != "dog"}
            assert new == pytest.approx(rest, abs=1e-5)
    for task in ("task-000", "task-001"):
        keys = load_file(f"x/{task}/learner.safetensors").keys()
        assert not [key for key in keys if key.endswith("means.1") or key.endswith("counts.1")]
        assert "dog" not in json.loads(Path(f"x/{task}/manifest.json").read_text())["tasks"].__repr__()
    assert "forgotten  1 class" in perdure("show", "x").out
    assert "dog" not in perdure("show", "x").out
    tasks, rows, _ = evaluate(Path("x"), None)
    assert [len(task.test) for task in tasks] == [2, 2]
    assert {row.metric for row in rows} >= {"accuracy"}
    assert head_of(Learner.load("x")).tensors["weight"].shape[0] == 4
    # what was taught last counts as new where something of it was forgotten; so does what was taught before
    assert perdure("forget", "x", "owl").code == 0
    for again in ("feb", "jan"):
        assert perdure("learn", again, "--into", "x").code == 0
    assert Learner.load("x").known.keys() == {"cat", "emu", "fox", "owl", "dog"}
    assert len(contents(Path("x"))["forgotten"]) == 2


def test_what_cannot_be_forgotten_is_refused(perdure: Any, photos: Any, small: tuple[str, ...]) -> None:
    photos("jan", "cat dog")
    assert perdure("learn", "jan", "--into", "x", *MADE, "--method", "ncm").code == 0
    assert perdure("forget", "x", "cat").code == 0
    for words, why in (
        (("x", "dog"), "only class left"),
        (("x", "cat"), "was not learnt"),
        (("jan", "cat"), "has no run.json"),
    ):
        refused = perdure("forget", *words)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert why in refused.err
    assert perdure("predict", "x", "jan/cat", "--json").events[0]["labels"][0]["name"] == "dog"
    assert perdure("run", *small, "--out", "run").code == 0
    name = Learner.load("run").class_names[0]
    refused = perdure("forget", "run", name)
    assert (refused.code, "take a copy" in refused.err) == (2, True)
    copy = Learner.load("run").forget(name).save("copy")
    assert name not in Learner.load(copy).class_names


def test_replay_reads_the_right_images_after(perdure: Any, photos: Any) -> None:
    photos("jan", "cat dog emu"), photos("feb", "fox owl"), photos("mar", "ram yak")
    for month in ("jan", "feb"):
        assert perdure("learn", month, "--into", "x", *MADE, "--method", "lora(rank=2) + replay(size=20)").code == 0
    before = Learner.load("x").method.parts[1].memory.refs
    assert perdure("forget", "x", "dog").code == 0
    refs = Learner.load("x").method.parts[1].memory.refs
    assert torch.equal(refs, before[before[:, 2] != 1])
    assert perdure("learn", "mar", "--into", "x").code == 0
    assert Learner.load("x").method.parts[1].memory.refs[:, 2].unique().tolist() == [0, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_whoever_is_killed_leaves_the_old_or_the_new(perdure: Any, photos: Any) -> None:
    photos("jan", "cat dog emu"), photos("feb", "fox owl")
    for month in ("jan", "feb"):
        assert perdure("learn", month, "--into", "made", *MADE, "--method", "probe + align").code == 0
    both = [Learner.load("made").learnt_state()]
    shutil.copytree("made", "new")
    both.append(forget_in(Path("new"), "dog").learnt_state())
    forks, ends = multiprocessing.get_context("fork"), []
    for moment in KILLS:
        shutil.rmtree("x", ignore_errors=True)
        shutil.copytree("made", "x")
        child = forks.Process(target=_killed, args=(moment,))
        child.start()
        child.join()
        found = Learner.load("x")
        state = found.learnt_state()
        same = [s.keys() == state.keys() and all(torch.equal(s[k], state[k]) for k in s) for s in both]
        assert sum(same) == 1, moment
        assert ("dog" in found.known) == same[0]
        assert [each.folder.name for each in whole(Path("x"))] == ["task-000", "task-001"]
        assert same[0] or not any(Path("x").glob(".new/*")), moment
        ends.append(same[1])
        if child.exitcode == 0:
            break
    assert ends == sorted(ends)  # old for a while, then new
    assert {False, True} == set(ends)


def _killed(moment: int) -> None:
    """Forget, and be killed after so many changes to files."""
    left = [moment]

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.copyfile"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)
    forget_in(Path("x"), "dog")
    os._exit(0)
