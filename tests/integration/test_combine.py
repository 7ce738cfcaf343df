"""`perdure combine`: finished learners behind one face, told when one is gone, and merged where they are alike."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.api.combine import combine
from perdure.api.distil import distil
from perdure.api.folders import teach_folder
from perdure.api.given import shown
from perdure.api.learner import Learner
from perdure.api.merge import merge, task_vector, unlike
from perdure.api.resizing import resize
from perdure.api.routing_scores import measure_routing
from perdure.api.specialists import Specialists
from perdure.core.manifests import check_new
from perdure.core.method import parts_of
from perdure.mechanisms.distillation import EXPERTS, EXPERTS_OF
from perdure.mechanisms.routing import LinUCB
from perdure.reporting.contents import contents
from perdure.storage.files import locked
from perdure.storage.replacement import DRAFT
from perdure.streams.conversations import Conversation, messages
from perdure.training.config import RunConfig
from perdure.training.loop import fit_task

FAST = ("--precision", "fp32", "--epochs", 12, "--lr", 0.01, "--batch-size", 16)
CLASSES = {"animals": "cat dog cow", "colours": "red green blue"}
BACKBONES = {"animals": "tiny(dim=16)", "colours": "tiny(dim=24)"}
METHODS = {"animals": "lora(rank=2)", "colours": "probe"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the members of all tests are taught, once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def members(perdure: Any, photos: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two learners of different classes, backbones and methods."""
    for name, classes in CLASSES.items():
        photos(f"{name}/train", classes, 12), photos(f"{name}/test", classes, 6)
    if not (kept / "runs").exists():
        shutil.copytree(tmp_path, kept, dirs_exist_ok=True)
        monkeypatch.chdir(kept)
        for name in CLASSES:
            made = ("--backbone", BACKBONES[name], "--method", METHODS[name], *FAST)
            assert perdure("learn", name, "--into", f"runs/{name}", *made).code == 0
        monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "runs", "runs")
    return [f"runs/{name}" for name in CLASSES]


def table_of(answer: Any) -> dict[str, Any]:
    (table,) = [event for event in answer.events if event["event"] == "routing"]
    return {row["who"]: row for row in table["rows"]} | {"routing_accuracy": table["routing_accuracy"]}


@pytest.mark.parametrize("route", ["gaussian", "nearest", "subspace", "linucb"])
def test_the_router_beats_a_random_one_and_each_member_alone(perdure: Any, members: list[str], route: str) -> None:
    answer = perdure("combine", *members, "--into", "team", "--route", route, "--json")
    assert answer.code == 0, answer.err
    table = table_of(answer)
    routed = table[f"routed ({route})"]["accuracy"]
    assert table["routing_accuracy"] > 0.75
    assert routed > max(table[who]["accuracy"] for who in ("a random member", "animals alone", "colours alone"))
    assert routed <= table["oracle"]["accuracy"]
    assert {who: table[who]["asked"] for who in ("animals alone", "all, averaged", "oracle")} == {
        "animals alone": 1,
        "all, averaged": 2,
        "oracle": 1,
    }
    again = perdure("eval", "team", "--json")
    assert {k: v["accuracy"] for k, v in table_of(again).items() if k != "routing_accuracy"} == {
        k: v["accuracy"] for k, v in table.items() if k != "routing_accuracy"
    }


def test_predict_show_eval_and_report_open_specialists_like_a_learner(perdure: Any, members: list[str]) -> None:
    said = perdure("combine", *members, "--into", "team")
    assert "routed (gaussian)" in said.out
    images = [f"animals/test/{name}/00.png" for name in ("cat", "dog")] + ["colours/test/red/01.png"]
    found = perdure("predict", "team", *images, "--json").events
    assert [each["member"] for each in found] == ["animals", "animals", "colours"]
    single = perdure("predict", members[0], *images[:2], "--json").events
    assert [e["labels"] for e in found[:2]] == [e["labels"] for e in single]
    assert "[animals]" in perdure("predict", "team", images[0]).out
    shown = perdure("show", "team", "--json").events[0]
    assert [(e["name"], e["state"]) for e in shown["members"]] == [("animals", "there"), ("colours", "there")]
    assert shown["exemplars"] == 72
    before = perdure("show", "team").out
    assert "2 specialists, chosen by gaussian" in before
    table = Path("team/routing.json").rename("routing.json")  # a process was killed before it was measured
    assert "not measured yet: 'perdure eval team' does" in perdure("show", "team").out
    table.rename("team/routing.json")
    assert perdure("show", "team").out == before
    assert perdure("report", "team").code == 0
    page = Path("team/report.html").read_text()
    assert "routed (gaussian)" in page
    assert "lora(rank=2)" in page
    told = perdure("predict", "team", images[0], "--task", "colours", "--json").events[0]
    assert told["member"] == "colours"
    for words, expected in (
        (("export", "team", "--out", "x"), "holds specialists, each of which lies in a folder of its own"),
        (("learn", "animals", "--into", "team", *FAST), "holds specialists, which learn each in a folder of their own"),
        (("search", "team", "animals", "a cat"), "no member of team reads texts, which search needs: combine one"),
        (("ask", "team", images[0], "What is this?"), "no member of team answers in words, which ask needs"),
        (("report", "team", "--csv", "--latex"), "give it alone, without --csv and --latex"),
        (("combine", members[0], "--into", "x"), "one learner alone is no team"),
        (("combine", members[0], members[0], "--into", "x"), "stands twice"),
        (("combine", *members, "--into", "team"), "already holds a learner or specialists"),
        (("combine", *members, "--into", "x", "--route", "text"), "needs a gate that reads texts"),
        (("combine", *members, "--into", "x", "--pool-bytes", "1kB"), "give more with --pool-bytes"),
        (("combine", *members, "--into", "x", "--weights", "1", "2"), "has no effect without --merge"),
        (("combine", *members, "--into", "x", "--images", "all"), "images='all' has no effect without --distil"),
    ):
        refused = perdure(*words)
        assert (refused.code, expected in refused.err) == (2, True), refused
        assert words[0] != "learn" or not refused.out  # not before it has said which rate it would learn at


