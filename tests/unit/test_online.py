"""One pass without borders: what is learnt, refused, measured along the way, and how it goes on after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.core.learner import Core
from perdure.reporting.report import write_report
from perdure.streams import build_stream
from perdure.training.config import RunConfig, flags
from perdure.training.loop import fit_task
from perdure.training.online import POINTS, along, as_one
from perdure.types import Row

ABLE = (
    "lora(rank=2) + replay(size=8)",
    "lora(rank=2) + derpp(size=8)",
    "lora(rank=2) + lamaml(size=8, inner_steps=2)",
    "ncm",
)


@pytest.fixture
def lab(lab: Any) -> Any:
    """The laboratory, which passes once."""
    return lab.but(epochs=1)


WHOLE = ("prompt(tokens=2)", "prefix(length=2)", "moe_lora(rank=4, experts=2)", "l2p(pool=4, length=2, top=2)")
"""Learnt by all tasks alike, and so of a pass."""


@pytest.mark.parametrize(
    "method", [*ABLE, *WHOLE, "probe + replay(size=8)", "finetune + reptile", "adapter(rank=2) + oml"]
)
def test_a_pass_that_was_stopped_and_resumed_equals_an_unbroken_one(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    summary = lab.run(method, tmp_path / "unbroken", online=True)
    lab.broken_run(method, tmp_path / "broken", (0, 2), (0, 5), save_every=1, online=True)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "unbroken")
    config = json.loads((tmp_path / "unbroken/run.json").read_text())["config"]
    assert (config["epochs"], config["online"]) == (1, True)
    assert summary["online"]["images"] == [8, 16, 24, 32, 40, 48]
    assert summary["anytime_acc"] == pytest.approx(sum(summary["online"]["begun"]) / 6)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("lora(rank=2) + ewc", "ewc"),
        ("lora(rank=2) + lwf + replay", "lwf"),
        ("inflora(rank=2)", "inflora"),
        ("lora(rank=2, per_task=True)", "lora"),
        ("lora(rank=2, tasks=1) + ncm", "lora"),
        ("adapter(rank=2, tasks=1)", "adapter"),
        ("probe + align", "align"),
        ("ranpac", "ranpac"),
        ("finetune + icarl", "icarl"),
        ("dualprompt", "dualprompt"),
        ("joint", "joint"),
    ],
)
def test_what_needs_borders_is_refused_by_name_before_anything_is_read(
    method: str, part: str, lab: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=f"^{part} needs to be told where a task begins or ends.*use one of adapter, .*lora, .*replay"
    ):
        lab.run(method, tmp_path / "run", online=True)
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora + replay(selection='herding')"}, "selection='herding' chooses among all images of a task"),
        ({"epochs": 3}, "epochs=3 has no effect with --online"),
        ({"calibrate": 0.1}, "calibrate=0.1 has no effect with --online"),
        ({"stream": "captions_synthetic()", "objective": "retrieve"}, "--online learns streams of labelled images"),
        ({"stream": "synthetic(scenario='task')"}, "scenario='task' tells at test time"),
    ],
)
def test_what_a_pass_cannot_have_is_refused_in_one_line(
    changes: dict[str, Any], message: str, lab: Any, tmp_path: Path
) -> None:
    text = lab.but(objective=changes.get("objective", "classify"))
    with pytest.raises(ValueError, match=message):
        text.run(changes.pop("method", "lora + replay"), tmp_path / "run", online=True, **changes)


@pytest.mark.parametrize("method", [*ABLE, *WHOLE])
def test_no_method_is_told_of_a_border(method: str, lab: Any) -> None:
    """The same images cut into other tasks are the same pass, but for their order within a task."""
    preprocess = lab.backbone().preprocess

    def learnt(borders: bool) -> dict[str, torch.Tensor]:
        parts = build_stream("synthetic(tasks=2, classes_per_task=2, per_class=8)", preprocess, 0)
        whole = as_one(parts, 0).tasks[0]
        if borders:  # one data set that knows of no parts
            sets = whole.train.sets
            pixels = torch.cat([each.__getitems__(range(len(each)))["image"] for each in sets])
            one = type(sets[0]).of(pixels, whole.train.labels, preprocess)
            whole = type(whole)(0, whole.name, whole.classes, whole.names, 1, one, whole.test)
        learner: Core = lab.learner(method)
        learner.online = True
        learner.grow(whole)
        fit_task(learner, whole, lab.train_config(epochs=1))
        return learner.learnt_state()

    one, other = learnt(borders=False), learnt(borders=True)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_memory_is_offered_each_image_once_after_its_step(lab: Any) -> None:
    learner = lab.learner("lora(rank=2) + replay(size=100)")
    learner.online = True
    task = as_one(lab.stream(), 0).tasks[0]
    learner.grow(task)
    fit_task(learner, task, lab.train_config(epochs=1))
    memory = learner.method.parts[1].memory
    assert memory.refs[:, 1].tolist() == list(range(len(task.train)))
    assert torch.equal(memory.refs[:, 2], task.train.labels)


def test_ncm_in_a_pass_ends_with_the_means_of_ncm_task_by_task(lab: Any, tmp_path: Path) -> None:
    online, told = (lab.run("ncm", tmp_path / str(flag), online=flag) for flag in (True, False))
    assert online["acc"] == pytest.approx(told["acc"])
    assert online["online"]["tasks"][-1] == pytest.approx(told["matrix"][-1])


def test_accuracy_along_a_pass_by_hand() -> None:
    rows = [
        Row(0, None, f"online/{n}/{i}", v) for n, vs in ((10, (0.5, 0.0)), (40, (0.2, 0.8))) for i, v in enumerate(vs)
    ]
    found = along([*rows, Row(0, 0, "accuracy", 0.1)], (10, 30))  # of the second task none is seen at 10
    assert found["images"] == [10, 40]
    assert found["tasks"] == [[0.5, 0.0], [0.2, 0.8]]
    assert found["begun"] == pytest.approx([0.5, 0.5])


def test_a_long_pass_is_measured_so_many_times_and_shown_in_the_report(lab: Any, tmp_path: Path) -> None:
    summary = lab.run("ncm", tmp_path / "run", online=True, batch_size=1)
    assert len(summary["online"]["images"]) == POINTS
    assert summary["online"]["images"][-1] == 48
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Accuracy along the pass" in page
    assert "Anytime accuracy" in page


def test_a_configuration_of_a_pass_is_read_back_as_it_was_written() -> None:
    config = RunConfig(stream="synthetic()", online=True)
    assert config.epochs == 1
    assert flags(config.describe()) == ["--epochs", "1", "--stream", "synthetic()", "--online"]
    assert RunConfig(**config.describe() | {"retain": ()}) == config


def test_the_seed_decides_in_which_order_the_images_of_a_task_come(lab: Any) -> None:
    stream = lab.stream()
    orders = [as_one(stream, seed).tasks[0].train.sets for seed in (0, 0, 1)]
    rows = [[each.rows.tolist() for each in sets] for sets in orders]
    assert rows[0] == rows[1]
    assert all(a != b and sorted(a) == sorted(b) for a, b in zip(rows[0], rows[2], strict=True))


def test_what_is_told_of_tasks_beside_each_other_is_not_told_of_a_pass(lab: Any, tmp_path: Path) -> None:
    few = "fewshot(synthetic(classes_per_task=6, per_class=8, test_per_class=4), ways=2, shots=2)"
    summary = lab.run("ncm", tmp_path / "run", online=True, stream=few)
    assert "few_shot" not in summary
    assert len(summary["online"]["tasks"][-1]) == 2
