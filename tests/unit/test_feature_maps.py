"""Pictures of test features before and after each task: the features are those of the time, the same every time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn import functional as F

from perdure.api import feature_maps
from perdure.api.feature_maps import draw_features
from perdure.api.learner import Learner
from perdure.reporting.figures import Cloud, clouds, without_glyphs

pytest.importorskip("sklearn", reason="pictures of features need scikit-learn")


@pytest.fixture(scope="module")
def runs(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run whose features move, and one whose do not."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in (("moved", "lora(rank=2)"), ("still", "ncm")):
        lab.but(tasks=2, per_class=6, epochs=1).run(method, root / name)
    return {name: root / name for name in ("moved", "still")}


def test_each_picture_is_of_the_features_before_and_after_its_task(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Any
) -> None:
    mapped: list[np.ndarray[Any, Any]] = []

    def places(rows: np.ndarray[Any, Any], start: Any) -> np.ndarray[Any, Any]:
        mapped.append(rows)
        return rows[:, :2]

    monkeypatch.setattr(feature_maps, "_map", places)
    files = draw_features(runs["moved"], tmp_path)
    assert [file.name for file in files[::3]] == ["features-moved-01.svg", "features-moved-02.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
    stream = lab.but(tasks=2, per_class=6).stream()
    first, both = stream.tasks[0].test, [task.test for task in stream]
    untaught, taught = Learner.untaught(runs["moved"]), Learner.load(runs["moved"])

    def features(learner: Learner, sets: list[Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([F.normalize(learner.features(data)[0], dim=1).numpy() for data in sets])

    assert np.allclose(mapped[0], features(untaught, [first]), atol=1e-6)
    assert np.allclose(mapped[3], features(taught, both), atol=1e-6)
    assert np.allclose(mapped[1], mapped[2][: len(mapped[1])], atol=1e-6)  # after the first is before the second
    assert not np.allclose(mapped[2], mapped[3], atol=1e-3)


def test_a_picture_has_bounded_points_and_is_the_same_every_time(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_maps, "POINTS", 10)
    once, again = (draw_features(runs["moved"], tmp_path / name) for name in ("once", "again"))
    assert [file.read_bytes() for file in once[::3]] == [file.read_bytes() for file in again[::3]]
    assert once[-1].with_suffix(".svg").read_text().count("<use ") <= 2 * (10 + 3)


def test_features_that_never_move_are_drawn_once_and_it_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    files = draw_features(runs["still"], tmp_path)
    assert "before and after: no feature moved" in files[0].read_text()
    assert "before and after: no feature moved" not in draw_features(runs["moved"], tmp_path)[0].read_text()


def test_a_legend_lists_what_it_has_room_for() -> None:
    groups = [Cloud("earlier tasks", np.arange(3)), *(Cloud(f"类别{i}", np.array([3 + i])) for i in range(40))]
    drawing = clouds("title", {"before": np.random.default_rng(0).normal(size=(43, 2))}, groups)
    legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert legend == ["earlier tasks", *(f"类别{i}" for i in range(31)), "and 9 more"]
    assert without_glyphs(["abc é"]) == ""
    assert without_glyphs(["\U0010fffd"]) in ("", "\U0010fffd")


def test_what_cannot_be_drawn_is_told(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perdure.cli import main as cli

    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(runs["moved"]), "--features"])
    assert "--features needs a folder for the pictures: give --figures DIR too" in capsys.readouterr().err
    words = ["report", str(runs["moved"]), "--figures", str(tmp_path), "--features", "--out", str(tmp_path / "r.html")]
    cli.main([*words, "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum("figure" in line for line in told) == 6
    monkeypatch.setattr(feature_maps, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need scikit-learn: pip install 'perdure\[figures\]'"):
        draw_features(runs["moved"], tmp_path)
