"""What the page shows, as HTML: pictures with bars, a curve, a matrix. All that comes from people is escaped."""

import base64
import io
from collections.abc import Sequence
from urllib.parse import urlencode

from markupsafe import Markup, escape
from PIL import Image

from perdure.app.lessons import Lesson
from perdure.app.words import worded
from perdure.formatting import human_seconds, printable, shortened

_SIDE = 320  # pixels of a picture that is shown
STYLE = """
.perdure-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); gap: 12px}
.perdure-card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px; min-width: 0}
.perdure-card img {width: 100%; height: 160px; object-fit: contain}
.perdure-card p {margin: 4px 0; overflow-wrap: anywhere; font-size: 13px}
.perdure-bar {position: relative; margin: 3px 0; padding: 2px 6px; overflow-wrap: anywhere; font-size: 13px}
.perdure-bar i {position: absolute; inset: 0 auto 0 0; background: #4c78a855; border-radius: 3px}
.perdure-bar span {position: relative; display: flex; justify-content: space-between; gap: 8px}
.perdure-wide {overflow-x: auto; max-width: 100%}
.perdure-wide table {border-collapse: collapse; font-size: 13px}
.perdure-wide td, .perdure-wide th {padding: 3px 8px; text-align: right; white-space: nowrap}
.perdure-curve {width: 100%; max-width: 640px; height: 140px}
.perdure-frame {width: 100%; height: 80vh; border: 0; background: white}
footer {display: none !important}
"""


def cards(shown: Sequence[tuple[str, Image.Image, Sequence[tuple[str, float]]]]) -> str:
    """Pictures with their names and with bars: what each stands for, and its share from 0 to 1."""
    return _html("perdure-cards", Markup("").join(_card(*each) for each in shown))


def _card(name: str, picture: Image.Image, bars: Sequence[tuple[str, float]]) -> Markup:
    shown = Markup("").join(_bar(*each) for each in bars)
    label = printable(shortened(name, 80))
    return Markup('<div class="perdure-card"><img alt="{0}" src="{1}"><p>{0}</p>{2}</div>').format(
        label, _address(picture), shown
    )


def _bar(name: str, share: float) -> Markup:
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    return Markup(
        '<div class="perdure-bar"><i style="width: {}%"></i><span><b>{}</b><span>{}</span></span></div>'
    ).format(width, printable(shortened(name, 80)), f"{share:.1%}")


def _address(picture: Image.Image) -> str:
    """A small copy within the page: no file is served, and nothing of a camera's notes is in it."""
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def lesson(shown: Lesson, before: int, languages: str) -> str:
    """How far it is: its curve, and once it is learnt the matrix and what was forgotten."""
    facts = {"count": before, "steps": shown.steps or "?", "step": shown.losses[-1][0] if shown.losses else 0}
    facts |= {"seconds": human_seconds(shown.seconds), "why": shown.said, "encoded": shown.seen}
    state = "looking" if shown.state == "learning" and not shown.losses else shown.state
    parts = [Markup("<h4>{}: {}</h4>").format(printable(shown.title), worded(state, languages, **facts))]
    parts += [Markup("<p>{}</p>").format(note) for note in shown.notes]
    if len(shown.losses) > 1:
        parts.append(Markup("<p>{}</p>{}").format(worded("loss", languages), _curve(shown.losses, shown.steps)))
    if shown.outcome:
        parts.append(Markup("<p>{}</p>{}").format(worded("matrix", languages), _matrix(shown.outcome.matrix)))
        if len(shown.outcome.names) > 1:
            worse = [(n, old, new) for n, old, new in shown.outcome.changes() if new < old]
            known = bool(shown.outcome.changes())
            lines = [f"{printable(shortened(n, 80))}: {old:.1%} → {new:.1%}" for n, old, new in worse]
            lines = lines or [worded("kept" if known else "untested", languages)]
            items = Markup("").join(Markup("<li>{}</li>").format(line) for line in lines)
            parts.append(Markup("<p><b>{}</b></p><ul>{}</ul>").format(worded("forgotten", languages), items))
    return _html("perdure-lesson", Markup("").join(parts))


def _curve(losses: Sequence[tuple[int, float]], steps: int) -> Markup:
    highest = max(loss for _, loss in losses) or 1.0
    points = " ".join(f"{600 * step / max(steps, 1):.1f},{120 - 110 * loss / highest:.1f}" for step, loss in losses)
    return Markup(
        '<svg class="perdure-curve" viewBox="0 0 600 125" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<polyline points="{}" fill="none" stroke="#4c78a8" stroke-width="2"/></svg>'
    ).format(f"{losses[-1][1]:.3f}", points)


def _matrix(matrix: Sequence[Sequence[float | None]]) -> Markup:
    def cell(value: float | None) -> Markup:
        return Markup("<td>{}</td>").format("" if value is None else f"{100 * value:.0f}")

    head = Markup("").join(Markup("<th>{}</th>").format(i + 1) for i in range(len(matrix)))
    rows = [
        Markup("<tr><th>{}</th>{}</tr>").format(i + 1, Markup("").join(map(cell, row[: i + 1])))
        for i, row in enumerate(matrix)
    ]
    table = Markup("<table><tr><th></th>{}</tr>{}</table>").format(head, Markup("").join(rows))
    return Markup(_html("perdure-wide", table))


def report(grid: str | None) -> str:
    """The report of a grid, or the learner's own, as a page within the page."""
    address = "/show/report" if grid is None else f"/show/report?{urlencode({'grid': grid})}"
    frame = '<iframe class="perdure-frame" sandbox="allow-scripts" src="{}" title="report"></iframe>'
    return str(Markup(frame).format(address))


def sentence(text: str) -> str:
    """A line of text."""
    return str(Markup("<p>{}</p>").format(escape(printable(text))))


def _html(kind: str, inner: Markup) -> str:
    return str(Markup('<div class="{}">{}</div>').format(kind, inner))
