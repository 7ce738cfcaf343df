"""Figures: what is drawn, whether it can be read as text, and whether files for papers are written."""

import math
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perdure.reporting import figures
from perdure.reporting.figures import COLOURS, Point, Series, curves, front, matrix, scatter


def axes(drawing: figures.Drawing):
    return drawing.figure.axes[0]


def trade(points: list[Point]) -> figures.Drawing:
    return scatter("Accuracy against bytes", points, "bytes", lambda value: f"{value:.0f} B")


def test_the_front_has_what_no_other_beats_at_that_cost() -> None:
    points = [Point("a", 10, 0.3), Point("b", 20, 0.2), Point("c", 30, 0.5), Point("d", 30, 0.4), Point("e", 40, 0.5)]
    assert [p.name for p in front(points)] == ["a", "c"]
    assert [p.name for p in front([Point("twice", 1, 0.5), Point("the same", 1, 0.5)])] == ["twice"]


def test_every_method_is_named_with_its_numbers_and_the_best_are_spoken() -> None:
    draw = random.Random(0)
    points = [Point(f"m{i}(at='kv') & <x> $y$", 10 ** draw.uniform(5, 6.5), draw.random(), 0.01) for i in range(30)]
    page = str(trade(points).inline())
    root = ElementTree.fromstring(page)  # well-formed, whatever the names hold
    shown = ["".join(text.itertext()) for text in root.iter("text")]
    assert all(any(p.name in text and f"{100 * p.share:.1f} ± 1.0 %" in text for text in shown) for p in points)
    assert all(f"{p.name}: {100 * p.share:.1f} % at {p.cost:.0f} B" in root.attrib["aria-label"] for p in front(points))


@pytest.mark.parametrize("costs", [[7.0], [7.0, 7.0], [0.0, 0.0], [0.0, 5.0], [3.0, 3.1], [1.0, 10.0, 1e11]])
def test_costs_are_logarithmic_where_they_span_a_decade_and_any_can_be_drawn(costs: list[float]) -> None:
    drawing = trade([Point(str(i), cost, 0.5) for i, cost in enumerate(costs)])
    assert axes(drawing).get_xscale() == ("log" if min(costs) > 0 and max(costs) >= 10 * min(costs) else "linear")
    assert "nan" not in drawing.inline()
    assert re.search(r">\d+ B<", drawing.inline())


def test_a_line_breaks_nothing_with_gaps_one_task_or_many_series() -> None:
    for values, labels in (([0.5, None, 0.25], ["a", "b", "c"]), ([0.5], ["a"]), ([None, None], ["a", "b"])):
        drawing = curves("x", [Series(f"s{i}", values, [None] * len(values)) for i in range(30)], labels)
        drawn = [line.get_ydata() for line in axes(drawing).lines]
        assert len(drawn) == 30
        assert [None if math.isnan(v) else v / 100 for v in drawn[0]] == values
        assert drawing.inline().count("var(--c7)") > 0


def test_axes_start_at_zero_when_asked_and_end_at_all_only_for_shares() -> None:
    high = [Series("s", [0.92, 0.95])]
    assert axes(curves("x", high, ["a", "b"])).get_ylim()[0] > 80
    assert axes(curves("x", high, ["a", "b"], zero=True)).get_ylim()[0] == 0
    far = [Series("s", [0.1, 3.4])]
    assert axes(curves("x", far, ["a", "b"])).get_ylim()[1] <= 102
    assert axes(curves("x", far, ["a", "b"], share=False)).get_ylim()[1] > 340
    still = [Series("s", [None, 0.0])]
    assert axes(curves("x", still, ["a", "b"], zero=True)).get_ylim() == (0, 1)


def test_the_page_colours_its_figures_itself_and_their_bytes_are_always_the_same() -> None:
    one, other = (curves("x", [Series("s", [0.1, 0.9], [0.1, 0.1])], ["a", "b"]).inline() for _ in range(2))
    assert one == other
    assert not re.search("|".join(COLOURS), one)
    assert "<metadata>" not in one
    assert 'id="axes' not in one


def test_figures_are_written_as_files_that_say_what_they_are(tmp_path: Path) -> None:
    drawing = matrix("Scores", [[0.5, None], [0.25, 1.0]], ["猫", "b"])
    for kind, head in (("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")):
        drawing.save(tmp_path / f"m.{kind}")
        assert (tmp_path / f"m.{kind}").read_bytes().startswith(head)
    assert ">25.0<" in (tmp_path / "m.svg").read_text()
