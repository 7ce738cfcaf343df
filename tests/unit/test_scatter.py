"""Accuracy against a cost: which trade-offs are best, and whether every method can be told from the others."""

import random
import re
from xml.etree import ElementTree

import pytest

from perdure.scatter import Cost, Point, front, scatter, standalone

BYTES = Cost("bytes", tuple(k * 10**p for p in range(12) for k in (1, 2, 5)), lambda value: f"{value:.0f} B")


def crowd(count: int, seed: int = 0) -> list[Point]:
    """Methods of the usual names, most of them close together."""
    draw = random.Random(seed)
    return [
        Point(f"method_{i}(rank={i}, keep=0.{i})", 10 ** draw.uniform(5, 6.5), draw.gauss(0.2, 0.02), 0.01)
        for i in range(count)
    ]


def boxes(figure: str) -> list[tuple[float, float, float, float]]:
    """Where the names beside points stand."""
    found = re.findall(r'<text class="\w+" x="([\d.]+)" y="([\d.]+)"><title>[^<]*</title>([^<]*)<', figure)
    return [(float(x), float(y) - 11, float(x) + 7.3 * len(text), float(y) + 4) for x, y, text in found]


def test_the_front_has_what_no_other_beats_at_that_cost() -> None:
    points = [Point("a", 10, 0.3), Point("b", 20, 0.2), Point("c", 30, 0.5), Point("d", 30, 0.4), Point("e", 40, 0.5)]
    assert [p.name for p in front(points)] == ["a", "c"]
    assert [p.name for p in front([Point("twice", 1, 0.5), Point("the same", 1, 0.5)])] == ["twice"]


@pytest.mark.parametrize("count", [2, 8, 26, 40])
def test_names_cover_neither_each_other_nor_a_point_and_every_method_is_named(count: int) -> None:
    points = crowd(count)
    figure = str(scatter("Accuracy against bytes", points, BYTES))
    names = boxes(figure)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])
        for x, y in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', figure):
            assert not (one[0] < float(x) < one[2] and one[1] < float(y) < one[3])
    assert all(min(left, top) >= 0 and right <= 920 and bottom <= 500 for left, top, right, bottom in names)
    # beside its point, or by its number in the list below
    shown = re.sub(r"<title>[^<]*</title>", "", figure)
    assert all(point.name in shown for point in points)
    assert all(re.search(rf'class="front"[^>]*><title>{re.escape(p.name)}<', figure) for p in front(points))


def test_the_best_are_marked_and_spoken() -> None:
    figure = str(
        scatter("Title", [Point("cheap", 10, 0.2, 0.01), Point("good", 30, 0.4), Point("bad", 40, 0.1)], BYTES)
    )
    assert figure.count('class="best"') == 2
    assert 'aria-label="Title. Best trade-offs: cheap: 20.0 % at 10 B; good: 40.0 % at 30 B"' in figure
    assert "<title>cheap: 20.0 ± 1.0 %, 10 B</title>" in figure


def places(costs: list[float]) -> list[float]:
    figure = str(scatter("t", [Point(str(i), cost, 0.5) for i, cost in enumerate(costs)], BYTES))
    return [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', figure)]


def test_costs_that_span_a_decade_stand_logarithmically_and_others_do_not() -> None:
    one, ten, hundred = places([1, 10, 100])
    assert ten - one == pytest.approx(hundred - ten, abs=0.2)
    one, two, four = places([1, 2, 4])
    assert four - two == pytest.approx(2 * (two - one), abs=0.3)


@pytest.mark.parametrize("costs", [[7.0], [7.0, 7.0], [0.0, 0.0], [0.0, 5.0], [3.0, 3.1], [1.0, 1e11]])
def test_any_costs_can_be_drawn_with_ticks(costs: list[float]) -> None:
    figure = str(scatter("t", [Point(str(i), cost, 0.5) for i, cost in enumerate(costs)], BYTES))
    assert "nan" not in figure
    assert re.search(r'text-anchor="middle">\d+ B<', figure)
    assert all(52 <= x <= 904 for x in places(costs))


def test_the_file_is_well_formed_and_has_its_colours() -> None:
    text = standalone(scatter('a < b & "c"', [*crowd(9), Point('x(at="kv") & <y>', 1e5, 0.3)], BYTES))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "--paper" in (root[0].text or "")
    assert root[1].text == 'a < b & "c"'
