"""Accuracy against a cost as SVG: one point a method, the best trade-offs joined by a line and named.

Unlike in `perdure.charts`, all text stands in the SVG, so that it is also a file of its own; names are put where they
cover neither each other nor a point, and those for which there is no room are numbered and listed below.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from perdure.charts import percent

_WIDTH, _HEIGHT = 920.0, 500.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 16.0, 52.0
_LETTER, _LINE = 7.3, 15.0  # of 12 px monospace: width of a letter, height of a line
_LONGEST = 44  # letters of a name
_COLUMN = 46 * _LETTER  # of the list below


@dataclass(frozen=True)
class Point:
    """A method: what it costs and how well it does."""

    name: str
    cost: float
    share: float
    spread: float | None = None
    """Standard deviation of the share."""


@dataclass(frozen=True)
class Cost:
    """An axis: where its ticks may stand, and what they say."""

    title: str
    ticks: tuple[float, ...]
    text: Callable[[float], str]


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * high if wide > 0 and high > 0 else 0.0


STYLE = """
.scatter text { font: 12px ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  fill: var(--quiet); stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; }
.scatter .front { fill: var(--ink); font-weight: 600; }
.scatter .axis text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
.scatter .axis line { stroke: var(--line); }
.scatter .stairs { fill: none; stroke: var(--bar); stroke-width: 1.5; stroke-dasharray: 5 4; }
.scatter .spread { stroke: var(--quiet); opacity: .45; }
.scatter .lead { stroke: var(--quiet); stroke-width: .7; }
.scatter circle { fill: var(--paper); stroke: var(--quiet); stroke-width: 1.5; }
.scatter circle.best { fill: var(--bar); stroke: var(--bar); }
"""
"""What the classes look like; the colours are variables of the page."""

_COLOURS = """
svg { --paper: #fdfdfc; --ink: #1d2126; --quiet: #5b636d; --line: #dfe2e6; --bar: #3a7db4; background: var(--paper); }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181c; --ink: #e4e7ea; --quiet: #9aa4ae; --line: #30363d; --bar: #5b9fd3; } }
"""


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front by rising cost: those for which no other costs less or as much and scores more or as much.

    Of points that are equal in both, the first one stays.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.share)):
        if not best or point.share > best[-1].share:
            best.append(point)
    return best


def scatter(title: str, points: Sequence[Point], cost: Cost) -> Markup:
    """The points with axes, names, spreads and the Pareto front.

    Args:
        title: what the figure shows; read out by screen readers.
        points: at least one, with shares in [0, 1]; a cost is logarithmic where it spans a decade or more.
        cost: the axis below.
    """
    best = front(points)
    places, x_ticks = _columns([p.cost for p in points], cost)
    y, y_ticks = _rows(points)
    spots = {id(p): (x, y(p.share)) for p, x in zip(points, places, strict=True)}
    names, listed = _named(points, best, spots)
    per_line = max(1, int((_WIDTH - _LEFT) // _COLUMN))
    lines = math.ceil(len(listed) / per_line)
    height = _HEIGHT + _LINE * lines + (8 if lines else 0)
    body = [_axes(x_ticks, [(y(t), f"{percent(t, 0)} %") for t in y_ticks], cost.title)]
    body += [_spread(p, spots[id(p)][0], y) for p in points if p.spread]
    body.append(Markup('<path class="stairs" d="{}"/>').format(_stairs([spots[id(p)] for p in best])))
    body += [_dot(p, spots[id(p)], p in best, cost) for p in points]
    body += names
    body += [
        Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(
            _LEFT + (i % per_line) * _COLUMN, _HEIGHT + 12 + _LINE * (i // per_line), f"{number} {_cut(name)}"
        )
        for i, (number, name) in enumerate(listed)
    ]
    spoken = "; ".join(f"{p.name}: {percent(p.share)} % at {cost.text(p.cost)}" for p in best)
    return Markup(
        '<svg class="scatter" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}"><title>{}</title>{}</svg>'
    ).format(_WIDTH, height, f"{title}. Best trade-offs: {spoken}", title, Markup("").join(body))


def standalone(figure: Markup) -> str:
    """`figure` as the content of an SVG file, light or dark as the reader has it."""
    head, _, rest = str(figure).partition("<title>")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}<style>{_COLOURS}{STYLE}</style><title>{rest}\n"


def _columns(costs: Sequence[float], cost: Cost) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each cost stands, and the ticks."""
    low, high = min(costs), max(costs)
    decades = low > 0 and high >= 10 * low
    bend: Callable[[float], float] = math.log10 if decades else float
    margin = 0.06 * ((bend(high) - bend(low)) or (0.5 if decades else high or 1.0))
    start, end = bend(low) - margin, bend(high) + margin
    if not decades:
        start = max(start, 0.0)

    def x(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (bend(value) - start) / (end - start), 1)

    fitting = [tick for tick in cost.ticks if tick > 0 and start <= bend(tick) <= end]
    if not decades and len(fitting) < 3:
        step = 10 ** math.floor(math.log10((end - start) / 2))
        step *= next(k for k in (1, 2, 5, 10) if (end - start) / (k * step) <= 7)
        fitting = [step * i for i in range(math.ceil(start / step), math.floor(end / step) + 1)]
    while len(fitting) > 9:
        fitting = fitting[::2]
    return [x(value) for value in costs], [(x(tick), cost.text(tick)) for tick in fitting]


def _rows(points: Sequence[Point]) -> tuple[Callable[[float], float], list[float]]:
    """The vertical scale, and its ticks."""
    low = max(0.0, min(p.share - (p.spread or 0.0) for p in points))
    high = min(1.0, max(p.share + (p.spread or 0.0) for p in points))
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 7 * s)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 2)

    def y(share: float) -> float:
        inner = _HEIGHT - _TOP - _BOTTOM
        return round(_TOP + inner * (last * step - share) / ((last - first) * step), 1)

    return y, [i * step for i in range(first, last + 1)]


