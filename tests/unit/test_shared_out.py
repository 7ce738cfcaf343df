"""Batches that processes share, or that are encoded in parts: which rows are whose, and what is refused."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perdure.backbones.tiny import tiny
from perdure.core.processes import Processes
from perdure.training.launch import RUN_ID, _ended, first_has_said, says_itself
from perdure.training.loop import check_shared_out, fit_task
from perdure.training.run import run
from perdure.training.runtime import resolve


@given(st.integers(0, 300), st.integers(1, 9))
def test_every_example_is_encoded_by_one_process_and_loads_differ_by_one(count: int, world: int) -> None:
    spans = Processes(0, world).spans(count)
    if spans is None:
        assert world == 1 or count < world
        return
    assert list(chain.from_iterable(spans)) == list(range(count))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
    assert min(map(len, spans)) >= 1


def learnt(lab: Any, spec: str, **how: Any) -> dict[str, torch.Tensor]:
    learner = lab.learner(spec)
    for task in lab.stream().tasks[:2]:
        learner.grow(task)
        fit_task(learner, task, lab.train_config(optimizer="sgd", **how))
    return learner.learnt_state()


@pytest.mark.parametrize(
    ("spec", "objective"),
    [("lora(rank=2) + replay(size=6)", "classify"), ("lora(rank=2, tower='both') + lwf", "retrieve")],
)
def test_a_batch_encoded_in_parts_gives_what_the_whole_gives(spec: str, objective: str, lab: Any) -> None:
    bench = lab.but(objective=objective)
    whole, parts = (learnt(bench, spec, accumulate=number) for number in (1, 3))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_no_more_of_a_batch_than_a_part_is_encoded_at_once(lab: Any) -> None:
    learner, sizes = lab.learner("lora(rank=2)"), []
    learner.backbone.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]["label"])))
    task = lab.stream().tasks[0]
    learner.grow(task)
    fit_task(learner, task, lab.train_config(accumulate=4, epochs=1))
    assert max(sizes) == 2


@pytest.mark.parametrize("spec", ["l2p(batchwise=True)", "dualprompt(batchwise=True)"])
def test_a_method_that_looks_at_the_whole_batch_is_refused_by_name(spec: str, lab: Any) -> None:
    learner = lab.learner(spec)
    check_shared_out(learner, lab.train_config())
    with pytest.raises(ValueError, match=r"^\w+\(batchwise=True\) cannot learn with accumulate=2"):
        check_shared_out(learner, lab.train_config(accumulate=2))
    learner.processes = Processes(0, 2)
    with pytest.raises(ValueError, match=r"^\w+\(batchwise=True\) cannot learn in 2 processes"):
        check_shared_out(learner, lab.train_config())


@pytest.mark.parametrize(
    ("spec", "more", "said"),
    [
        ("moe_adapters", {"accumulate": 2}, "moe_adapters cannot learn with accumulate=2"),
        ("inflora(rank=2, end_moments='training')", {"accumulate": 2}, "inflora cannot learn with accumulate=2"),
        ("probe", {"accumulate": 2}, "accumulate=2 has no effect where no part trains the encoder"),
        ("lora(rank=2)", {"accumulate": 9}, "accumulate=9: expected at most batch_size=8"),
        ("lora(rank=2)", {"shard": "blocks"}, "shard='blocks' has no effect in one process"),
    ],
)
def test_what_could_not_be_or_has_no_effect_is_refused_before_anything_is_learnt(
    spec: str, more: dict[str, Any], said: str, lab: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        run(lab.config(spec, **more), tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_commands_that_learn_in_one_process_are_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched; only 'perdure run' and 'perdure resume'"):
        resolve(tiny(), "auto", "auto")


@dataclass
class Failure:
    exitcode: int
    timestamp: float


def test_the_process_that_was_killed_is_named_and_not_those_that_ended_for_it(tmp_path: Path) -> None:
    ended = _ended({0: Failure(1, 1.0), 1: Failure(-9, 2.0), 2: Failure(-15, 0.5)}, 3, "runs/x", tmp_path)
    assert ended.args[0].startswith("process 1 of 3 was killed by SIGKILL")
    assert "perdure resume runs/x" in ended.args[0]
    assert _ended({0: Failure(2, 2.0), 1: Failure(-15, 1.0)}, 2, "runs/x", tmp_path).args == ("", 2)


def test_processes_that_were_stopped_have_said_so_or_the_launcher_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = {0: Failure(130, 1.0), 1: Failure(-15, 1.0)}
    assert isinstance(_ended(stopped, 2, "runs/x", tmp_path), KeyboardInterrupt)
    (tmp_path / "0").mkdir()
    found = {"TORCHELASTIC_RUN_ID": RUN_ID, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "0" / "error.json")}
    for rank, said in (("1", False), ("0", True)):
        for name, value in (found | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        says_itself()
        assert first_has_said() == said
        assert (_ended(stopped, 2, "runs/x", tmp_path).args == ("", 130)) == said