def test_predictions_do_not_depend_on_the_batch(members: list[str]) -> None:
    team = combine(members, "team")
    paths = sorted(Path("animals/test").rglob("*.png"))[::4] + sorted(Path("colours/test").rglob("*.png"))[::4]
    together = team.answers(paths)
    for path, routed in zip(paths, together, strict=True):
        (alone,) = team.answers([path], batch_size=1)
        assert (alone.member, alone.known) == (routed.member, routed.known)
        assert dict(alone.labels) == pytest.approx(dict(routed.labels), abs=1e-5)


@pytest.mark.parametrize("harm", ["missing", "damaged", "locked"])
def test_without_a_member_the_others_answer_and_it_is_told_in_a_line(
    perdure: Any, members: list[str], harm: str
) -> None:
    perdure("combine", *members, "--into", "team")
    image, lost = "colours/test/red/01.png", Path(members[0])
    holds = locked(lost) if harm == "locked" else None
    if harm == "missing":
        lost.rename("elsewhere")
    elif harm == "damaged":
        file = lost / "task-000/learner.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with holds or torch.no_grad():
        found = perdure("predict", "team", image, "--json")
    assert found.code == 0, found.err
    assert found.events[0]["member"] == "colours"
    line = {"missing": "is not there", "damaged": "is damaged", "locked": "is locked, another process is working"}[harm]
    (said,) = found.err.splitlines()
    assert said.startswith("perdure: animals is left out: ")
    assert line in said
    with locked(lost) if harm == "locked" else torch.no_grad():
        assert (f"; {harm}" in perdure("show", "team").out) == (harm != "damaged")  # of which no byte is missing
        named = perdure("predict", "team", image, "--task", "colours", "--json")  # which the others may not have
        other = perdure("predict", "team", image, "--task", "animals")
    assert (named.code, named.events) == (0, found.events)
    assert (other.code, line in other.err.splitlines()[-1]) == (2, True)
    assert "has a task 'animals'; they have: 'colours'; left out is" in other.err
    if harm != "locked":
        if harm == "damaged":
            file.write_bytes(file.read_bytes()[:-1])  # what is cut off is seen without being read
        assert f"; {harm}" in perdure("show", "team").out
        shutil.rmtree(members[1])
        refused = perdure("predict", "team", image)
        assert (refused.code, "none of the members of team can be opened" in refused.err) == (2, True)


def test_what_a_member_has_learnt_since_is_told(perdure: Any, photos: Any) -> None:
    photos("pets", "cat dog", 4), photos("birds", "emu kea", 4), photos("cars", "van bus", 4)
    made = ("--backbone", "tiny()", "--method", "ncm")
    assert (
        perdure("learn", "pets", "--into", "one", *made).code == perdure("learn", "birds", "--into", "two", *made).code
    )
    assert perdure("combine", "one", "two", "--into", "team").code == 0
    assert perdure("predict", "team", "pets/cat/00.png").err == ""
    assert perdure("learn", "cars", "--into", "one").code == 0
    told = perdure("predict", "team", "cars/van/00.png")
    (line,) = told.err.splitlines()
    assert line.startswith("perdure: one has learnt 1 task since team was made, which its pool and its router do not")
    states = [each["state"] for each in perdure("show", "team", "--json").events[0]["members"]]
    assert states == ["there, with 1 task more than the pool knows: combine again", "there"]
    assert perdure("combine", "one", "two", "--into", "again").code == 0
    shutil.rmtree("one/task-001")
    told = perdure("predict", "again", "pets/cat/00.png")
    assert "one is left out: " in told.err
    assert "one has 1 of the 2 tasks that it had when it was combined" in told.err


def test_a_tree_that_was_moved_as_a_whole_still_answers(perdure: Any, members: list[str]) -> None:
    perdure("combine", *members, "--into", "runs/team")
    Path("runs").rename("archive")
    found = perdure("predict", "archive/team", "colours/test/red/01.png", "--json")
    assert (found.code, found.err) == (0, "")
    assert found.events[0]["member"] == "colours"


def test_what_seems_to_be_of_no_known_kind_is_told_by_a_team_that_is_opened_again(members: list[str]) -> None:
    team = combine(members, "team")
    images, _ = team.pool.sample(10**6, torch.Generator().manual_seed(0))
    assert 0.9 < sum(team.route(images)[1]) / len(images) < 1
    limit = team.router.limit
    team.save()
    assert Specialists.load("team").router.limit == limit


