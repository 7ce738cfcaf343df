"""`perdure combine` of learners that answer in words: with images, without any, and told the task."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.combine import combine
from perdure.api.learner import Learner
from perdure.api.merge import merge, task_vector
from perdure.api.routing_exams import QuestionExam
from perdure.api.specialists import Specialists
from perdure.scoring import Reference

MADE = ("--backbone", "tiny_mllm()", "--method", "lora(rank=2, tower='language')", "--precision", "fp32", "--epochs", 1)
READS = ("--gate", "tiny(text=True)")
TALKS = {
    "sums": [{"question": "What is 2+2?", "answer": "4"}, {"question": "What is 3+3?", "answer": "6"}],
    "legs": [{"question": "How many legs has a spider?", "answer": "8"}, {"question": "Say hi", "answer": "hi"}],
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the members of all tests are taught, once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def voice(perdure: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`voice("words", "sums")`: a learner that was taught these files of questions, one after the other."""

    def taught(name: str, *talks: str) -> str:
        if not (kept / name).exists():
            monkeypatch.chdir(kept)
            for talk in talks:
                if (tmp_path / talk).is_dir():
                    shutil.copytree(tmp_path / talk, talk, dirs_exist_ok=True)
                lines = TALKS.get(talk) or [
                    {"image": f"{talk}/{each}/0{i}.png", "question": f"Which of {talk}?", "answer": each}
                    for each in sorted(path.name for path in Path(talk).iterdir())
                    for i in range(4)
                ]
                Path(f"{talk}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
                made = () if (kept / name).exists() else MADE
                answer = perdure("learn", f"{talk}.jsonl", "--into", name, *made)
                assert answer.code == 0, answer.err
            monkeypatch.chdir(tmp_path)
        shutil.copytree(kept / name, name)
        return name

    return taught


@pytest.mark.parametrize("route", [None, "nearest", "subspace", "linucb"])
def test_who_was_taught_no_images_is_asked_by_words(perdure: Any, voice: Any, route: str | None) -> None:
    members = voice("x", "sums"), voice("y", "legs")
    made = perdure("combine", *members, "--into", "team", *READS, *(("--route", route) if route else ()))
    assert made.code == 0, made.err
    assert ("their texts choose, as with --route text" in made.out) == (route != "linucb"), made.out
    team = Specialists.load("team")
    assert team.record["route"] == ("linucb" if route == "linucb" else "text")
    for name, talk in zip(members, ("sums", "legs"), strict=True):
        for question in (each["question"] for each in TALKS[talk]):
            assert team._by_text([question], list(members)) == [name]
            assert team.ask(None, question) == team.members[name].ask(None, question)


def test_without_images_a_gate_that_reads_no_texts_is_refused_in_a_line(perdure: Any, voice: Any) -> None:
    members = voice("x", "sums"), voice("y", "legs")
    refused = perdure("combine", *members, "--into", "team", "--gate", "tiny()")
    said = "no member was taught images, which --route gaussian looks at, and the gate tiny() reads no texts"
    assert (refused.code, said in refused.err, Path("team").exists()) == (2, True, False), refused.err


def test_a_question_about_an_image_goes_by_words_where_no_speaker_was_taught_images(
    perdure: Any, voice: Any, photos: Any
) -> None:
    members = voice("x", "sums"), voice("y", "legs")
    photos("animals", "cat dog", 4)
    assert perdure("learn", "animals", "--into", "eyes", "--backbone", "tiny()", "--method", "ncm").code == 0
    team = combine(["eyes", *members], "team", gate="tiny(text=True)")
    assert team.record["route"] == "gaussian"
    asked = []
    for name in members:
        team.members[name].reply = lambda found, *_, name=name: asked.append(name) or [name] * len(found)  # type: ignore[method-assign, misc]
    for question in ("Say hi", "What is 2+2?"):
        team.ask("animals/cat/00.png", question)
    assert asked == ["y", "x"]


def test_where_texts_choose_a_question_s_own_words_say_who(perdure: Any, voice: Any, photos: Any) -> None:
    photos("hues", "red green", 4), photos("pets", "cat dog", 4)
    members = voice("hh", "hues"), voice("pp", "pets")
    team, asked = combine(members, "team", route="text", gate="tiny(text=True)"), []
    for name in members:
        team.members[name].reply = lambda found, *_, name=name: asked.append(name) or [name] * len(found)  # type: ignore[method-assign, misc]
    for image in ("hues/red/00.png", "pets/cat/00.png"):
        for question in ("Which of hues?", "Which of pets?"):
            team.ask(image, question)
    assert asked == ["hh", "pp", "hh", "pp"]


def test_a_member_whose_texts_are_lost_does_not_keep_others_from_answering(perdure: Any, voice: Any) -> None:
    for name in TALKS:
        Path(f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in TALKS[name]))
        assert perdure("learn", f"{name}.jsonl", "--into", f"of_{name}", *MADE).code == 0
    Path("sums.jsonl").unlink()
    team = combine(["of_sums", "of_legs"], "team", route="text", gate="tiny(text=True)")
    assert team.ask(None, "What is 2+2?") == Learner.load("of_legs").ask(None, "What is 2+2?")


