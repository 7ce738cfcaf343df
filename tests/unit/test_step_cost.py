"""The cost of a step is measured in the second task, by the loop itself, and not measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from perdure.experiments.step_cost import PLAIN, TURN, TimedLearner, measure_steps, plain_of, ratio
from perdure.training.config import RunConfig
from perdure.training.runtime import Runtime

RUNTIME = Runtime("cpu", "fp32", "sdpa", 1)


class Told:
    """Who was measured."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def step_cost(self, number: int, total: int, method: str) -> None:
        self.methods.append(method)


def test_a_step_is_of_the_second_task_and_costs_a_multiple_of_plain_loras(lab: Any) -> None:
    plain = TimedLearner(lab.config(PLAIN), RUNTIME)
    probe = TimedLearner(lab.config("probe"), RUNTIME, stream=plain.stream)
    assert (plain.learner.task.index, plain.learner.learnt) == (1, 1)
    found = ratio(probe, plain)
    assert found["ratio"] > 0
    assert found["between"][0] <= found["ratio"] <= found["between"][1]
    assert found["steps"] % TURN == 0
    assert (probe.learner.task.index, probe.learner.learnt) == (1, 1)


def test_a_turn_has_equally_many_steps_every_time_however_few_images_there_are(lab: Any) -> None:
    small = lab.but(per_class=1, classes=1)
    for epochs in (1, 2):
        one = TimedLearner(small.config("lora(rank=2) + replay(size=2)", epochs=epochs), RUNTIME)
        assert [len(one.turn()) for _ in range(3)] == [TURN] * 3


def test_a_stream_of_one_task_is_measured_in_it(lab: Any) -> None:
    one = TimedLearner(lab.but(tasks=1).config("lora(rank=2)"), RUNTIME)
    assert one.learner.task.index == 0
    assert len(one.turn()) == TURN


def test_what_has_no_steps_or_cannot_be_measured_says_so_and_nothing_is_measured_twice(
    lab: Any, tmp_path: Path
) -> None:
    told, methods = Told(), ["ncm", "inflora(rank=99)"]
    measure_steps(lab.config("probe"), methods, RUNTIME, tmp_path, told)
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["methods"]["ncm"] == {"ratio": None, "why": "no steps", "task": 2}
    assert written["methods"]["inflora(rank=99)"]["ratio"] is None
    assert "99" in written["methods"]["inflora(rank=99)"]["why"]
    assert (written["options"]["batch_size"], written["options"]["threads"]) == (8, 1)
    measure_steps(lab.config("probe"), [*methods, "nonsense"], RUNTIME, tmp_path, told)
    assert told.methods == [*methods, "nonsense"]
    measure_steps(lab.config("probe", batch_size=4), ["ncm"], RUNTIME, tmp_path, told)
    assert told.methods[3:] == ["ncm"]
    assert json.loads((tmp_path / "steps.json").read_text())["methods"].keys() == {"ncm"}


@pytest.mark.parametrize("method", ["lora(rank=2) + ewc(samples=8)", "inflora(rank=2)", "lora(rank=2) + joint"])
def test_turns_leave_the_learner_fit_to_end_the_task(method: str, lab: Any) -> None:
    one = TimedLearner(lab.config(method), RUNTIME)
    assert [len(one.turn()) for _ in range(2)] == [TURN] * 2
    learner = one.learner
    learner.method.end_task(learner, learner.task)


def test_a_language_model_s_methods_are_measured_against_lora_in_its_language_tower(tmp_path: Path) -> None:
    lines = [{"question": f"What is {i}?", "answer": str(i)} for i in range(6)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    config = RunConfig(
        stream=f"conversations(path={files!r})", backbone="tiny_mllm()", objective="generate", batch_size=2, epochs=1
    )
    assert plain_of(config) == "lora(tower='language')"
    measure_steps(config, ["probe"], RUNTIME, tmp_path)
    assert json.loads((tmp_path / "steps.json").read_text())["options"]["plain"] == "lora(tower='language')"
