"""Small figures for the report as inline SVG: lines over tasks, bars, and the colours of a heat map.

Lines and bars are drawn in a stretched coordinate system with strokes that keep their width, so that they fill any
screen; all text is HTML beside them and keeps its size.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Colour = tuple[int, int, int]
_Place = Callable[[int], float]
_Scale = Callable[[float], float]

LEVELS = 24
"""Number of steps of the heat map's colours."""
COLOURS = 8
"""Number of colours for series, `--c0` ... of the style sheet; further series repeat them with dashes."""

# One hue each, ordered by lightness: readable without colour vision, and in print.
_LIGHT = ((244, 247, 250), (200, 221, 237), (128, 178, 213), (58, 125, 180), (19, 76, 133), (10, 42, 84))
_DARK = ((30, 37, 46), (31, 62, 96), (38, 97, 150), (74, 143, 196), (138, 190, 226), (220, 238, 250))
_DASHES = ("", "7 4", "2 4")


@dataclass(frozen=True)
class Series:
    """A line: one value for each task, None where there is none, with an optional half-width of a band around it."""

    name: str
    values: Sequence[float | None]
    spread: Sequence[float | None] = ()
    colour: int | None = None
    """Number of its colour; its place among the series when None."""


@dataclass(frozen=True)
class Part:
    """A piece of a stacked bar: its length, the colour's number, and what it says."""

    value: float
    colour: int
    label: str


def percent(share: float | None, digits: int = 1) -> str:
    """`0.7134` -> `71.3`, with a true minus sign; a dash when there is none."""
    if share is None:
        return "–"
    text = f"{100 * share:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def level(share: float) -> int:
    """Step of the heat map's colours for a share in [0, 1]."""
    return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def heat_colours(dark: bool) -> list[tuple[str, str]]:
    """Background and text colour of each level; the text has the better contrast of black and white."""
    stops = _DARK if dark else _LIGHT
    pairs = []
    for i in range(LEVELS):
        back = _between(stops, i / (LEVELS - 1))
        black, white = (0, 0, 0), (255, 255, 255)
        pairs.append((_hex(back), _hex(black if contrast(black, back) > contrast(white, back) else white)))
    return pairs


