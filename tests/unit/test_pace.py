"""How long a grid will still take."""

import time

import pytest

from perdure.cli.eta import Pace


def test_time_left_is_as_foretold_or_judged_by_the_runs_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    first, second = Pace(0, 4, "lora"), Pace(1, 4, "lora", foretold=60.0)
    assert (first.left(), second.left()) == (None, 60.0)
    first.begin(0, 2)
    first.within = 0.5
    now = 110.0
    assert first.share == pytest.approx(1 / 16)
    assert first.left() == pytest.approx(30 + 3 * 40)
    assert second.left() == 50.0
    now = 300.0
    assert second.left() == 0.0
    resumed = Pace(0, 1, "lora")
    resumed.begin(1, 2)
    assert resumed.left() is None
    resumed.within = 0.5
    now = 310.0
    assert resumed.left() == pytest.approx(10.0)
