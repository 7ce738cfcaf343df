"""What a language model keeps of questions that it is never taught, its scores, and examples of its answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.cli.console import Screen
from perdure.cli.main import main
from perdure.cli.tables import comparison
from perdure.core.learner import Core
from perdure.evaluation.answer_retention import answered, mean_kept
from perdure.evaluation.held_out import held_out_of, remarks
from perdure.evaluation.with_task import measured
from perdure.reporting.report import write_report
from perdure.reporting.runs import RunResults
from perdure.reporting.tables import markdown, tabulate
from perdure.reporting.texts import answers_kept
from perdure.streams import build_stream
from perdure.training.config import RunConfig, make_method, make_objective
from perdure.training.loop import Quiet, fit_task
from perdure.training.run import resume, run
from perdure.training.summary import scores_of
from perdure.types import Row, Task

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(file: Path, colour: str) -> str:
    Image.new("RGB", (28, 28), COLOURS[colour]).save(file)
    return file.name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of questions, one that is held out, and MME's folder with a subtask of two images."""
    root = tmp_path_factory.mktemp("data")
    asked = {"colour": ("Which?", "exact", str), "red": ("Red?", "choice", lambda c: "yes" if c == "red" else "no")}
    for task, (question, _, answer) in asked.items():
        rows = [
            {"image": picture(root / f"{task}{i}.png", colour), "question": question, "answer": answer(colour)}
            for i, colour in enumerate([*COLOURS] * 5)
        ]
        (root / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"image": picture(root / f"h{c}.png", c), "question": "Name it", "answer": c} for c in COLOURS]
    (root / "test.json").write_text(json.dumps(held))
    subtask = root / "MME" / "color"
    subtask.mkdir(parents=True)
    for number, colour in enumerate(("red", "blue")):
        picture(subtask / f"{number}.png", colour)
        (subtask / f"{number}.txt").write_text(f"Is it {colour}?\tYes\nIs it green?\tNo\n")
    return root


def config_of(data: Path, **more: Any) -> RunConfig:
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 4, "lr": 2e-2, "precision": "fp32", "attention": "sdpa"}
    settings |= {"stream": f"conversations(path={[str(data / 'colour.jsonl'), str(data / 'red.jsonl')]!r})"}
    settings |= {"backbone": "tiny_mllm()", "objective": "generate(tokens=6)", "device": "cpu"}
    settings |= {"retain": (f"mme(path={str(data / 'MME')!r})", f"conversations(path={str(data / 'test.json')!r})")}
    return RunConfig(**{"method": "lora(rank=4, tower='language', at='qkvo,mlp')"} | settings | more)


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    run(config_of(data), out)
    return out


def test_what_is_held_out_is_answered_before_the_stream_and_after_each_task(taught: Path) -> None:
    summary = json.loads((taught / "summary.json").read_text())
    sets = summary["answers"]
    assert set(sets) == {"mme", "test"}
    headline = {"strict", "lenient", "empty", "unparsable"}
    assert headline <= sets["test"].keys()
    assert headline | {"official", "official/color/acc+", "guarded/perception", "guarded/overall"} <= sets["mme"].keys()
    for numbers in sets.values():
        for facts in numbers.values():
            assert facts["before"] is None or isinstance(facts["before"], float)
            assert len(facts["after"]) <= 2
        assert len(numbers["strict"]["after"]) == 2
        assert numbers["strict"]["before"] is not None
    last = {number: facts["after"][-1] for number, facts in sets["mme"].items()}
    assert last["lenient"] == last["guarded/overall"] == last["guarded/total"] / 200
    assert last["guarded/color"] == pytest.approx(100 * (last["guarded/color/acc"] + last["guarded/color/acc+"]))


