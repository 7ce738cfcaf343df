"""Tables as lines of text, as wide as the screen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from perdure.formatting import (
    RARE,
    human_bytes,
    number,
    percent_with_spread,
    printable,
    rate,
    shortened,
    spread_of,
    times,
)

COLUMNS = {
    "acc": "accuracy",
    "aaa": "average",
    "forgetting": "forgetting",
    "acc_with_task_id": "with task id",
    "task_id_acc": "task id",
    "transfer": "transfer",
    "average": "over the matrix",
    "zero_shot_ratio": "zero-shot kept",
    "lenient_acc": "lenient",
    "lenient_forgetting": "lenient forgetting",
    "answers_kept_strict": "kept",
    "answers_kept_lenient": "kept, lenient",
}
_TOLD = ("acc_with_task_id", "task_id_acc")  # what answers in words have not
_SPARE = ("images/s", "average")  # columns left out of a table that is too wide, the first one first
_MEANINGS = {
    "average": "over the stream",
    "new task": "right after it was learnt",
    "with task id": "when told which task an image is of",
    "transfer": "on data sets not learnt yet",
    "over the matrix": "all scores after every task",
    "zero-shot kept": "on held-out data",
    "strict": "in the form that was asked for",
    "lenient": "the truth is in what is said",
    "kept": "of held-out answers, strict",
    "step": "its cost, plain LoRA's is 1",
    "lr": "learning rate, each method's own",
}


def comparison(rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Methods side by side, mean ± spread, and what the columns mean; `rows` as in compare.json."""
    names = column_names(any(row.get("unparsable") for row in rows))
    names = {"acc": names["acc"], "aaa": "average", "new_task_acc": "new task"} | names
    columns = {
        title: [percent_with_spread(row.get(key)) for row in rows]
        for key, title in names.items()
        if key not in RARE or any(row.get(key) for row in rows)
    }
    if len({row.get("lr") for row in rows}) > 1:  # each method has its own
        columns["lr"] = [rate(row["lr"], row["images_per_second"]) for row in rows]
    columns["stored"] = [human_bytes(row["stored_bytes"][0]) for row in rows]
    columns["step"] = [times(row.get("step")) for row in rows]
    columns["images/s"] = [number(row["images_per_second"]) for row in rows]
    columns["seconds"] = [number(row["seconds"]) for row in rows]
    apart = "   "
    widest = {title: max(map(len, [title, *column])) for title, column in columns.items()}
    for title in _SPARE:
        if sum(widest.values()) + len(widest) > width:
            del columns[title], widest[title]
    titles, widths = list(columns), list(widest.values())
    shown = list(zip(*columns.values(), strict=True))
    methods = [printable(shortened(row["method"])) for row in rows]
    name = max(cell_len(method) for method in methods)
    beside = name + sum(widths) + len(apart) * len(widths) <= width
    if not beside:
        # Methods get a line of their own; then, if need be, numbers one below the other.
        apart = next((gap for gap in ("   ", "  ", " ") if sum(widths) + len(gap) * len(widths) <= width), "")
    heading = [f"{title:>{w}}" for title, w in zip(titles, widths, strict=True)]
    lines = []
    if apart:
        lines.append(apart.join([" " * name if beside else "", *heading]))
    for method, line in zip(methods, shown, strict=True):
        cells = [f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)]
        if beside:
            lines.append(apart.join([method + " " * (name - cell_len(method)), *cells]))
            continue
        lines.append(method)
        if apart:
            lines.append(apart.join(["", *cells]))
        else:
            lines += flowed([f"{title} {cell}" for title, cell in zip(titles, line, strict=True)], width)
    found = spread_of([(row["method"], row["runs"], row.get("varied")) for row in rows])
    several = any("±" in cell for line in shown for cell in line)
    spread = "one run each" if not several else "; ".join(["mean", *found]) if found else "mean ± standard deviation"
    means = "; ".join(f"{title}: {meaning}" for title, meaning in _MEANINGS.items() if title in columns)
    lines.append(f"in %, {spread}; {means}")
    lines += [f"no means: {why}" for why in dict.fromkeys(row["no_means"] for row in rows if row.get("no_means"))]
    if gone := [title for title in _SPARE if title not in columns]:
        lines.append(f"no room for {', '.join(gone)}: in report.html")
    return lines


def column_names(said: bool) -> dict[str, str]:
    """`COLUMNS`; those of answers in words where `said`."""
    return {k: v for k, v in (COLUMNS | {"acc": "strict"}).items() if k not in _TOLD} if said else COLUMNS


def flowed(parts: Sequence[str], width: int) -> list[str]:
    """Parts side by side, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(f"{lines[-1]}   {part}") <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return lines


def ends(count: int, room: int) -> list[int | None]:
    """All of 0..count-1 when there is room, else the first and the last ones around a None."""
    if count <= room:
        return list(range(count))
    first = room // 2
    return [*range(first), None, *range(count - (room - first - 1), count)]


def routing_lines(table: Mapping[str, Any]) -> list[str]:
    """What was measured of specialists, a line each; `table` as in routing.json."""
    things = table.get("things", "images")
    titles = ("", "accuracy", "asked", f"ms/{things[:-1]}", "stored")
    rows = [titles]
    for row in table["rows"]:
        took = "" if row["milliseconds"] is None else f"{row['milliseconds']:.1f}"
        shown = f"{row['accuracy']:.1%}", f"{row['asked']:g}", took, human_bytes(row["bytes"])
        rows.append((printable(shortened(row["who"])), *shown))
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([name + " " * (widths[0] - cell_len(name)), *numbers]))
    found = table["routing_accuracy"]
    taught = "class" if things == "images" else "task"
    sent = "" if found is None else f"; {found:.1%} were routed to a member that was taught their {taught}"
    each = "an image" if things == "images" else "a question"
    return [
        *lines,
        f"on {table['images']} {things}{sent}; asked: members {each}; oracle: the best choice there could be",
    ]