def test_another_gate_is_refused_and_another_learner_in_the_place_of_a_member_left_out(
    members: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = combine(members, "team").backbone
    shutil.rmtree(members[0])
    shutil.copytree(members[1], members[0])
    assert "holds another learner than was combined" in Specialists.load("team").missing["animals"]
    monkeypatch.setattr(type(gate), "fingerprint", lambda _: "another")
    with pytest.raises(ValueError, match="the gate of team, has other weights now: restore them"):
        Specialists.load("team")


def test_a_pool_that_was_changed_is_refused(perdure: Any, members: list[str]) -> None:
    perdure("combine", *members, "--into", "team")
    (pool,) = Path("team").glob("pool-*.safetensors")
    pool.write_bytes(pool.read_bytes()[:-1] + b"\x7f")
    refused = perdure("predict", "team", "colours/test/red/01.png")
    assert (refused.code, "is damaged: its sha256" in refused.err) == (2, True)
    pool.write_bytes(pool.read_bytes()[:3])
    shown = perdure("show", "team")
    assert (shown.code, shown.err.count("\n"), f"{pool} is damaged: " in shown.err) == (2, 1, True)
    record = json.loads(Path("team/specialists.json").read_text())
    Path("team/specialists.json").write_text(json.dumps(record | {"route": "nearest"}, indent=2) + "\n")
    refused = perdure("predict", "team", "colours/test/red/01.png")
    assert (refused.code, "does not match its seal" in refused.err) == (2, True)


def test_rewards_change_whom_a_bandit_asks_and_are_kept(members: list[str]) -> None:
    team = combine(members, "team", route="linucb")
    image = [Path("colours/test/red/01.png")]
    for _ in range(40):
        (routed,) = team.answers(image)
        team.feedback(image, [routed.member], [float(routed.member == "animals")])
    team.save()
    again = Specialists.load("team")
    assert again.route(image)[0] == team.route(image)[0] == ["animals"]
    assert len(list(Path("team").glob("pool-*"))) == 1
    with pytest.raises(ValueError, match="chooses by gaussian, not by rewards"):
        combine(members, "other").feedback(image, ["animals"], [1.0])


def test_what_a_bandit_learns_counts_among_the_pool_s_bytes(members: list[str]) -> None:
    gate, judged = "tiny(dim=128)", LinUCB.nbytes(len(members), 128)
    team = combine(members, "team", route="linucb", gate=gate, pool_bytes="600kB")
    assert judged > 100_000
    [pool] = Path("team").glob("pool-*")
    assert pool.stat().st_size < 600_000 + 10_000
    rows = {row["who"]: row for row in measure_routing(team)["rows"]}
    assert rows["routed (linucb)"]["bytes"] == rows["oracle"]["bytes"] + team.pool.nbytes + judged
    with pytest.raises(ValueError, match=r"the bandit learns of \d members takes .* give more with --pool-bytes"):
        combine(members, "other", route="linucb", gate=gate, pool_bytes=judged - 1)


def test_members_are_a_list(members: list[str]) -> None:
    for given, kind in ((members[0], "str"), ((each for each in members), "generator")):
        with pytest.raises(ValueError, match=f"folders: got {kind}, expected a list of two or more"):
            combine(given, "team")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has other weights than .* stands on: it keeps its size"):
        resize(members[0], size=32)


def test_rewards_that_cannot_be_used_change_nothing(members: list[str]) -> None:
    team = combine(members, "team", route="linucb")
    images, before = sorted(Path("animals/test").rglob("*.png"))[:2], team.router.state_dict()
    for named, rewards, message in (
        (["animals", "animals"], [1.0], "got 2 images, 2 members, 1 rewards: give as many"),
        ("animals", [1.0, 1.0], "members: got a str, expected a list"),
        (["animals", "animals"], 1.0, "rewards: got a float, expected a list"),
        (["animals", "nobody"], [1.0, 1.0], "member 'nobody' is none of animals, colours"),
        (["animals", "animals"], [1.0, "good"], "a reward is 'good': expected a number from 0 to 1"),
        (["animals", "animals"], [1.0, None], "a reward is None: expected a number from 0 to 1"),
        (["animals", "animals"], [float("nan"), 1.0], "a reward is nan: expected a number from 0 to 1"),
        (["animals", "animals"], [5, 1.0], "a reward is 5: expected a number from 0 to 1"),
        (["animals", "animals"], [1.0, -1], "a reward is -1: expected a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            team.feedback(images, named, rewards)
    assert all(value.equal(before[name]) for name, value in team.router.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"route": "foo"}, "route='foo': expected 'gaussian', 'nearest'"),
        ({"per_class": -1}, "per_class=-1: expected int from 1"),
        ({"per_class": 0}, "per_class=0: expected int from 1"),
        ({"per_class": "5"}, "per_class='5': expected int"),
        ({"seed": "a"}, "seed='a': expected int"),
        ({"into": None}, "into=None: expected str or Path"),
    ],
)
def test_what_cannot_be_combined_by_is_refused_before_anything_is_written(
    given: dict[str, Any], message: str, members: list[str]
) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message):
        combine(members, **{"into": "team", **given})
    assert sorted(Path().iterdir()) == before


