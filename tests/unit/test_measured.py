"""Rows made of finished runs say what the runs' files say, and only runs that were measured alike stand together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perdure.metrics import new_task_acc
from perdure.reporting.runs import steps_of
from perdure.reporting.tables import settings_of
from perdure.storage.files import write_sealed
from perdure.training.config import RunConfig
from perdure.training.run import run


@pytest.fixture(scope="module")
def grid(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, and a run of another setting."""
    out = tmp_path_factory.mktemp("grid")
    for seed in (0, 1):
        lab.run("probe", out / f"probe{seed}", seed=seed)
        lab.run("probe + replay(size=6)", out / f"replay{seed}", seed=seed)
    lab.run("probe", out / "longer", epochs=3)
    (out / "steps.json").write_text(json.dumps({"options": {}, "methods": {"probe": {"ratio": 0.1}}}))
    return out


def test_runs_measured_alike_stand_together(grid: Path) -> None:
    first, second = sorted(settings_of([grid]), key=lambda s: -len(s["rows"]))
    assert [(r["method"], r["seeds"]) for r in first["rows"]] == [("probe", [0, 1]), ("probe + replay(size=6)", [0, 1])]
    assert [(r["method"], r["seeds"]) for r in second["rows"]] == [("probe", [0])]
    assert (first["training"]["epochs"], second["training"]["epochs"]) == (2, 3)
    assert (first["tasks"], first["classes"], first["scenario"]) == (3, 6, "class")
    assert [r["step"] for r in first["rows"]] == [{"ratio": 0.1}, None]


def test_scores_and_bytes_after_each_task_are_those_of_the_files(grid: Path) -> None:
    rows = {r["method"]: r for r in settings_of([grid], [0])[1]["rows"]}
    assert rows.keys() == {"probe", "probe + replay(size=6)"}
    summary = json.loads((grid / "replay0" / "summary.json").read_text())
    row = rows["probe + replay(size=6)"]
    assert [pair[0] for pair in row["after"]["stored_bytes"]][-1] == summary["stored_bytes"]
    sizes = [(grid / f"replay0/task-00{i}/learner.safetensors").stat().st_size for i in range(3)]
    assert row["after"]["stored_bytes"][0][0] > sizes[0]
    assert row["referenced_bytes"] > 0 == rows["probe"]["referenced_bytes"]
    matrix = summary["matrix"]
    assert [pair[0] for pair in row["after"]["acc"]] == pytest.approx(
        [sum(matrix[i][: i + 1]) / (i + 1) for i in range(3)]
    )
    assert row["after"]["forgetting"][0] is None
    assert row["after"]["forgetting"][-1][0] == pytest.approx(summary["forgetting"])
    assert row["after"]["new_task_acc"][-1][0] == pytest.approx(sum(matrix[i][i] for i in range(3)) / 3)


def test_of_two_runs_of_a_method_and_seed_the_later_one_counts(grid: Path, lab: Any, tmp_path: Path) -> None:
    lab.run("probe", tmp_path / "again")
    for task in (tmp_path / "again").glob("task-*"):  # whose manifests would know better
        shutil.rmtree(task)
    for name, day in (("run.json", "2099-01-01T00:00:00+00:00"), ("summary.json", None)):
        path = tmp_path / "again" / name
        content = json.loads(path.read_text())
        write_sealed(path, content | ({"created": day} if day else {"seconds_per_task": [{"train": 1000.0}]}))
    for folders in ([grid / "probe0", tmp_path], [tmp_path, grid / "probe0"]):
        (only,) = settings_of(folders)
        assert only["rows"][0]["seeds"] == [0]
        assert only["rows"][0]["seconds"][0] == 1000


def test_the_command_measures_the_setting_again_and_paths_can_be_shortened(
    grid: Path, tmp_path: Path, lab: Any
) -> None:
    config = lab.config("probe").describe()
    stream = f'images(path="{tmp_path}/photos", tasks=2)'
    for i, name in enumerate(("cat", "dog", "ant", "bee")):
        picture(tmp_path / "photos" / name, i)
    run(RunConfig(**config | {"stream": stream}), tmp_path / "out")
    (full,) = settings_of([tmp_path / "out"])
    (short,) = settings_of([tmp_path / "out"], shorten=True)
    assert full["stream"] == stream
    assert short["stream"] == 'images(path="photos", tasks=2)'
    assert f"--stream '{short['stream']}'" in short["command"]
    assert str(tmp_path) not in json.dumps(short)
    assert "--method " not in short["command"]
    assert "--retain" not in short["command"]
    for task in (tmp_path / "out").glob("task-*"):
        shutil.rmtree(task)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    record["config"]["retain"] = ["one()", "two(size=3)"]
    write_sealed(tmp_path / "out" / "run.json", record)
    assert " --retain 'one()' 'two(size=3)'" in settings_of([tmp_path / "out"])[0]["command"]


def picture(folder: Path, shade: int) -> None:
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * shade, 20 * i, 90)).save(folder / f"{i}.png")


def test_folders_without_a_finished_run_are_refused(tmp_path: Path, lab: Any) -> None:
    with pytest.raises(ValueError, match=r"no finished run in .*: give folders that 'perdure compare'"):
        settings_of([tmp_path])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"methods": {}}',
        b'{"options": [], "methods": []}',
        b'{"options": {}, "methods": {"probe": 3}}',
        b'{"options": {}, "methods": {"probe": {}}}',
        b'{"options": {}, "methods": {"probe": {"ratio": "1.2"}}}',
    ],
)
def test_a_damaged_steps_file_is_named(content: bytes, tmp_path: Path) -> None:
    assert steps_of(tmp_path)["methods"] == {}
    (tmp_path / "steps.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"steps\.json is damaged: .*; remove it, the grid's command"):
        steps_of(tmp_path)


def test_new_task_accuracy_is_the_mean_of_the_diagonal_and_unknown_when_one_is_missing() -> None:
    assert new_task_acc([[0.9, None], [0.1, 0.5]]) == pytest.approx(0.7)
    assert new_task_acc([[0.9, None], [0.1, None]]) is None
    assert new_task_acc([]) is None