def test_numbers_are_those_of_the_answers_one_by_one(data: Path) -> None:
    learner = Core(tiny_mllm(), make_objective("generate(tokens=6)", "probe"), make_method("probe"))
    learner.grow(build_stream(config_of(data).stream, learner.backbone.preprocess, 0).tasks[0])
    held = held_out_of(config_of(data).retain, learner)
    rows = {row.metric: row.value for row in held.measure(learner, 3)}
    from perdure.streams.evaluation_sets import mme

    found = mme(str(data / "MME"))
    said = []
    with learner.inference():
        for question in found.questions:
            said += learner.objective.say(learner, {"conversation": [question.conversation()]})
    assert {f"answers/mme/{name}": value for name, value in found.measure(said).items()} == {
        name: value for name, value in rows.items() if name.startswith("answers/mme/")
    }


def test_a_stopped_run_measures_the_same(data: Path, taught: Path, tmp_path: Path, content_of: Any) -> None:
    class Stop(Exception):
        pass

    class Breaks(Quiet):
        def __init__(self) -> None:
            self.index = 0

        def task(self, task: Any, *_: Any) -> None:
            self.index = task.index

        def step(self, step: int, *_: Any) -> None:
            if (self.index, step) == (1, 2):
                raise Stop

    with pytest.raises(Stop):
        run(config_of(data), tmp_path / "broken", Breaks())
    resume(tmp_path / "broken")
    assert content_of(tmp_path / "broken") == content_of(taught)
    assert (tmp_path / "broken" / "examples.json").read_text() == (taught / "examples.json").read_text()


def test_what_is_kept_is_told_for_each_number() -> None:
    rows = [Row(-1, None, "answers/a/official/x", 0.5), Row(0, None, "answers/a/official/x", 0.4)]
    rows += [Row(0, None, "answers/b/strict", 0.2), Row(0, 0, "strict", 1.0)]
    assert answered(rows) == {
        "a": {"official/x": {"before": 0.5, "after": [0.4], "drop": pytest.approx(0.1), "ratio": pytest.approx(0.8)}},
        "b": {"strict": {"before": None, "after": [0.2], "drop": None, "ratio": None}},
    }
    rows = [Row(-1, None, f"answers/{name}/strict", before) for name, before in (("a", 0.5), ("b", 0.4))]
    rows += [Row(0, None, f"answers/{name}/strict", after) for name, after in (("a", 0.4), ("b", 0.4))]
    assert mean_kept(answered(rows), "strict") == pytest.approx((0.8 + 1.0) / 2)
    run = RunResults(
        Path(), {}, {}, tuple(Row(r.after, r.on, r.metric.replace("strict", "lenient"), r.value) for r in rows)
    )
    assert answers_kept(run) == [pytest.approx(0.9)]
    assert mean_kept(answered([*rows, Row(-1, None, "answers/c/strict", 0.0)]), "strict") is None