def test_specialists_are_asked_as_a_learner_is(members: list[str]) -> None:
    team, image = combine(members, "team"), [Path("colours/test/red/01.png")]
    for wrong in (0, -1, 1.5, True, "2"):
        for call in (team.predict, team.answers):
            with pytest.raises(ValueError, match="top="):
                call(image, top=wrong)  # type: ignore[operator]
    with pytest.raises(ValueError, match="member 'nobody' is none of animals, colours"):
        team.route(image, ["nobody", "animals"])
    with pytest.raises(ValueError, match="member 'nobody' is none of animals, colours"):
        team.route(image, ["nobody"])


def test_learners_whose_heads_alone_were_taught_are_measured_and_merged(perdure: Any, photos: Any) -> None:
    for name, classes in CLASSES.items():
        photos(f"{name}/train", classes, 6), photos(f"{name}/test", classes, 2)
        assert perdure("learn", name, "--into", f"runs/{name}", "--backbone", "tiny()", "--precision", "fp32").code == 0
    answer = perdure("combine", *(f"runs/{name}" for name in CLASSES), "--into", "team", "--json")
    assert {"merged by ties", "merged by dare"} <= {*table_of(answer)}
    assert perdure("eval", "team").code == 0
    probes = {name: Learner.create("tiny()", "probe", epochs=1, seed=0) for name in CLASSES}
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    for name, probe in probes.items():
        probe.learn(images, [f"{name} {i % 2}" for i in range(8)])
    for how in ("average", "arithmetic", "ties", "dare"):
        both = merge(probes, f"{how}()")
        assert both.class_names == (*probes["animals"].class_names, *probes["colours"].class_names)
    with pytest.raises(ValueError, match="expected numbers of 0 or more"):
        merge(probes, weights=[float("nan"), 1.0])


def test_a_folder_that_was_taught_in_python_is_remembered_as_by_the_command(perdure: Any, photos: Any) -> None:
    for name, classes in CLASSES.items():
        photos(name, classes, 10)
        Learner.create("tiny()", "lora(rank=2)", epochs=2, precision="fp32").learn(name).save(f"runs/{name}")
        made = ("--backbone", "tiny()", "--method", "lora(rank=2)", "--epochs", 2, "--precision", "fp32")
        assert perdure("learn", name, "--into", f"typed/{name}", *made).code == 0
        for folder in ("runs", "typed"):
            again = perdure("learn", name, "--into", f"{folder}/{name}")
            assert "nothing is learnt twice" in again.err + again.out
    measured = [perdure("eval", f"{folder}/animals", "--json").events for folder in ("runs", "typed")]
    assert str(measured[0]).replace("runs/", "typed/") == str(measured[1])
    assert len(combine([f"runs/{name}" for name in CLASSES], "team").record["classes"]) == 6


def test_all_lessons_before_one_save_are_remembered_as_with_a_save_after_each(perdure: Any, photos: Any) -> None:
    for name, classes in CLASSES.items():
        photos(name, classes, 10)
    one = Learner.create("tiny()", "lora(rank=2)", epochs=2, precision="fp32", device="cpu")
    for name in CLASSES:
        one.learn(name)
        one.save("each")
    one.save("once")
    Learner.load("once").save("copied")
    measured = [perdure("eval", folder, "--json").events for folder in ("each", "once", "copied")]
    assert str(measured[1]).replace("once", "each") == str(measured[0])
    assert str(measured[2]).replace("copied", "each") == str(measured[0])
    once, each = (contents(Path(folder))["tasks"] for folder in ("once", "each"))
    told = [{name: task[name] for name in ("folder", "train", "skipped")} for task in once]
    assert told == [{name: task[name] for name in told[0]} for task in each]
    assert told[0]["folder"] == str(Path("animals").resolve())
    scores = []
    for folder in ("each", "once", "copied"):
        with pytest.warns(UserWarning, match="24 images were taught to this learner and are left out"):
            scores.append(Learner.load(folder).evaluate("animals"))
    assert scores[0] == scores[1] == scores[2]
    assert len(combine(["once", "copied"], "team").record["classes"]) == 12  # each of the six by two members
    shutil.move("animals", "creatures")
    assert perdure("move", "once", "animals=creatures").code == 0
    again = perdure("eval", "once", "--json")
    assert "creatures" not in again.err
    assert again.events[-1] == measured[0][-1]


def test_who_comes_from_others_leaves_out_what_these_were_taught(perdure: Any, photos: Any) -> None:
    for name, classes in CLASSES.items():
        photos(name, classes, 10)
        Learner.create("tiny()", "lora(rank=2)", epochs=2, precision="fp32").learn(name).save(f"runs/{name}")
    team = combine([f"runs/{name}" for name in CLASSES], "team")
    made = {"merged": merge(team.members), "distilled": distil(team, "lora(rank=2)", epochs=1)}
    alike = merge({"one": team.members["animals"], "two": Learner.load("runs/animals")})
    for name, learner in (*made.items(), ("alike", alike)):
        learner.save(name)
        for each in (learner, Learner.load(name)):
            with pytest.warns(UserWarning, match="24 images were taught to this learner and are left out"):
                each.evaluate("animals")
    for name in made:
        measured = perdure("eval", name, "--stream", "images(path='colours')", "--json")
        assert "24 more were taught" in measured.err + measured.out, measured.err
        assert "is not known" not in measured.err + measured.out


