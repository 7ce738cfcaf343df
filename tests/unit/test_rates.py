"""Each method has a learning rate of its own, which runs take where none is given, and write down."""

from pathlib import Path
from typing import Any

import pytest

from perdure.cli.tables import comparison
from perdure.core.checkpoint import read_record
from perdure.core.method import METHODS, Method
from perdure.experiments.grid import cells, compare
from perdure.options.rates import RATES, RETRIEVING, SPEAKING, USUAL, own_rate
from perdure.training.config import RunConfig, TrainConfig, register, said_of
from perdure.training.record import recorded_config
from perdure.training.run import run

SMALL: dict[str, Any] = {
    "stream": "synthetic(tasks=2, classes_per_task=2, per_class=6, test_per_class=4)",
    "backbone": "tiny()",
    "epochs": 1,
    "precision": "fp32",
}


def _ours() -> dict[str, type[Method]]:
    """The methods that perdure brings, without those that other tests have registered."""
    register()
    return {name: made for name, made in METHODS.items() if made.__module__.startswith("perdure.methods.")}


def test_every_method_that_trains_the_encoder_has_its_own() -> None:
    ours = _ours()
    assert RATES.keys() <= ours.keys()
    assert {name for name, made in ours.items() if made.changes_encoder} <= RATES.keys()
    assert all(each.source for each in RATES.values())


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ("l2p", 3e-2),
        ("lora(rank=2) + ewc", 3e-3),
        ("replay", USUAL),
        ("finetune + lora", 1e-3),
        ("probe + align", 3e-3),
    ],
)
def test_a_sum_takes_the_lowest_of_its_parts(method: str, rate: float) -> None:
    assert own_rate(method) == rate
    config = RunConfig(**SMALL, method=method)
    assert (config.lr, config.peak, config.settled().peak) == (None, USUAL, rate)
    whose = "as for what has none of its own" if method == "replay" else f"that of {method}"
    assert said_of(config) == [f"learning rate {rate:g}, {whose}; --lr gives another"]
    given = RunConfig(**SMALL, method=method, lr=0.5)
    assert (given.settled(), said_of(given)) == (given, [])


@pytest.mark.parametrize("objective", ["classify", "zeroshot"])
def test_it_is_told_where_something_is_trained(objective: str, lab: Any) -> None:
    lab = lab.but(objective=objective)
    task = lab.stream().tasks[0]
    for name, kind in _ours().items():
        try:
            learner = lab.learner(name)
            learner.grow(task)
        except ValueError:  # not alone, or for another backbone
            continue
        trains = bool(learner.param_groups())
        assert bool(said_of(RunConfig(**SMALL, method=name, objective=objective))) == trains, name
        assert objective != "classify" or trains == kind.trains, name


def test_texts_have_lower_ones() -> None:
    assert RunConfig(**SMALL, method="l2p", objective="zeroshot()").recommended() == USUAL
    assert RunConfig(**SMALL, method="l2p", objective="retrieve()").recommended() == RETRIEVING
    assert RunConfig(**SMALL | {"backbone": "tiny_mllm()"}, method="l2p").recommended() == SPEAKING
    assert TrainConfig().rate(0, 10) == USUAL


@pytest.mark.parametrize(
    ("more", "whose"),
    [
        ({"objective": "zeroshot()", "method": "lora(rank=2)"}, "the highest for zeroshot"),
        ({"objective": "zeroshot()", "method": "finetune"}, "that of finetune"),
        ({"objective": "retrieve()", "method": "lora(rank=2)"}, "as for retrieve"),
        ({"backbone": "tiny_mllm()", "method": "lora(rank=2)"}, "as for language models"),
    ],
)
def test_a_rate_that_is_not_the_methods_own_is_not_said_to_be(more: dict[str, str], whose: str) -> None:
    config = RunConfig(**SMALL | more)
    assert said_of(config) == [f"learning rate {config.recommended():g}, {whose}; --lr gives another"]


def test_a_run_keeps_the_rate_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(RunConfig(**SMALL, method="lora(rank=2)"), tmp_path / "own")
    run(RunConfig(**SMALL, method="lora(rank=2)", lr=3e-3), tmp_path / "given")
    written = read_record(tmp_path / "own")
    assert (written["config"]["lr"], written["lr"]) == (None, 3e-3)
    monkeypatch.setitem(RATES, "lora", RATES["l2p"])
    assert recorded_config(tmp_path / "own", written).lr == 3e-3
    assert "lr" not in read_record(tmp_path / "given")
    learnt = [(tmp_path / name / "task-001" / "learner.safetensors").read_bytes() for name in ("own", "given")]
    assert learnt[0] == learnt[1]


def test_a_grid_gives_each_its_own_unless_one_is_given(tmp_path: Path) -> None:
    grid = cells(["l2p", "probe"], [0], tmp_path / "own")
    rows = compare(RunConfig(**SMALL), grid, tmp_path / "own", steps=False)
    assert [row["lr"] for row in rows] == [3e-2, 3e-3]
    assert "| learning rate |" in (tmp_path / "own" / "compare.md").read_text()
    assert len(compare(RunConfig(**SMALL), grid, tmp_path / "own", steps=False)) == 2  # finished ones are recognised
    grid = cells(["l2p", "probe"], [0], tmp_path / "one")
    rows = compare(RunConfig(**SMALL, lr=1e-2), grid, tmp_path / "one", steps=False)
    assert [row["lr"] for row in rows] == [1e-2, 1e-2]
    assert "learning rate" not in (tmp_path / "one" / "compare.md").read_text()


def test_what_trains_nothing_shows_no_rate_in_either_table(tmp_path: Path) -> None:
    rows = compare(RunConfig(**SMALL), cells(["ncm", "probe"], [0], tmp_path), tmp_path, steps=False)
    head, ncm, probe, *_ = comparison(rows, 300)
    place = head.index(" lr") + 1
    assert [line[: place + 2].split()[-1] for line in (ncm, probe)] == ["–", "0.003"]
    written = (tmp_path / "compare.md").read_text().splitlines()
    assert [line.split(" | ")[2] for line in written[2:4]] == ["–", "0.003"]
