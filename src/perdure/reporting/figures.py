"""Figures of runs, by matplotlib: inline SVG in the colours of the report's page, and files for papers.

matplotlib is imported when the first figure is drawn, so that reading runs does not wait for it.
"""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from perdure.reporting.charts import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#c55a00", "#007a5a", "#a8447f", "#2e9bd6", "#8a6d00", "#4a4a4a", "#7a3fb0")
"""Of series, readable without colour vision (after Okabe and Ito); further series repeat them with dashes."""

_INK, _QUIET, _GRID, _PAPER, _BEST = "#1d2126", "#5b636d", "#dfe2e6", "#fdfdfc", "#3a7db4"
_ROLES = {_INK: "ink", _QUIET: "quiet", _GRID: "line", _PAPER: "paper", _BEST: "bar"}
_VARIABLES = _ROLES | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
_DASHES = ("-", (0, (4, 2)), (0, (1, 2)))
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "perdure",  # the same figure gives the same bytes
    "pdf.fonttype": 42,  # journals refuse Type 3
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _QUIET,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
}
_LONGEST = 60  # letters of a name
_EARLIER, _LISTED, _NAME, _MARKS = "earlier tasks", 31, 34, "o^sDvPX*"
_CJK = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB"),
    *("Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Arial Unicode MS"),
)


@dataclass(frozen=True)
class Series:
    """A line: one value for each task, None where there is none, with an optional half-width of a band around it."""

    name: str
    values: Sequence[float | None]
    spread: Sequence[float | None] = ()
    colour: int | None = None
    """Number of its colour; its place among the series when None."""


@dataclass(frozen=True)
class Point:
    """A method: what it costs and how well it does, in [0, 1], with the standard deviation."""

    name: str
    cost: float
    share: float
    spread: float | None = None


