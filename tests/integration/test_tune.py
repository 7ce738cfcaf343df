"""A search for options: from the command line to a study that goes on after a kill."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest

from perdure.cli.tune import search_lines
from perdure.experiments import tune as tuning
from perdure.experiments.study import JOURNAL, _check_journal, complete_of, open_study
from perdure.options.search_space import parse_space
from perdure.training.config import RunConfig
from perdure.training.loop import Quiet
from perdure.training.snapshots import Interrupted

SPACE = "rank=1..4, lr=1e-3..1e-1 log"


def _config(**other: Any) -> RunConfig:
    given = {
        "stream": "synthetic(tasks=2, per_class=8, test_per_class=8)",
        "backbone": "tiny()",
        "method": "lora(rank=?)",
        "epochs": 1,
        "seed": 100,
    }
    return RunConfig(**(given | other))


class _Told(Quiet):
    """Counts trials, and may stop the search as a kill would."""

    def __init__(self, dies: int = -1) -> None:
        self.options: list[dict[str, Any]] = []
        self.dies = dies

    def trial(self, number: int, total: int, options: Any, best: float | None) -> None:
        self.options.append(dict(options))

    def scores(self, task: Any, rows: Any) -> None:
        if len(self.options) - 1 == self.dies:
            raise SystemExit


def test_a_search_ends_with_the_best_options_and_the_command_to_report_them(perdure: Any) -> None:
    flags = ["--stream", _config().stream, "--backbone", "tiny()", "--method", "lora(rank=?)", "--epochs", "1"]
    flags += ["--space", SPACE, "--trials", "5", "--out", "study"]
    done = perdure("tune", *flags)
    assert done.code == 0, done
    study = json.loads(Path("study/study.json").read_text())
    scores = [row["score"] for row in study["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) + study["pruned"] == 5
    assert study["best"] == study["trials"][0]
    assert not study["importance"] or sum(study["importance"].values()) == pytest.approx(1)
    assert (study["order_seed"], study["report_seeds"]) == (100, [0, 1, 2])
    assert f"lora(rank={study['best']['options']['rank']})" in study["command"]
    assert str(study["best"]["options"]["lr"]) in study["command"]
    assert "--seeds 0 1 2" in study["command"]
    assert done.out.rstrip().endswith(study["command"])
    made = json.loads(Path("study", study["best"]["folder"], "run.json").read_text())
    assert made["config"]["seed"] == 100
    again = perdure("tune", *flags)  # nothing is left to do
    assert "[" not in again.out.partition("trials finished")[0]
    other = perdure("tune", *[flag if flag != SPACE else "rank=1..5, lr=1e-3..1e-1 log" for flag in flags])
    assert other.code != 0
    assert "study holds a study with space=" in other.err
    warned = perdure(
        *("compare", "--stream", _config().stream, "--backbone", "tiny()", "--epochs", "1", "--methods", "probe"),
        *("--seeds", "100", "--out", "study/report"),
    )
    assert "seed 100 is the class order on which study chose the options" in warned.err + warned.out


def test_a_killed_search_goes_on_with_the_trial_that_was_in_work(tmp_path: Path) -> None:
    space, out = parse_space(SPACE), tmp_path / "study"
    killed = _Told(dies=2)
    with pytest.raises(SystemExit):
        tuning.tune(_config(), space, out, trials=4, progress=killed)
    started = {folder.name for folder in out.glob("trial-*")}
    assert len(started) == 3
    with (out / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":')  # the kill came within a line

    def second_kill(*_: Any, **__: Any) -> None:
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optuna.Study.tell", second_kill)  # proposed again, and not yet told that the former one is over
        with pytest.raises(SystemExit):
            tuning.tune(_config(), space, out, trials=4)
    told = _Told()
    found = tuning.tune(_config(), space, out, trials=4, progress=told)
    assert told.options[0] == killed.options[2]
    assert len(told.options) == 2
    assert len(found["trials"]) + found["pruned"] == 4
    assert started < {folder.name for folder in out.glob("trial-*")}
    (out / JOURNAL).write_bytes(b"no json\n")
    with pytest.raises(ValueError, match="line 1: it cannot be read as JSON"):
        tuning.tune(_config(), space, out, trials=4)


@pytest.mark.parametrize("dies", range(4))
def test_a_killed_search_ends_with_the_trials_of_an_unbroken_one(
    dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was killed while options were drawn."""
    space = parse_space(SPACE)
    found = tuning.tune(_config(), space, tmp_path / "unbroken", trials=4)
    with pytest.raises(SystemExit):
        tuning.tune(_config(), space, tmp_path / "killed", trials=4, progress=_Told(dies=dies))

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("optuna.Trial.suggest_float", killed)
        for _ in range(2):
            with pytest.raises(SystemExit):
                tuning.tune(_config(), space, tmp_path / "killed", trials=4)
    again = tuning.tune(_config(), space, tmp_path / "killed", trials=4)
    assert again["trials"] == found["trials"]
    told = [
        [each.intermediate_values for each in complete_of(open_study(optuna, tmp_path / name))]
        for name in ("unbroken", "killed")
    ]
    assert told[0] == told[1]