def test_the_screen_tells_each_held_out_set_though_one_has_nothing_to_lose(
    taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((taught / "summary.json").read_text())
    for name, numbers in summary["answers"].items():
        numbers["strict"] |= {"before": 0.0, "drop": -0.25, "after": [0.0, 0.25]}
        summary["zero_shot"] = {f"seen {name}": {"before": 0.5, "after": [0.125], "drop": 0.375, "ratio": 0.25}}
    Screen(False).matrix(summary, ["colour", "red"], "lora")
    said = capsys.readouterr().out
    for name in summary["answers"]:
        assert f"held out, {name}: 0.0% before, 25.0% now" in said
    assert "held out, seen test: 50.0% before, 12.5% now" in said


def test_eval_answers_held_out_questions(data: Path, taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retain = config_of(data).retain
    main(["eval", str(taught), "--retain", *retain, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["answers"]: line for line in lines}
    summary = json.loads((taught / "summary.json").read_text())["answers"]
    for name, numbers in summary.items():
        for number in ("strict", "lenient", "empty", "unparsable"):
            assert found[name][number] == numbers[number]["after"][-1]


@pytest.mark.parametrize(
    ("retain", "objective", "message"),
    [
        ("mmee(path='MME')", "generate", r"unknown stream or evaluation set 'mmee'; did you mean 'mme'\?$"),
        ("nothing()", "generate", r"unknown stream or evaluation set 'nothing'; known: as_questions, .*mme_realworld"),
        ("synthetic()", "generate", r"^retain='synthetic\(\)': there is nothing to answer; give conversations"),
        ("mme(path='nowhere')", "classify", r"^mme is an evaluation set, which is asked and never taught"),
    ],
)
def test_what_cannot_be_answered_is_refused(retain: str, objective: str, message: str) -> None:
    backbone: Any = tiny_mllm()
    if objective == "classify":
        from perdure.backbones.tiny import tiny

        backbone = tiny(text=True)
    learner = Core(backbone, make_objective(objective, "probe"), make_method("probe"))
    with pytest.raises(ValueError, match=message):
        held_out_of((retain,), learner)


def answer_rows() -> list[Row]:
    """Strict 80, then 20 after the second task, of which 50 are an answer in another form; the second 60."""
    found = {(-1, 0): (0.1, 0.4), (-1, 1): (0.0, 0.0), (0, 0): (0.8, 0.9), (1, 0): (0.2, 0.7), (1, 1): (0.6, 0.6)}
    rows = []
    for (after, on), (strict, loose) in found.items():
        rows += [Row(after, on, "strict", strict), Row(after, on, "lenient", loose)]
        rows += [Row(after, on, "empty", 0.1), Row(after, on, "unparsable", 0.2 if on else 0.0)]
    return rows


def test_a_forgotten_form_is_told_from_forgotten_knowledge() -> None:
    found = scores_of(answer_rows(), 2, ["exact", "choice"])
    assert found["matrix"] == [[0.8, None], [0.2, 0.6]]
    assert found["lenient_matrix"] == [[0.9, None], [0.7, 0.6]]
    assert found["empty_matrix"] == [[0.1, None], [0.1, 0.1]]
    assert found["forgetting"] == pytest.approx(0.6)
    assert found["lenient_forgetting"] == pytest.approx(0.2)
    assert (found["acc"], found["lenient_acc"]) == (pytest.approx(0.4), pytest.approx(0.65))
    assert (found["empty"], found["unparsable"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found["scores"] == ["exact", "choice"]
    assert found["unlike_scores"] == ""


def test_scores_of_different_scales_have_no_means_and_it_is_said() -> None:
    found = scores_of(answer_rows(), 2, ["exact", "cider"])
    assert {found[key] for key in ("acc", "aaa", "forgetting", "bwt", "lenient_acc", "lenient_forgetting")} == {None}
    assert found["unlike_scores"].startswith("scores of different scales have no mean: exact (to 1), cider (to 10)")
    assert found["matrix"][1] == [0.2, 0.6]
    assert found["retention"] == pytest.approx(0.25)  # what is left of a score has no scale


def test_strict_and_lenient_stand_side_by_side_on_the_console_in_tables_and_in_the_report(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((taught / "summary.json").read_text())
    Screen().matrix(summary, ["colour", "red"], "lora")
    said = capsys.readouterr().out
    assert "% right on each task" in said
    assert "where the truth is in what is said" in said
    assert f"strict {summary['acc']:.1%}" in said
    assert f"lenient {summary['lenient_acc']:.1%}" in said
    assert "task id" not in said
    Screen().matrix(summary | {"scores": ["cider", "cider"]}, ["colour", "red"], "lora")
    assert "lora: cider × 100 on each task (columns), after each task (rows)" in capsys.readouterr().out
    table = tabulate([("lora", RunResults.read(taught))])
    lines = markdown(table).splitlines()
    for title in ("final strict", "final lenient", "lenient forgetting"):
        assert title in lines[0]
    assert "lenient" in comparison(table, 200)[0]
    page = write_report([taught], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Lenient score on each task, after each task" in page
    assert ", lenient" in page
    assert "Answers to questions that were never taught" in page


def test_ten_questions_a_task_are_answered_before_once_learnt_and_in_the_end(data: Path, taught: Path) -> None:
    noted = json.loads((taught / "examples.json").read_text())
    tests = [len(task.test) for task in build_stream(config_of(data).stream, tiny_mllm().preprocess, 0)]
    for index, count in enumerate(tests):
        mine = [each for each in noted["questions"] if each["task"] == index]
        assert len(mine) == min(10, count)
        for each in mine:
            assert set(each["said"]) == {"before", "learnt", "end"}
            assert all((when in each["right"]) == (each["said"][when] == each["truth"][0]) for when in each["said"])
            assert noted["pictures"][each["pictures"][0]].startswith("/9j/")  # a JPEG
    last = [each for each in noted["questions"] if each["task"] == 1]
    assert all(each["said"]["learnt"] == each["said"]["end"] for each in last)
    assert any(each["said"]["before"] != each["said"]["end"] for each in noted["questions"])


def test_the_report_shows_what_was_said_as_text(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"image": str(data / f"colour{i}.png"), "question": "<b>&amp; which?", "answer": "<i>"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(data, stream=f"conversations(path={str(file)!r})", method="probe", retain=())
    run(config, tmp_path / "run")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;amp; which?" in page
    assert "<b>&amp;" not in page
    assert 'src="data:image/jpeg;base64,/9j/' in page
    assert "What was answered before and after" in page


def test_held_out_images_that_the_stream_teaches_are_told(data: Path) -> None:
    backbone = tiny_mllm()
    learner = Core(backbone, make_objective("generate", "probe"), make_method("probe"))
    both = (f"conversations(path={str(data / 'red.jsonl')!r})", *config_of(data).retain)
    stream = build_stream(config_of(data).stream, backbone.preprocess, 0)
    shared = stream.tasks[1].train.images()
    assert [line for line in remarks(held_out_of(both, learner), stream) if "taught" in line] == [
        f"red: {shared} of its 15 images are taught by the stream: they are not held out"
    ]


def test_captions_that_are_held_out_are_asked_for(data: Path) -> None:
    learner = Core(tiny_mllm(), make_objective("generate(tokens=4)", "probe"), make_method("probe"))
    learner.grow(build_stream(config_of(data).stream, learner.backbone.preprocess, 0).tasks[0])
    held = held_out_of(("captions_synthetic(tasks=1, test_per_task=3)",), learner)
    (task,) = next(iter(held.sets.values())).tasks
    asked = task.test.__getitems__([0])["conversation"][0]
    assert task.score == "cider"
    assert asked.question == "Describe the image in one short sentence."
    assert len(asked.answers) >= 1
    assert {row.metric.rpartition("/")[2] for row in held.measure(learner, 0)} >= {"strict", "lenient"}


@pytest.mark.parametrize(
    "what",
    [
        {"method": "probe"},
        {
            "method": 'lora(tower="text")',
            "backbone": "tiny(text=True)",
            "objective": "zeroshot",
            "stream": "synthetic(tasks=2, classes_per_task=2)",
            "retain": (),
        },
    ],
)
def test_the_untaught_model_is_measured_in_the_precision_of_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any]
) -> None:
    """What a frozen tower is said to keep is all of it, to the bit; and its weights lose no digit before training."""
    found: list[torch.Tensor] = []
    begun: list[torch.dtype] = []

    def watched(learner: Core, tasks: list[Task], *rest: Any) -> Any:
        with learner.inference():
            found.append(learner.encode(next(learner.batches(tasks[0].test, 4))))
        return measured(learner, tasks, *rest)

    def fit(learner: Core, *rest: Any) -> Any:
        begun.append(next(learner.backbone.parameters()).dtype)
        return fit_task(learner, *rest)

    monkeypatch.setattr("perdure.evaluation.schedule.measured", watched)
    monkeypatch.setattr("perdure.training.tasks.fit_task", fit)
    run(config_of(data, precision="bf16", attention="eager", epochs=1, **what), tmp_path / "run")
    assert torch.equal(found[0], found[-1])
    assert begun == [torch.float32, torch.bfloat16]