def test_rewards_on_the_command_line_change_whom_a_bandit_asks(perdure: Any, members: list[str]) -> None:
    assert perdure("combine", *members, "--into", "team", "--route", "linucb").code == 0
    image = "colours/test/red/01.png"
    lines = [{"image": image, "member": m, "reward": int(m == "animals")} for m in ("animals", "colours")] * 40
    Path("rewards.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    told = perdure("reward", "team", "rewards.jsonl", "--json")
    assert [json.loads(line) for line in told.out.splitlines()] == [
        {"member": "animals", "rewards": 40, "mean": 1.0},
        {"member": "colours", "rewards": 40, "mean": 0.0},
    ]
    assert json.loads(perdure("predict", "team", image, "--json").out)["member"] == "animals"
    before = Specialists.load("team").router.state_dict()
    for wrong, said in (
        ({"member": "plants"}, "line 2: 'plants' is no member of team: give one of animals, colours"),
        ({"reward": 2}, "line 2: Expected `float` <= 1.0"),
        ({"reward": None}, "line 2: Expected `float`, got `null`"),
    ):
        Path("bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (lines[0], lines[1] | wrong)))
        refused = perdure("reward", "team", "bad.jsonl")
        assert refused.code == 2
        assert said in refused.err
    after = Specialists.load("team").router.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    perdure("combine", *members, "--into", "other")
    assert "chooses by gaussian, not by rewards" in perdure("reward", "other", "rewards.jsonl").err


def test_three_backbones_answer_images_and_words_from_one_command(perdure: Any, photos: Any, tmp_path: Path) -> None:
    photos("animals", "cat dog", 8)
    perdure("learn", "animals", "--into", "eyes", "--backbone", "tiny(dim=16)", "--method", "ncm", *FAST)
    pairs = [
        {"image": f"animals/{name}/0{i}.png", "captions": [f"a {name}"]} for name in ("cat", "dog") for i in range(4)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    made = ("--backbone", "tiny(dim=24, text=True)", "--method", "probe", "--objective", "retrieve")
    assert perdure("learn", "pairs.jsonl", "--into", "index", *made, *FAST).code == 0
    talk = [
        {
            "image": each["image"],
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ok"}],
        }
        for each in pairs
    ]
    Path("talk.json").write_text(json.dumps(talk))
    made = ("--backbone", "tiny_mllm()", "--method", "lora(rank=2, tower='language')")
    assert perdure("learn", "talk.json", "--into", "voice", *made, "--precision", "fp32", "--epochs", 1).code == 0
    said = perdure("combine", "eyes", "index", "voice", "--into", "team", "--gate", "tiny(dim=24, text=True)")
    assert said.code == 0, said.err
    image = "animals/cat/07.png"
    assert "cat" in perdure("ask", "team", image).out  # an image alone
    answer = perdure("ask", "team", image, "What?", "--json")  # both
    assert answer.events[0]["answer"] == perdure("ask", "voice", image, "What?", "--json").events[0]["answer"]
    words = perdure("ask", "team", "What?", "--json")  # words alone
    assert words.events[0]["answer"] == perdure("ask", "voice", "What?", "--json").events[0]["answer"]
    found = perdure("search", "team", "animals", "a dog", "--json").events
    assert found == perdure("search", "index", "animals", "a dog", "--json").events
    # by its own words where no image is shown
    team = Specialists.load("team")
    assert team.reply([Conversation(messages([("user", ("What?",))]))]) == [words.events[0]["answer"]]


def merging(perdure: Any, photos: Any, how: str) -> tuple[Any, list[str]]:
    for name, classes in CLASSES.items():
        photos(f"{name}/train", classes, 12), photos(f"{name}/test", classes, 6)
        made = ("--backbone", "tiny(dim=16)", "--method", "lora(rank=2)", *FAST)
        perdure("learn", name, "--into", f"runs/{name}", *made)
    folders = [f"runs/{name}" for name in CLASSES]
    return perdure("combine", *folders, "--into", "one", "--merge", how), folders


def test_merged_learners_are_one_that_answers_all_and_stores_what_one_does(perdure: Any, photos: Any) -> None:
    answer, folders = merging(perdure, photos, "average")
    assert answer.code == 0, answer.err
    one, parts = Learner.load("one"), [Learner.load(each) for each in folders]
    assert list(one.known) == ["cat", "cow", "dog", "blue", "green", "red"]
    vectors = [task_vector(each) for each in parts]
    for layer, update in task_vector(one).items():
        torch.testing.assert_close(update, (vectors[0][layer] + vectors[1][layer]) / 2, rtol=1e-4, atol=1e-6)
    assert {name for name, _ in one.predict(["animals/test/cat/00.png"])[0]} == set(one.known)
    table = table_of(perdure("combine", *folders, "--into", "team", "--json"))
    assert {f"merged by {how}" for how in ("average", "arithmetic", "ties", "dare")} <= table.keys()
    assert [task["folder"] for task in contents(Path("one"))["tasks"]] == [
        str(Path(name).resolve()) for name in CLASSES
    ]
    rows = perdure("eval", "one", "--json").events
    assert {row.get("on") for row in rows if row.get("metric") == "accuracy"} == {0, 1}
    photos("others", CLASSES["animals"], 14)
    measured = perdure("eval", "one", "--stream", "images(path='others', tasks=1)")
    assert measured.code == 0, measured.err
    assert "36 more were taught to this learner and are left out" in measured.err + measured.out
    alone = merge({"animals": parts[0]}, "average()")
    shown = ["animals/test/cat/01.png"]
    assert dict(alone.predict(shown)[0]) == pytest.approx(dict(parts[0].predict(shown)[0]), abs=1e-5)
    refused = perdure("combine", *folders, "--into", "two", "--merge", "ties(density=2)")
    assert (refused.code, "density" in refused.err) == (2, True)
    refused = perdure("combine", *folders, "--into", "two", "--merge", "average", "--seed", "7")
    assert "seed=7 has no effect with average, which drops nothing at random: leave it out" in refused.err
    assert perdure("combine", *folders, "--into", "two", "--merge", "dare", "--seed", "7").code == 0


def test_what_a_killed_merge_has_left_is_no_learner(perdure: Any, photos: Any) -> None:
    _, folders = merging(perdure, photos, "average")
    for path in Path("one").iterdir():
        if path.name not in ("run.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = perdure("combine", *folders, "--into", "one", "--merge", "ties")
    assert again.code == 0, again.err
    assert Learner.load("one").learnt == 2
    third = perdure("combine", *folders, "--into", "one", "--merge", "ties")
    assert "already holds a learner" in third.err
    Path("one/run.json").unlink()
    with pytest.raises(ValueError, match=r"one has lost its run\.json: restore it"):
        Learner.load(folders[0]).save("one")


def test_a_new_folder_holds_a_whole_learner_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    learner = Learner.create("tiny(dim=16)", "ncm", precision="fp32").learn(pictures, ["cat", "dog"] * 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("perdure.api.learner.write_summary", full)
        with pytest.raises(OSError, match="No space left"):
            learner.save(tmp_path / "one")
    assert not (tmp_path / "one").exists()
    assert Learner.load(learner.save(tmp_path / "one")).learnt == 1


def half_saved(folder: Path, counts: bool) -> bytes:
    """Make a saved learner what a killed `save` leaves, a draft, which `counts` or does not; returns its record."""
    (folder / DRAFT).mkdir()
    for path in [each for each in folder.iterdir() if each.name not in (DRAFT, ".lock")]:
        path.rename(folder / DRAFT / path.name)
    files = [str(path.relative_to(folder / DRAFT)) for path in (folder / DRAFT).rglob("*") if path.is_file()]
    if counts:
        (folder / DRAFT / "files.json").write_text(json.dumps(sorted(files)))
    return (folder / DRAFT / "run.json").read_bytes()


def test_what_a_killed_save_has_left_is_a_learner_or_nothing(perdure: Any, photos: Any) -> None:
    photos("jan", "cat dog"), photos("feb", "emu fox")
    made = ("--backbone", "tiny(dim=16)", "--method", "ncm", "--precision", "fp32")
    learner = Learner.create("tiny(dim=16)", "ncm", precision="fp32").learn("jan")
    other = Learner.create("tiny(dim=16)", "probe", precision="fp32", epochs=1).learn("feb")
    for name in ("draft", "taught", "told", "kept", "merged"):
        learner.save(name)
    half_saved(Path("draft"), counts=False)
    assert "is neither a run's nor a grid's folder" in perdure("report", "draft").err
    assert perdure("learn", "feb", "--into", "draft", *made).code == 0
    assert Learner.load("draft").learnt == 1

    record = half_saved(Path("taught"), counts=True)
    teach_folder(Path("feb"), Path("taught"), RunConfig(stream=""), {})
    assert Path("taught/run.json").read_bytes() == record
    assert Learner.load("taught").learnt == 2
    half_saved(Path("told"), counts=True)
    assert perdure("learn", "feb", "--into", "told").code == 0
    half_saved(Path("kept"), counts=True)
    with pytest.raises(ValueError, match="kept holds another learner"):
        other.save("kept")
    half_saved(Path("merged"), counts=True)
    with pytest.raises(ValueError, match="merged already holds a learner"):
        check_new(Path("merged"))
    assert not list(Path().glob(f"*/{DRAFT}"))


def test_learners_of_folders_of_one_name_are_all_there(tmp_path: Path) -> None:
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    folders = [tmp_path / where for where in ("a/birds/learner", "b/birds/learner", "cars")]
    for number, folder in enumerate(folders):
        learner = Learner.create("tiny(dim=16)", "lora(rank=2)", epochs=1, precision="fp32")
        learner.learn(pictures, [f"x{number}", f"y{number}"] * 2).save(folder)
    with pytest.raises(
        ValueError, match=r"came from Python, .* with 'perdure learn FOLDER --into .*or use --route text"
    ):
        combine(list(map(str, folders)), str(tmp_path / "looking"))
    team = combine(list(map(str, folders)), str(tmp_path / "team"), route="uniform")
    assert len(team.members) == 3
    assert sorted(team.known) == ["x0", "x1", "x2", "y0", "y1", "y2"]
    assert {"a/birds/learner", "b/birds/learner", "cars"} == set(team.names)
    shares = {name: share / 3 for each in team.members.values() for name, share in each.predict(pictures[:1])[0]}
    assert dict(team.predict(pictures[:1])[0]) == pytest.approx(shares)


def test_the_same_classes_in_other_lessons_cannot_be_merged() -> None:
    pictures = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    made = {}
    for name, lessons in (("two", ("ab", "cd")), ("one", ("abcd",))):
        made[name] = Learner.create("tiny(dim=16)", "lora(rank=2)", epochs=1, precision="fp32")
        for lesson in lessons:
            made[name].learn(pictures, list(lesson) * (8 // len(lesson)))
    with pytest.raises(ValueError, match=r"several have learnt 'a', but in other lessons: combine them as specialists"):
        merge(made)


@pytest.mark.parametrize("how", ["average()", "arithmetic(scale=1)", "ties(density=1)", "dare(drop=0)"])
def test_who_has_no_weight_has_no_part_in_the_heads_either(how: str, tmp_path: Path) -> None:
    pictures = torch.randint(0, 255, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {}
    for seed in (0, 1):
        learner = Learner.create("tiny(dim=16)", "lora(rank=2)", seed=seed, epochs=2, batch_size=4, precision="fp32")
        made[str(seed)] = learner.learn(pictures, ["cat", "dog"] * 8)
    one = merge(made, how, weights=(1, 0))
    torch.testing.assert_close(one.predict_proba(pictures), made["0"].predict_proba(pictures), atol=1e-5, rtol=1e-4)


def pair(tmp_path: Path, methods: tuple[str, str], classes: tuple[str, str] = ("ab", "cd")) -> dict[str, Learner]:
    """Two learners of one backbone, taught and saved."""
    pictures = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {}
    for name, method, known in zip(("one", "two"), methods, classes, strict=True):
        made[name] = Learner.create("tiny(dim=16)", method, epochs=1, batch_size=4, precision="fp32")
        made[name].learn(pictures, list(known) * 4).save(tmp_path / name)
    return made


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        (("finetune", "finetune"), "one was taught by 'finetune', whose answers no update of weights holds"),
        (("lora(rank=2)", "lora(rank=2) + ncm"), "two was taught by .*, whose answers no update of weights holds"),
        (("moe_lora", "lora(rank=2)"), "one was taught by 'moe_lora', whose update depends on the image"),
        (("lora(rank=2, at='fc2')", "lora(rank=2)"), "one and two adapt different layers"),
    ],
)
def test_what_no_update_of_the_same_layers_holds_is_not_merged(
    methods: tuple[str, str], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        merge(pair(tmp_path, methods))


def test_the_seed_says_what_dare_drops(tmp_path: Path) -> None:
    made = pair(tmp_path, ("lora(rank=2)", "lora(rank=2)"))
    zero, one, again = (task_vector(merge(made, "dare()", seed=seed)) for seed in (0, 1, 1))
    assert all(torch.equal(one[layer], again[layer]) for layer in one)
    assert not any(torch.equal(one[layer], zero[layer]) for layer in one)


def test_a_student_hears_of_each_class_from_the_first_who_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pair(tmp_path, ("lora(rank=2)", "ncm"), ("ab", "ac"))
    team, given = combine([tmp_path / name for name in made], tmp_path / "team", route="uniform"), []
    monkeypatch.setattr("perdure.api.distil.fit_task", lambda *how: given.append(how) or fit_task(*how))
    noise = torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = [Image.fromarray(each.numpy()) for each in noise]
    distil(team, "lora(rank=2)", images, epochs=1, precision="fp32")  # type: ignore[arg-type]
    [(student, task, *_)] = given
    assert [part.name for part in parts_of(student.method)] == ["lora", "expert_distillation"]
    batch, names = task.train.__getitems__([3, 0]), student.class_names
    assert {name: int(owner) for name, owner in zip(names, batch[EXPERTS_OF][0], strict=True)} == {
        "a": 0,
        "b": 0,
        "c": 1,
    }
    for row, said in zip((3, 0), batch[EXPERTS].exp(), strict=True):
        one, two = (dict(made[name].predict([images[row]])[0]) for name in ("one", "two"))
        shares = [max({"a": one["a"], "b": one["b"], "c": two["c"]}[name], 1e-6) for name in names]
        assert said.tolist() == pytest.approx(shares, rel=1e-4)


def test_a_team_is_measured_by_who_knows_a_class_and_not_on_what_was_taught(members: list[str], photos: Any) -> None:
    team = combine(members, "team")
    team.router.choose = lambda features, among: (  # type: ignore[method-assign, union-attr]
        torch.zeros(len(features), dtype=torch.int64),
        torch.ones(len(features), dtype=torch.bool),
    )
    assert measure_routing(team)["routing_accuracy"] == pytest.approx(0.5)
    photos("others", CLASSES["animals"], 14)  # of each class the first twelve are those that were taught
    assert measure_routing(team, "images(path='others')")["images"] == 3 * 2
    with pytest.raises(ValueError, match=r"^images\(path='animals/test'\) has no images that members of team were not"):
        measure_routing(team, "images(path='animals/test')")


def test_what_cannot_be_merged_says_why(members: list[str]) -> None:
    learners = {Path(each).name: Learner.load(each) for each in members}
    assert unlike(learners) == "animals and colours have different backbones"
    with pytest.raises(ValueError, match="combine them as specialists, without --merge"):
        merge(learners)
    team = combine(members, "team")
    assert not any("merged" in row["who"] for row in measure_routing(team)["rows"])


@pytest.mark.parametrize(
    "part", ["replay(size=10)", "derpp(size=10)", "icarl(size=10)", "gem(size=10)", "agem(size=10)", "joint()"]
)
def test_a_student_is_given_no_memory_of_images_that_nothing_keeps(members: list[str], part: str) -> None:
    said = (
        f"{part.partition('(')[0]} would refer to images that nothing keeps once the student is made: leave it out of "
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        distil(combine(members, "team"), f"lora(rank=2) + {part}", epochs=1)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_specialists_of_different_backbones_are_distilled_into_one_that_learns_on(
    perdure: Any, members: list[str], photos: Any, unlabelled: bool
) -> None:
    more = ("--images", "animals/train", "colours/train") if unlabelled else ()
    answer = perdure("combine", *members, "--into", "one", "--distil", "lora(rank=2)", *more, "--lr", 0.01, "--json")
    assert answer.code == 0, answer.err
    table = table_of(answer)
    assert table["distilled"]["accuracy"] > max(table["a random member"]["accuracy"], 0.5)
    one = Learner.load("one")
    assert set(one.known) == {name for classes in CLASSES.values() for name in classes.split()}
    photos("shapes", "round square", 8)
    assert perdure("learn", "shapes", "--into", "one").code == 0
    assert len(Learner.load("one").known) == 8


def test_the_pool_holds_images_of_every_lesson_of_a_class(perdure: Any, photos: Any) -> None:
    for lesson, look in (("first", "cat dog"), ("second", "emu kea"), ("other", "red green")):
        photos(lesson, look, 12)
    for name, look in (("cat", "emu"), ("dog", "kea")):
        Path("second", look).rename(f"second/{name}")
    for lesson, into in (("first", "one"), ("second", "one"), ("other", "two")):
        made = () if Path(into).exists() else ("--backbone", "tiny(dim=16)", "--method", "ncm", "--precision", "fp32")
        assert perdure("learn", lesson, "--into", into, *made).code == 0
    team = combine(["one", "two"], "team", per_class=8)
    seen = {lesson: shown(sorted(Path(lesson).rglob("*.png")), team) for lesson in ("first", "second")}
    looks = {k: each.__getitems__(range(len(each)))["image"].flatten(1) for k, each in seen.items()}
    for room in (team.record["pool_bytes"], team.pool.nbytes - 24 * team.pool.exemplars["0"][0].nbytes):
        team.pool.limit = room  # where images give way, those of all lessons do
        team.pool.evict()
        mine = torch.cat([team.pool.exemplars["0"], team.pool.exemplars["1"]]).flatten(1)
        held = [int((mine[:, None] == each).all(2).any(1).sum()) for each in looks.values()]
        assert held == [len(mine) / 2] * 2, held
    for lesson in ("first", "second"):
        known = [each.known for each in team.answers(sorted(Path(lesson).rglob("*.png")))]
        assert sum(known) > len(known) / 3, lesson


def test_the_task_says_who_is_asked_where_it_has_all_that_a_member_still_knows(perdure: Any, photos: Any) -> None:
    photos("pets", "cat dog"), photos("birds", "emu kea"), photos("hues", "red green")
    made = ("--backbone", "tiny(text=True)", "--method", "ncm", "--objective", "zeroshot", "--precision", "fp32")
    for lesson, into in (("pets", "one"), ("birds", "one"), ("hues", "two")):
        assert perdure("learn", lesson, "--into", into, *(() if Path(into).exists() else made)).code == 0
    image = "hues/red/00.png"
    team = combine(["one", "two"], "team")
    assert {name for name, _ in team.answers([image], task="birds")[0].labels} == {"emu", "kea"}
    words = team.answers([image], classes=["a cat", "a dog"], task="birds")[0]  # of which no task has any
    assert (words.member, words.labels) == ("one", team.members["one"].predict([image], classes=["a cat", "a dog"])[0])
    for name in ("emu", "kea"):
        assert perdure("forget", "one", name).code == 0
    assert perdure("combine", "one", "two", "--into", "left").code == 0
    told = perdure("predict", "left", image, "--task", "pets", "--json")
    assert (told.code, told.err) == (0, "")
    assert told.events[0]["member"] == "one"
    refused = perdure("predict", "left", image, "--task", "birds")
    assert (refused.code, "all classes of task 'birds' were forgotten" in refused.err) == (2, True), refused.err


def test_what_teaches_no_class_need_not_be_at_hand(perdure: Any, photos: Any) -> None:
    photos("new", "x y"), photos("pets", "cat dog"), photos("birds", "emu kea"), photos("hues", "red green")
    made = ("--backbone", "tiny(dim=16)", "--method", "lora(rank=2)", "--precision", "fp32", "--epochs", 1)
    assert perdure("pretrain", "new", "--into", "one", *made).code == 0
    for lesson, into in (("pets", "one"), ("birds", "one"), ("hues", "two")):
        assert perdure("learn", lesson, "--into", into, *(() if Path(into).exists() else made)).code == 0
    for name in ("emu", "kea"):
        assert perdure("forget", "one", name).code == 0
    shutil.rmtree("new"), shutil.rmtree("birds")
    said = perdure("combine", "one", "two", "--into", "team")
    assert said.code == 0, said.err
    assert [name for _, name in Specialists.load("team").record["classes"]] == ["cat", "dog", "green", "red"]