def test_a_search_that_is_asked_to_stop_says_what_goes_on(tmp_path: Path) -> None:
    class Presses(_Told):
        def step(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"^trial-\w+: stopped after .*; the same command goes on from here$"):
        tuning.tune(_config(), parse_space(SPACE), tmp_path, trials=2, progress=Presses())


def test_a_line_that_a_kill_cut_is_dropped_without_writing_the_others_anew(no_file_above: Any, tmp_path: Path) -> None:
    tuning.tune(_config(), parse_space(SPACE), tmp_path, trials=1)
    whole = (tmp_path / JOURNAL).read_bytes()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":')
    with no_file_above(0):  # where nothing can be written, what was there must stay
        _check_journal(tmp_path / JOURNAL)
    assert (tmp_path / JOURNAL).read_bytes() == whole


def test_nobody_waits_for_the_lock_of_a_killed_search(tmp_path: Path) -> None:
    tuning.tune(_config(), parse_space(SPACE), tmp_path, trials=1)
    for left in ("", "5f.rename"):  # as Optuna calls it, and what it renames it to before it removes it
        (tmp_path / f"{JOURNAL}.lock{left}").touch()
    tuning.tune(_config(), parse_space(SPACE), tmp_path, trials=1)
    assert not list(tmp_path.glob(f"{JOURNAL}.lock*"))


def test_a_study_with_other_options_says_which(tmp_path: Path) -> None:
    tuning.tune(_config(), parse_space(SPACE), tmp_path / "study", trials=1)
    with pytest.raises(ValueError, match=r"holds a study with batch_size=64, not 8: give the same options to go on"):
        tuning.tune(_config(batch_size=8), parse_space(SPACE), tmp_path / "study", trials=1)


def test_a_backbone_that_cannot_be_is_a_trial_that_failed(tmp_path: Path) -> None:
    config, space = _config(method="probe", backbone="tiny(dim=?)"), parse_space("dim=8..16")
    found = tuning.tune(config, space, tmp_path / "study", trials=6)
    assert found["failed"]
    assert {row["options"]["dim"] % 4 for row in found["trials"]} == {0}


def test_data_that_goes_away_ends_the_search_and_counts_no_trial_as_failed(tmp_path: Path) -> None:
    from PIL import Image

    def photos() -> None:
        for name, colour in (("a", "red"), ("b", "blue")):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            for index in range(6):
                Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / name / f"{index}.png")

    class Removes(_Told):
        def trial(self, number: int, total: int, options: Any, best: float | None) -> None:
            super().trial(number, total, options, best)
            if len(self.options) == 2:
                shutil.rmtree(tmp_path / "photos")

    photos()
    config, out = _config(stream=f'images(path="{tmp_path}/photos", tasks=2)'), tmp_path / "study"
    with pytest.raises(ValueError, match="photos"):
        tuning.tune(config, parse_space(SPACE), out, trials=3, progress=Removes())
    photos()
    found = tuning.tune(config, parse_space(SPACE), out, trials=3, progress=_Told())
    assert (len(found["trials"]) + found["pruned"], found["failed"]) == (3, [])