def _named(
    points: Sequence[Point], best: Sequence[Point], spots: dict[int, tuple[float, float]]
) -> tuple[list[Markup], list[tuple[int, str]]]:
    """Names beside their points; and the numbers and names of those that find no room, with the numbers beside them."""
    dots = [_Box(x - 7, y - 7, x + 7, y + 7) for x, y in spots.values()]
    taken: list[_Box] = []
    drawn: list[Markup] = []
    listed: list[tuple[int, str]] = []
    rest = sorted((p for p in points if p not in best), key=lambda p: -p.share)
    for point in [*sorted(best, key=lambda p: -p.share), *rest]:
        x, y = spots[id(point)]
        text, leading = _cut(point.name), point in best
        place = _room(x, y, text, dots, taken, leading, leading)
        if place is None:
            listed.append((len(listed) + 1, point.name))
            text = str(len(listed))
            place = _room(x, y, text, dots, taken, far=True)
            if place is None:
                continue
        taken.append(place)
        if (distance := _apart(x, y, place)) > 16:
            edge = min(max(x, place.left), place.right), min(max(y, place.top), place.bottom)
            drawn.append(
                Markup('<line class="lead" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
                    x + 6 * (edge[0] - x) / distance, y + 6 * (edge[1] - y) / distance, *edge
                )
            )
        kind = "front" if leading else "other"
        drawn.append(
            Markup('<text class="{}" x="{:.1f}" y="{:.1f}"><title>{}</title>{}</text>').format(
                kind, place.left, place.bottom - 4, point.name, text
            )
        )
    return drawn, listed


_AROUND = ((1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1))
_ABOVE = ((1, -1), (-1, -1), (0, -1), (-1, 0), (1, 1), (1, 0), (-1, 1), (0, 1))  # beside the line of the front


def _room(
    x: float, y: float, text: str, dots: Sequence[_Box], taken: Sequence[_Box], far: bool, best: bool = False
) -> _Box | None:
    """The first place for `text` around (x, y) that covers nothing, near the point, or with `far` also away from it."""
    wide, high = _LETTER * len(text) + 2, _LINE
    inside = _Box(_LEFT, 0.0, _WIDTH, _HEIGHT - _BOTTOM)
    for away in (9, 20, 34, 50, 68, 88, 110) if far else (9, 20):
        for across, down in _ABOVE if best else _AROUND:
            left = x + across * away - (0 if across > 0 else wide if across < 0 else wide / 2)
            middle = y + down * (away if across == 0 else away - 1)
            box = _Box(left, middle - high / 2, left + wide, middle + high / 2)
            within = box.left >= inside.left and box.right <= inside.right
            within = within and box.top >= inside.top and box.bottom <= inside.bottom
            if within and not any(box.overlap(other) for other in (*dots, *taken)):
                return box
    return None


def _apart(x: float, y: float, box: _Box) -> float:
    return math.hypot(max(box.left - x, x - box.right, 0.0), max(box.top - y, y - box.bottom, 0.0))


def _axes(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]], title: str) -> Markup:
    floor = _HEIGHT - _BOTTOM
    parts = [
        Markup('<line x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text x="{3}" y="{4}" text-anchor="end">{5}</text>').format(
            _LEFT, _WIDTH - _RIGHT, y, _LEFT - 6, y + 4, text
        )
        for y, text in up
    ]
    parts += [
        Markup(
            '<line x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text x="{0}" y="{3}" text-anchor="middle">{4}</text>'
        ).format(x, floor, floor + 5, floor + 19, text)
        for x, text in across
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, floor + 38, title))
    return Markup('<g class="axis">{}</g>').format(Markup("").join(parts))


def _spread(point: Point, x: float, y: Callable[[float], float]) -> Markup:
    half = point.spread or 0.0
    return Markup('<line class="spread" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
        x, y(min(point.share + half, 1.0)), y(max(point.share - half, 0.0))
    )


def _dot(point: Point, spot: tuple[float, float], best: bool, cost: Cost) -> Markup:
    half = "" if point.spread is None else f" ± {percent(point.spread)}"
    said = f"{point.name}: {percent(point.share)}{half} %, {cost.text(point.cost)}"
    kind = Markup(' class="best"') if best else ""
    return Markup('<circle{} cx="{}" cy="{}" r="5"><title>{}</title></circle>').format(kind, *spot, said)


def _stairs(spots: Sequence[tuple[float, float]]) -> str:
    """From one point to the next: its score holds until the next one's cost."""
    (x, y), *rest = spots
    return f"M{x} {y}" + "".join(f"H{a}V{b}" for a, b in rest) + f"H{_WIDTH - _RIGHT}"


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
