"""What stands in cells of the report's tables: numbers with units, bars as inline SVG, colours of a heat map."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Colour = tuple[int, int, int]

LEVELS = 24
"""Number of steps of the heat map's colours."""

# One hue each, ordered by lightness: readable without colour vision, and in print.
_LIGHT = ((244, 247, 250), (200, 221, 237), (128, 178, 213), (58, 125, 180), (19, 76, 133), (10, 42, 84))
_DARK = ((30, 37, 46), (31, 62, 96), (38, 97, 150), (74, 143, 196), (138, 190, 226), (220, 238, 250))


@dataclass(frozen=True)
class Segment:
    """A piece of a stacked bar: its length, the colour's number, and what it says."""

    value: float
    colour: int
    label: str


def percent(share: float | None) -> str:
    """`0.7134` -> `71.3`, with a true minus sign; a dash when there is none."""
    if share is None:
        return "–"
    text = f"{100 * share:.1f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def show(key: str, value: float | None, std: float | None = None, *, unit: bool = True) -> Markup:
    """A number of a summary with its unit unless `unit` is False, and ± one standard deviation."""
    if value is None:
        return Markup('<span class="none" title="not measured">–</span>')
    if key == "trainable_parameters":
        text, name = f"{value:,.0f}", ""
    elif key in ("stored_bytes", "peak_rss_bytes"):
        power = next((i for i in range(4) if value < 999.5 * 1000**i), 4)
        text, name = _digits(value / 1000**power), ("B", "kB", "MB", "GB", "TB")[power]
    elif key in ("seconds", "evaluation_seconds"):
        text, name = duration(value), ""
    elif key == "step_cost":
        text, name = f"{value:.2f}", "× LoRA"
    elif key == "images_per_second":
        text, name = _digits(value), "/s"
    else:
        text = percent(value) + ("" if std is None else f" ± {percent(std)}")
        name = "points" if key in ("forgetting", "gap", "bwt", "fwt") else "%"
    return Markup('{}<span class="unit"> {}</span>').format(text, name) if name and unit else Markup("{}").format(text)


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


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


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with a block of their colour, and a value each."""
    item = Markup(
        '<li><svg width="22" height="12" aria-hidden="true"><rect width="22" height="10" y="1" rx="2" '
        'fill="var(--c{})"/></svg>{} <b>{}</b></li>'
    )
    items = [item.format(i, name, value) for i, (name, value) in enumerate(entries)]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


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


def stack(parts: Sequence[Segment], longest: float) -> Markup:
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
