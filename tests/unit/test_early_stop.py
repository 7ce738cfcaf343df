"""Early stopping on held-out training images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.api.learner import Learner
from perdure.core import checkpoint
from perdure.evaluation.calibration import set_apart
from perdure.training.config import RunConfig
from perdure.training.early_stop import EarlyStop

EARLY: dict[str, Any] = {"epochs": 12, "early_stop": 2, "early_stop_share": 0.25, "lr": 5e-2, "schedule": "constant"}


def test_a_task_ends_when_the_held_out_loss_falls_no_more(lab: Any, tmp_path: Path) -> None:
    found = lab.run("lora(rank=2)", tmp_path / "run", **EARLY)
    stops = found["early_stop"]
    assert (stops["patience"], stops["share"], stops["images"]) == (2, 0.25, [4, 4, 4])
    for losses, epochs in zip(stops["losses"], stops["epochs"], strict=True):
        best = losses.index(min(losses))
        assert epochs == len(losses) == min(best + 3, 12)
    assert min(stops["epochs"]) < 12
    done = checkpoint.whole(tmp_path / "run")
    assert [each.manifest["images"] for each in done] == [12 * epochs for epochs in stops["epochs"]]
    taught = [checkpoint.beside(each, "taught.safetensors")["hashes"] for each in done]
    assert [len(hashes) for hashes in taught] == [12, 12, 12]  # of 16 each


@pytest.mark.parametrize("places", [[(0, 3)], [(1, 4)], [(1, 9), (2, 2)]])
def test_a_run_that_goes_on_stops_where_it_would_have(lab: Any, content_of: Any, tmp_path: Path, places: Any) -> None:
    lab.run("lora(rank=2) + replay(size=6)", tmp_path / "whole", **EARLY, save_every=1)
    lab.broken_run("lora(rank=2) + replay(size=6)", tmp_path / "broken", *places, **EARLY, save_every=1)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


def test_patience_counts_from_the_lowest_loss(lab: Any) -> None:
    learner = lab.learner("lora(rank=2)")
    task = lab.stream().tasks[0]
    learner.grow(task)
    watch = EarlyStop(learner, task.test, 2)
    ended = []
    for losses in ([3.0], [3.0, 2.0], [3.0, 2.0, 2.5], [3.0, 2.0, 2.5, 2.0], [3.0, 2.0, 2.5, 1.9]):
        watch.losses = losses
        ended.append(watch.over())
    assert ended == [False, False, False, True, False]


def test_the_loss_is_that_of_the_objective_and_changes_nothing(lab: Any) -> None:
    learner = lab.learner("lora(rank=2)")
    task = lab.stream().tasks[0]
    learner.grow(task)
    lab.descend(learner, task)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    watch = EarlyStop(learner, task.test, 1)
    watch.epoch()
    with torch.no_grad():
        features = learner.encode(task.test.__getitems__(range(len(task.test))))
        expected = torch.nn.functional.cross_entropy(learner.objective.scores(features), task.test.labels)
    assert watch.losses == [pytest.approx(float(expected), rel=1e-5)]
    assert learner.training
    assert all(value.equal(before[name]) for name, value in learner.state_dict().items())


def test_what_is_held_out_for_it_is_not_what_calibrates(lab: Any) -> None:
    learner, task = lab.learner("lora(rank=2)"), lab.stream().tasks[0]
    learner.calibrate = 0.25
    rest, watched = set_apart(learner, task, 0.25, "early_stop_share")
    rest, held = set_apart(learner, rest)
    rows = [{*data.rows.tolist()} for data in (rest.train, watched, held)]
    assert sum(map(len, rows)) == len(task.train) == len(set.union(*rows))


def test_a_learner_in_python_stops_early_too() -> None:
    images = torch.randint(0, 255, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    learner = Learner.create("tiny()", "lora(rank=2)", batch_size=8, lr=5e-2, schedule="constant", precision="fp32")
    learner.learn(images, ["cat", "dog"] * 12, epochs=30, early_stop=1)
    assert learner._facts["images"] < 30 * 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stop": 5}, "early_stop=5 has no effect within epochs=5: give fewer, or more epochs"),
        ({"early_stop_share": 0.2}, "early_stop_share=0.2 has no effect without early_stop"),
        ({"early_stop": 2, "online": True}, "early_stop=2 has no effect with --online|within epochs=1"),
        ({"early_stop": 2, "early_stop_share": 0.9}, "early_stop_share=0.9: expected float from 0.01 to 0.5"),
    ],
)
def test_what_has_no_effect_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(stream="synthetic()", **options)


def test_who_trains_nothing_cannot_stop_early(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early_stop=2 has no effect on ncm, which trains nothing: leave it out"):
        lab.run("ncm", tmp_path / "run", epochs=4, early_stop=2)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(ValueError, match=r"^early_stop has no effect where no classes are scored: leave it out$"):
        lab.but(objective="retrieve").run("lora(rank=2)", tmp_path / "captions", epochs=4, early_stop=2)


ASIDE = ["lora_experts(rank=2)", "hide_lora(rank=2)", "disco(rank=2)", "modal_prompt", "pnn(rank=2)", "head_gates"]


@pytest.mark.parametrize("spec", [*ASIDE, "lora(rank=2)", "coda_prompt(components=4)", "finetune"])
def test_the_loss_is_that_of_what_learns(spec: str, lab: Any) -> None:
    learner = lab.learner(spec)
    for task in lab.stream().tasks[:2]:
        learner.grow(task)
        lab.descend(learner, task)
        before = held_out_loss(learner, task)
        assert held_out_loss(learner, task) == before, "measuring changes nothing"
        with torch.no_grad():
            for name, parameter in learner.trainable().items():
                if not name.startswith("objective."):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert held_out_loss(learner, task) != before
        assert all(module.training for module in learner.method.modules())
        learner.method.end_task(learner, task)
        learner.learnt += 1


def held_out_loss(learner: Any, task: Any) -> float:
    watch = EarlyStop(learner, task.test, 1)
    watch.epoch()
    return watch.losses[-1]


@pytest.mark.parametrize("spec", ["moe_adapters", "inflora(rank=2, end_moments='training')"])
def test_who_counts_what_it_trains_on_cannot_stop_early(spec: str, lab: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"early_stop=2: .* counts what is encoded in the steps"):
        lab.run(spec, tmp_path / "run", **EARLY)