@pytest.mark.parametrize(
    ("space", "other", "said"),
    [
        (SPACE, {"seed": 1}, "--order-seed 1 is among --report-seeds 0 1 2"),
        ("rank=0..4, lr=1e-3..1e-1", {}, "option rank=0"),
        ("lr=1e-3..1e-1", {}, "leaves rank open"),
        (SPACE, {"method": "lora(rang=?rank)"}, "has no option 'rang'"),
        ("rank=1..4, lr=0..1", {}, "lr=0"),
        ("rank=1..4, epochs=1..2", {"epochs": 3}, "epochs=3 has no effect: the space searches epochs; leave it out"),
        (SPACE, {"lr": 0.1}, "lr=0.1 has no effect: the space searches lr; leave it out"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_the_first_trial(
    tmp_path: Path, space: str, other: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tuning.tune(_config(**other), parse_space(space), tmp_path / "study", trials=2, progress=_Told())
    assert not list(tmp_path.glob("study/trial-*"))


def test_a_trial_worse_than_the_others_is_given_up(tmp_path: Path) -> None:
    space = parse_space("lr=[1e-1, 1e-9], batch_size=4..6")
    stream = "synthetic(tasks=3, per_class=12, test_per_class=8, classes_per_task=2, scenario='task')"
    config = _config(epochs=8, stream=stream, method="probe")
    found = tuning.tune(config, space, tmp_path / "s", trials=14, progress=_Told())
    assert found["pruned"] > 0
    assert found["best"]["options"]["lr"] == 1e-1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"stream": 'sequence(images(path="a"), images(path="b"), images(path="c"))'}, "has one order of tasks with"),
        ({"vary": "start"}, "--vary start leaves the order of tasks as it is"),
    ],
)
def test_options_are_not_chosen_on_the_order_that_is_reported(
    photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], why: str
) -> None:
    """Though the seeds differ: their order does not."""
    monkeypatch.chdir(tmp_path)
    for folder in "abc":
        photos(folder, "cat dog")
    with pytest.raises(ValueError, match=why):
        tuning.tune(_config(**given), parse_space(SPACE), tmp_path / "study", trials=1)
    if "stream" in given:
        own = given["stream"].removesuffix(")") + ', order="seed")'
        found = tuning.tune(_config(stream=own), parse_space(SPACE), tmp_path / "own", trials=1)
        assert len(found["trials"]) == 1


def test_one_trial_is_no_trials() -> None:
    found = {"trials": [{"score": 0.5, "options": {"rank": 2}}], "pruned": 0, "failed": [], "importance": {}}
    assert search_lines(found | {"command": "perdure compare"})[0].startswith("1 trial finished, 0 given up early")


def test_a_setting_beside_which_others_stand_may_be_given_where_it_is_searched(tmp_path: Path) -> None:
    config = _config(schedule="step", milestones="1", epochs=2)
    space = parse_space('rank=1..2, schedule=["step", "constant"]')
    assert len(tuning.tune(config, space, tmp_path / "study", trials=1)["trials"]) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"vary": "images"}, "Add order"), ({"shard": "blocks"}, "none of the first 3 trials could be run")],
)
def test_a_refused_search_can_be_corrected_in_the_same_folder(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    study = tmp_path / "study"
    with pytest.raises(ValueError, match=said):
        tuning.tune(_config(**wrong), parse_space(SPACE), study, trials=4)
    assert not study.exists()
    assert len(tuning.tune(_config(), parse_space(SPACE), study, trials=1)["trials"]) == 1