@dataclass(frozen=True)
class Cloud:
    """Points that belong together: what they are called, and which of the places they are."""

    name: str
    points: "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Drawing:
    """A figure, its title, and what someone who does not see it is told."""

    title: str
    said: str
    figure: "Figure"

    def inline(self) -> Markup:
        """SVG for a page that defines the colours as variables: ink, quiet, line, paper, bar, c0 and so on."""
        text = self._written("svg").decode()
        size, content = re.search(r'<svg [^>]*(viewBox="[^"]*")[^>]*>.*?</metadata>(.*)', text, re.DOTALL).groups()  # type: ignore[union-attr]
        content = re.sub(r'<g id="[^"]*"', "<g", content).replace("xlink:href", "href")
        content = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", content)
        return Markup('<svg class="figure" role="img" aria-label="{}" {}>{}').format(
            f"{self.title}. {self.said}", Markup(size), Markup(content)
        )

    def save(self, path: Path) -> None:
        """Write a file of the kind that the name's ending says: svg, pdf or png (300 dots an inch)."""
        path.write_bytes(self._written(path.suffix.removeprefix(".")))

    def pixels(self) -> "np.ndarray[Any, Any]":
        """The picture, uint8 (height, width, 3)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with _styled():
            canvas: Any = FigureCanvasAgg(self.figure)
            canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _written(self, kind: str) -> bytes:
        out = io.BytesIO()
        dated = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
        with _styled():
            self.figure.savefig(out, format=kind, dpi=300, metadata={dated: None} if dated else None)
        return out.getvalue()


def curves(
    title: str, series: Sequence[Series], labels: Sequence[str], *, zero: bool = False, share: bool = True
) -> Drawing:
    """Lines over tasks, in per cent, with bands and a legend of the last values.

    Args:
        title: what the figure shows.
        series: at least one, each with as many values as `labels`.
        labels: one a task.
        zero: the axis starts at zero, even where all values lie far above it.
        share: no value can exceed 1, so the axis ends there even where a band does not.
    """
    with _styled():
        figure, axes = _axes(2.9 + 0.19 * len(series))
        handles = []
        for i, each in enumerate(series):
            colour = i if each.colour is None else each.colour
            ink: dict[str, Any] = {"color": COLOURS[colour % len(COLOURS)]}
            values = [math.nan if v is None else 100 * v for v in each.values]
            dash = _DASHES[colour // len(COLOURS) % len(_DASHES)]
            handles += axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, linestyle=dash, **ink)
            if each.spread:
                half = [100 * (s or 0.0) for s in each.spread]
                low, high = ([v + sign * h for v, h in zip(values, half, strict=True)] for sign in (-1, 1))
                axes.fill_between(range(1, len(values) + 1), low, high, alpha=0.14, linewidth=0, **ink)
        axes.set_xlim(0.5, len(labels) + 0.5)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.set_ylim(bottom=0 if zero else max(axes.get_ylim()[0], 0))
        if share:
            axes.set_ylim(top=min(axes.get_ylim()[1], 102))
            axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= 100])
        if not any(value for each in series for value in each.values):
            axes.set_ylim(0, 1)  # nothing moved: a line at zero, and no scale of thousandths
        axes.set_xlabel("tasks learnt")
        axes.set_ylabel("%")
        ends = [f"{percent(_last(s.values))} %" for s in series]
        names = [f"{_cut(s.name)}   {end}" for s, end in zip(series, ends, strict=True)]
        figure.legend(handles, names, loc="outside lower left", frameon=False, labelcolor=_INK)
    return Drawing(title, "; ".join(f"{s.name}: {end}" for s, end in zip(series, ends, strict=True)), figure)


def scatter(title: str, points: Sequence[Point], cost: str, text: Callable[[float], str]) -> Drawing:
    """Accuracy against a cost: numbered points, named below; the Pareto front is filled and joined by a line.

    Args:
        title: what the figure shows.
        points: at least one, with shares in [0, 1]; a cost is logarithmic where it spans a decade or more.
        cost: what the axis below says.
        text: a cost in words, for the ticks.
    """
    best = front(points)
    ranked = sorted(points, key=lambda p: -p.share)
    with _styled():
        figure, axes = _axes(3.4 + 0.19 * len(points))
        costs = [p.cost for p in points]
        if min(costs) > 0 and max(costs) >= 10 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.xaxis.set_major_formatter(lambda value, _: text(value) if value >= 0 else "")
        axes.step([p.cost for p in best], [100 * p.share for p in best], where="post", color=_BEST, linestyle="--")
        for number, point in enumerate(ranked, 1):
            leads = any(point is p for p in best)
            axes.errorbar(
                point.cost,
                100 * point.share,
                100 * point.spread if point.spread else None,
                marker="o",
                color=_BEST if leads else _QUIET,
                markerfacecolor=_BEST if leads else _PAPER,
                elinewidth=0.8,
            )
            place = (point.cost, 100 * point.share)
            weight = "bold" if leads else "normal"
            axes.annotate(str(number), place, (5, 4), textcoords="offset points", weight=weight)
        axes.set_xlabel(cost)
        axes.set_ylabel("%")
        blank = [axes.plot([], [], linestyle="none")[0] for _ in ranked]
        names = [f"{number}  {_cut(p.name)}   {_measured(p)}, {text(p.cost)}" for number, p in enumerate(ranked, 1)]
        box = figure.legend(blank, names, loc="outside lower left", frameon=False, labelcolor=_INK, handlelength=0)
        for label, point in zip(box.get_texts(), ranked, strict=True):
            label.set_fontweight("bold" if any(point is p for p in best) else "normal")
    said = "; ".join(f"{p.name}: {percent(p.share)} % at {text(p.cost)}" for p in best)
    return Drawing(title, f"Best trade-offs: {said}", figure)


def matrix(title: str, rows: Sequence[Sequence[float | None]], names: Sequence[str]) -> Drawing:
    """The matrix of scores: a row a task learnt, a column a task measured, in per cent.

    Args:
        title: what the figure shows.
        rows: scores in [0, 1], None where one was not measured; as many columns as `names`.
        names: of the tasks.
    """
    values = [[math.nan if v is None else 100 * v for v in row] for row in rows]
    with _styled():
        figure, axes = _axes(1.2 + 0.36 * len(rows))
        axes.grid(visible=False)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        size = max(4.0, min(9.0, 90 / max(len(names), 1)))
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value is not None:
                    ink = "white" if value > 0.6 else "black"
                    axes.text(j, i, percent(value), ha="center", va="center", color=ink, fontsize=size)
        axes.set_xticks(range(len(names)), [str(i + 1) for i in range(len(names))])
        axes.set_yticks(range(len(rows)), [f"{i + 1}  {_cut(names[i], 24)}" for i in range(len(rows))])
        axes.set_xlabel("task measured")
        axes.set_ylabel("tasks learnt")
    last = rows[-1] if rows else []
    return Drawing(title, "; ".join(f"{n}: {percent(v)} %" for n, v in zip(names, last, strict=False)), figure)


def clouds(title: str, maps: Mapping[str, "np.ndarray[Any, Any]"], groups: Sequence[Cloud]) -> Drawing:
    """Points side by side on each of the `maps`, a colour and a mark for each of the groups.

    Args:
        title: what the figure shows.
        maps: places (n, 2) by what stands above them, of the same points.
        groups: of points; one that is called "earlier tasks" is drawn in grey, below the others.
    """
    from matplotlib.figure import Figure

    listed = [group for group in groups if group.name != _EARLIER]
    widest = max((min(_width(g.name), _NAME) for g in groups), default=0)
    columns = min(4, 88 // (widest + 8))
    lines = math.ceil((min(len(listed), _LISTED) + 1) / columns)
    with _styled():
        figure = Figure((7.0, 3.7 + 0.19 * lines), layout="constrained")
        handles: dict[str, Any] = {}
        for axes, (heading, places) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
            axes.set_title(heading, fontsize=9, color=_QUIET)
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_aspect("equal", adjustable="datalim")
            for group in groups:
                x, y = places[group.points].T
                if group.name == _EARLIER:
                    look: dict[str, Any] = {"color": _GRID, "marker": "o", "s": 9, "edgecolors": "#b9bfc6"}
                else:
                    place = listed.index(group)
                    mark = _MARKS[place // len(COLOURS) % len(_MARKS)]
                    look = {"color": COLOURS[place % len(COLOURS)], "marker": mark, "s": 16, "edgecolors": _PAPER}
                handles.setdefault(group.name, axes.scatter(x, y, linewidths=0.4, **look))
        names = [group.name for group in groups if group.name == _EARLIER]
        names += [group.name for group in listed[:_LISTED]]
        shown = [handles[name] for name in names]
        words = [_cut(name, _NAME) for name in names]
        if len(listed) > _LISTED:
            shown.append(figure.axes[0].plot([], [], linestyle="none")[0])
            words.append(f"and {len(listed) - _LISTED} more")
        figure.legend(
            *(shown, words), loc="outside lower left", ncols=columns, frameon=False, labelcolor=_INK, handlelength=1
        )
    return Drawing(title, f"{', '.join(maps)}; {', '.join(words)}", figure)


@cache
def _fonts() -> list[str]:
    """The usual font, and those here that have what it lacks: Chinese, Japanese and Korean letters."""
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return ["sans-serif", *(name for name in _CJK if name in there)]


def without_glyphs(texts: Iterable[str]) -> str:
    """The letters of `texts` that no font here can draw, at most five."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in _fonts()]
    letters = dict.fromkeys(letter for text in texts for letter in text if letter.isprintable())
    return "".join([each for each in letters if not any(font.get_char_index(ord(each)) for font in fonts)][:5])


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front by rising cost: those for which no other costs less or as much and scores more or as much.

    Of points that are equal in both, the first one stays.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.share)):
        if not best or point.share > best[-1].share:
            best.append(point)
    return best


@contextmanager
def _styled() -> Iterator[None]:
    """Our style for the time of a drawing; a name in a script that the font lacks is no reason to warn."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE | {"font.family": _fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def _axes(height: float) -> "tuple[Figure, Axes]":
    """An empty figure, 7 inches wide and `height` high."""
    from matplotlib.figure import Figure

    figure = Figure((7.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _measured(point: Point) -> str:
    return f"{percent(point.share)}{f' ± {percent(point.spread)}' if point.spread is not None else ''} %"


def _last(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def _width(name: str) -> int:
    """In columns of Latin letters: Chinese ones take two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name)


def _cut(name: str, longest: int = _LONGEST) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