def contrast(a: Colour, b: Colour) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, 1 to 21."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def lines(
    title: str, series: Sequence[Series], labels: Sequence[str], *, zero: bool = False, share: bool = True
) -> Markup:
    """Lines over tasks with axes in per cent, bands and a legend.

    Args:
        title: what the figure shows; read out by screen readers.
        series: at least one, each with as many values as `labels`.
        labels: one a task.
        zero: the axis starts at zero, even where all values lie far above it.
        share: no value can exceed 1, so the axis ends there even where a band does not.
    """
    low, high, step = _axis([*([0.0] if zero else []), *(v for s in series for v in _extent(s))], share)
    inks = [_ink(i if s.colour is None else s.colour) for i, s in enumerate(series)]
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]

    def y(value: float) -> float:
        return round(1000 * (high - value) / (high - low), 1)

    def x(i: int) -> float:
        return 500.0 if len(labels) == 1 else round(1000 * (i + 0.5) / len(labels), 1)

    body = [Markup('<line x1="0" x2="1000" y1="{0}" y2="{0}"/>').format(y(t)) for t in ticks]
    body = [Markup('<g class="grid">{}</g>').format(Markup("").join(body))]
    body += [_band(s, x, y, ink) for s, ink in zip(series, inks, strict=True) if s.spread]
    body += [_line(s, labels, x, y, ink) for s, ink in zip(series, inks, strict=True)]
    every = math.ceil(len(labels) / 10)
    return Markup(
        '<div class="plot"><div class="ticks" aria-hidden="true">{}</div>'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}"><title>{}</title>{}</svg>'
        '<div class="steps" aria-hidden="true">{}</div></div>{}'
    ).format(
        _join('<span style="top:{}%">{}</span>', [(y(t) / 10, percent(t, 0)) for t in ticks]),
        f"{title}. " + "; ".join(f"{s.name}: {percent(_last(s.values))} %" for s in series),
        title,
        Markup("").join(body),
        _join('<span style="left:{}%">{}</span>', [(x(i) / 10, i + 1) for i in range(0, len(labels), every)]),
        _legend(
            (Markup('<path class="line" d="M1 6H21" {}/>').format(ink), s.name, f"{percent(_last(s.values))} %")
            for s, ink in zip(series, inks, strict=True)
        ),
    )


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with a block of their colour, and a value each."""
    block = Markup('<rect width="22" height="10" y="1" rx="2" fill="var(--c{})"/>')
    return _legend((block.format(i % COLOURS), name, value) for i, (name, value) in enumerate(entries))


def _legend(entries: Iterable[tuple[Markup, str, str]]) -> Markup:
    item = '<li><svg width="22" height="12" aria-hidden="true">{}</svg>{} <b>{}</b></li>'
    return Markup('<ul class="legend">{}</ul>').format(_join(item, entries))


def bar(value: float | None, low: float, high: float, label: str) -> Markup:
    """A horizontal bar from 0 to `value` on an axis that spans `low` <= 0 to `high` >= 0."""
    width = (high - low) or 1.0
    zero = -100 * low / width
    shown = value or 0.0
    start = zero + 100 * min(shown, 0.0) / width
    return Markup(
        '<svg class="bar" role="img" aria-label="{0}"><title>{0}</title>'
        '<rect class="{1}" x="{2:.2f}%" width="{3:.2f}%" height="100%" rx="2"/>'
        '<line x1="{4:.2f}%" x2="{4:.2f}%" y1="0" y2="100%"/></svg>'
    ).format(label, "gain" if shown < 0 else "", start, 100 * abs(shown) / width, zero)


def stack(parts: Sequence[Part], longest: float) -> Markup:
    """Pieces one after another on an axis from 0 to `longest`."""
    ends = list(itertools.accumulate((part.value for part in parts), initial=0.0))
    scale = 100 / (longest or 1.0)
    rects = [
        Markup('<rect x="{:.2f}%" width="{:.2f}%" height="100%" fill="var(--c{})"><title>{}</title></rect>').format(
            start * scale, part.value * scale, part.colour, part.label
        )
        for start, part in zip(ends, parts, strict=False)
    ]
    label = ", ".join(part.label for part in parts)
    return Markup('<svg class="bar" role="img" aria-label="{}">{}</svg>').format(label, Markup("").join(rects))


def _band(series: Series, x: _Place, y: _Scale, ink: Markup) -> Markup:
    known = [
        (x(i), v, s) for i, (v, s) in enumerate(zip(series.values, series.spread, strict=True)) if v is not None and s
    ]
    edge = [f"{at},{y(v + s)}" for at, v, s in known] + [f"{at},{y(v - s)}" for at, v, s in reversed(known)]
    return Markup('<polygon class="band" points="{}" {}/>').format(" ".join(edge), ink) if known else Markup("")


def _line(series: Series, labels: Sequence[str], x: _Place, y: _Scale, ink: Markup) -> Markup:
    known = [(i, v) for i, v in enumerate(series.values) if v is not None]
    path = " ".join(f"{x(i)},{y(v)}" for i, v in known)
    # A circle would be stretched with the coordinates; the round cap of a line of no length stays round.
    dots = [
        Markup('<path class="dot" d="M{} {}h.01" {}><title>{}, after {}: {} %</title></path>').format(
            x(i), y(v), ink, series.name, labels[i], percent(v)
        )
        for i, v in known
    ]
    return Markup('<polyline class="line" points="{}" {}/>{}').format(path, ink, Markup("").join(dots))


def _ink(colour: int) -> Markup:
    dash = _DASHES[colour // COLOURS % len(_DASHES)]
    return Markup('style="--hue:var(--c{}){}"').format(colour % COLOURS, f";--dash:{dash}" if dash else "")


def _join(pattern: str, values: Iterable[tuple[object, ...]]) -> Markup:
    return Markup("").join(Markup(pattern).format(*each) for each in values)


def _last(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _extent(series: Series) -> list[float]:
    widths = series.spread or [None] * len(series.values)
    known = [(v, s or 0.0) for v, s in zip(series.values, widths, strict=True) if v is not None]
    return [v - s for v, s in known] + [v + s for v, s in known]


def _axis(values: Iterable[float], share: bool) -> tuple[float, float, float]:
    """Round ends, not below 0 and of shares not above 1, that hold the values, and the distance of at most 7 ticks."""
    found = list(values) or [0.0, 1.0]
    top = min(max(found), 1.0) if share else max(found)
    low, high = math.floor(max(min(found), 0.0) * 10), math.ceil(top * 10)
    low = max(min(low, high - 2), 0)
    high = max(high, low + 2)
    step = next(s for k in itertools.count() for s in (10**k, 2 * 10**k, 5 * 10**k) if high - low <= 6 * s)
    low -= low % step
    high += -(high - low) % step
    return low / 10, high / 10, step / 10


def _between(stops: Sequence[Colour], at: float) -> Colour:
    place = at * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    a, b = stops[i], stops[i + 1]
    mixed = [round(p + (q - p) * (place - i)) for p, q in zip(a, b, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _luminance(colour: Colour) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