def test_the_task_says_which_speaker_is_asked(perdure: Any, voice: Any, photos: Any) -> None:
    photos("pets", "cat dog", 4), photos("birds", "emu kea", 4), photos("hues", "red green", 4)
    members = voice("p", "pets", "birds"), voice("h", "hues")
    assert perdure("combine", *members, "--into", "team").code == 0
    for task, name in (("pets", "p"), ("birds", "p"), ("hues", "h")):
        answer = perdure("ask", "team", "hues/red/00.png", "Which?", "--task", task, "--json")
        assert answer.code == 0, answer.err
        assert (
            answer.events[0]["answer"]
            == perdure("ask", name, "hues/red/00.png", "Which?", "--json").events[0]["answer"]
        )
    refused = perdure("ask", "team", "hues/red/00.png", "Which?", "--task", "pet")
    assert (refused.code, "has a task 'pet'" in refused.err) == (2, True), refused.err


def test_a_task_that_all_speakers_have_is_refused_for_it_decides_nothing(perdure: Any, voice: Any, photos: Any) -> None:
    photos("hues", "red green", 4)
    members = voice("h", "hues"), voice("g", "hues")
    assert perdure("combine", *members, "--into", "team", "--route", "text", "--gate", "tiny(text=True)").code == 0
    refused = perdure("ask", "team", "hues/red/00.png", "Which?", "--task", "hues")
    assert (refused.code, "task='hues' has no effect: all who can be asked have it" in refused.err) == (2, True)


def test_the_command_that_is_named_is_one_that_members_answer_to(perdure: Any, voice: Any, photos: Any) -> None:
    photos("hues", "red green", 4), photos("pets", "cat dog", 4)
    for name in ("hues", "pets"):
        pairs = [
            {"image": str(path), "captions": [f"a {path.parent.name}"]} for path in sorted(Path(name).rglob("*.png"))
        ]
        Path(f"{name}-pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
        made = ("--backbone", "tiny(text=True)", "--method", "lora(rank=2)", "--objective", "retrieve", "--epochs", 1)
        assert perdure("learn", f"{name}-pairs.jsonl", "--into", f"s_{name}", *made).code == 0
        classes = ("--backbone", "tiny()", "--method", "ncm", "--epochs", 1)
        assert perdure("learn", name, "--into", f"c_{name}", *classes).code == 0
    speaks, searches, sees = (voice("h", "hues"), voice("x", "sums")), ("s_hues", "s_pets"), ("c_hues", "c_pets")
    for into, members, way, words in (
        ("speak", speaks, "ask speak IMAGE 'question'", ("ask", "speak", "hues/red/00.png", "Which?")),
        ("search", searches, "search search FOLDER 'words'", ("search", "search", "hues", "red")),
        ("both", (speaks[0], searches[0]), "ask both IMAGE 'question'", ("ask", "both", "hues/red/00.png", "Which?")),
        ("all", (*sees, speaks[0]), "predict all IMAGE", ("predict", "all", "hues/red/00.png")),
    ):
        said = perdure("combine", *members, "--into", into, *READS)
        assert said.out.splitlines()[-1].endswith(f"; ask them with: perdure {way}"), said
        assert ("learnt classes or answer in words, and no member" in said.out) == (into == "search")
        answer = perdure(*words)
        assert answer.code == 0, answer.err


def test_words_are_searched_for_by_those_who_learnt_captions(perdure: Any, photos: Any) -> None:
    photos("hues", "red green", 4), photos("pets", "cat dog", 4)
    pairs = [
        {"image": str(path), "captions": [f"a {path.parent.name}"]} for path in sorted(Path("hues").rglob("*.png"))
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    for data, into, objective in (("pairs.jsonl", "captioned", "retrieve"), ("pets", "named", "zeroshot")):
        made = ("--backbone", "tiny(text=True)", "--method", "lora(rank=2)", "--objective", objective, "--epochs", 1)
        assert perdure("learn", data, "--into", into, *made).code == 0
    team, asked = combine(["named", "captioned"], "team"), []
    for name, member in team.members.items():
        member.search = lambda *_, name=name: asked.append(name)  # type: ignore[method-assign, misc]
    for words in ("a photo of a cat.", "a red"):  # the first was taught to the other
        team.search(sorted(Path("pets").rglob("*.png")), words)
    assert asked == ["captioned", "captioned"]


def test_learners_that_speak_are_merged_into_one(perdure: Any, voice: Any) -> None:
    members = voice("x", "sums"), voice("y", "legs")
    made = perdure("combine", *members, "--into", "one", "--merge", "arithmetic(scale=1)")
    assert made.code == 0, made.err
    assert "ask it with: perdure ask one" in made.out
    one, parts = Learner.load("one"), [task_vector(Learner.load(each)) for each in members]
    assert [task.name for task in one.tasks] == ["sums", "legs"]
    found = task_vector(one)
    assert found.keys() == parts[0].keys()
    for layer, update in found.items():
        torch.testing.assert_close(update, parts[0][layer] + parts[1][layer], rtol=1e-3, atol=1e-6)
    alone = merge({each: Learner.load(each) for each in members}, "ties(density=1)", weights=(0, 1))
    asked = [each["question"] for talk in TALKS.values() for each in talk]
    assert alone.ask(None, asked) == Learner.load(members[1]).ask(None, asked)
    lines = [{"question": "Who are you?", "answer": "me"}] * 4
    Path("more.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    later = perdure("learn", "more.jsonl", "--into", "one")
    assert later.code == 0, later.err
    moved = task_vector(Learner.load("one"))
    assert any((moved[layer] - found[layer]).abs().max() > 1e-5 for layer in found)


def test_an_answer_is_right_that_says_nothing_else() -> None:
    exam = object.__new__(QuestionExam)
    exam.scored = [("exact", [Reference(("4",))] * 3)]
    assert exam.marks([["4", "it is 4", "5"]]).tolist() == [1, 0, 0]


def test_speakers_are_measured_with_the_router_and_what_is_merged(perdure: Any, tmp_path: Path) -> None:
    for name, answer in {"x": "4", "y": "8"}.items():
        Path(name).mkdir()
        for part in ("train", "test"):
            lines = [{"question": f"{name} {part} {i}?", "answer": answer} for i in range(6)]
            Path(f"{name}/{part}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        perdure("learn", name, "--into", f"my/{name}", *MADE, "--epochs", 20, "--lr", 0.02)
    made = perdure("combine", "my/x", "my/y", "--into", "team", *READS, "--json")
    [table] = [json.loads(line) for line in made.out.splitlines() if '"routing"' in line]
    assert (table["images"], table["things"]) == (12, "questions")
    rows = {row["who"]: row["accuracy"] for row in table["rows"]}
    said = {each: Learner.load(f"my/{each}").ask(None, [f"{each} test {i}?" for i in range(6)]) for each in "xy"}
    assert rows["oracle"] == pytest.approx((said["x"].count("4") + said["y"].count("8")) / 12)
    assert rows["oracle"] > 0, said
    assert rows["a random member"] == pytest.approx((rows["x alone"] + rows["y alone"]) / 2)
    assert {f"merged by {how}" for how in ("average", "arithmetic", "ties", "dare")} < rows.keys()
    team = Specialists.load("team")
    routed = [*team.ask(None, [f"{each} test {i}?" for each in "xy" for i in range(6)])]
    assert rows["routed (text)"] == pytest.approx((routed[:6].count("4") + routed[6:].count("8")) / 12)
    lines = [{"question": f"new {i}?", "answer": "4"} for i in range(3)]
    Path("new.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    other = perdure("eval", "team", "--stream", "conversations(path='new.jsonl')", "--json")
    assert other.code == 0, other.err
    [table] = [json.loads(line) for line in other.out.splitlines() if '"routing"' in line]
    assert (table["images"], table["routing_accuracy"]) == (3, None)
    assert "oracle" not in {row["who"] for row in table["rows"]}
    shown = perdure("show", "team")
    assert "questions" in shown.out
