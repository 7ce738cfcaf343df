"""Names of classes and files, texts of methods, values of options: whatever they are, what is shown acts on nothing."""

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from perdure.cli.console import Screen
from perdure.formatting import command, printable, printable_lines, shortened
from perdure.reporting.tables import markdown
from perdure.types import Row, Task

TITLE, CLEAR, TURNED, FORGED = "\x1b]0;mine\x07", "\x1b[2J\x1b[31m", "\u202egod", "\nperdure: all is well"
NAMES = [
    f"{TITLE}cat",
    f"{CLEAR}dog{TURNED}",
    f"bird{FORGED} [/b][red]:smile:",
    "fish\x9b2J\x7f\udcff"[:-1] + "x" * 200,
]
HARMLESS = "图像 naïve 👩‍👧 a\u3000b \u00a0|`*<b>&"


def harmless(text: str, longest: int = 4_100) -> bool:
    return all(printable(line) == line and len(line) <= longest for line in text.split("\n"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder whose classes and files bear such names."""
    for number, name in enumerate(NAMES):
        folder = tmp_path / "new" / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}{CLEAR}.png")
    return tmp_path / "new"


@pytest.mark.skipif(sys.platform == "win32", reason="its file names are no trouble")
def test_no_command_prints_what_a_terminal_would_act_on(
    perdure: Any, pictures: Path, tiny: Any, small: Any, tmp_path: Path
) -> None:
    stream = f"images(path={str(pictures)!r}, tasks=2)"
    run = ("--epochs", 1, *tiny, "--method", "probe")
    (tmp_path / f"grid{CLEAR}").mkdir()
    for words in (
        ("run", "--stream", stream, *run, "--out", f"x{CLEAR}"),
        ("learn", pictures, "--into", "y", "--epochs", 1, "--backbone", "tiny()", "--method", "ncm"),
        ("compare", "--stream", stream, "--methods", "ncm", "--seeds", 0, "--epochs", 1, *tiny, "--out", "grid"),
        ("predict", f"x{CLEAR}", pictures / NAMES[0], "--top", 4),
        ("predict", f"x{CLEAR}", pictures / NAMES[0], f"{TITLE}.png"),
        ("predict", f"{TITLE}nowhere", "a.png"),
        ("eval", f"x{CLEAR}"),
        ("eval", f"x{CLEAR}", "--stream", f"images(path='{'x' * 10**6}')"),
        ("resume", f"x{CLEAR}"),
        ("resume", f"nowhere{FORGED}"),
        ("report", f"x{CLEAR}", "--out", f"{CLEAR}.html"),
        ("export", f"x{CLEAR}", "--out", f"{TITLE}"),
        ("list", "methods", f"{TITLE}{'x' * 10**5}"),
        ("run", "--stream", TURNED, "--out", "z", *run),
        ("run", "--stream", f"synthetic(noise='{'1' * 10**6}')", "--out", "z", *run),
        ("run", *small, "--method", f"lora(at='{'x' * 10**6}')", "--out", "z"),
        (f"{CLEAR}run",),
        ("run", f"--{CLEAR}" + "x" * 10**6),
        ("run", *small, "--out", "z", "--lr", "1" * 10**6),
        ("run", *small, "--out", "z", TITLE),
    ):
        answer = perdure(*words)
        assert harmless(answer.out + answer.err), words
        assert answer.err.count("\n") == (0 if answer.code == 0 else 1), words
        as_json = perdure(*words, "--json")
        assert harmless(as_json.out + as_json.err, 10**6), words
        assert as_json.events is not None
    for page in ("grid/compare.md", "grid/report.html", "y/report.html", f"{CLEAR}.html"):
        assert harmless(Path(page).read_text(encoding="utf-8"), 10**6), page
    (answer,) = perdure("predict", "y", pictures / NAMES[0] / f"0{CLEAR}.png", "--json").events
    assert answer["labels"][0]["name"] == NAMES[0], "JSON says the same in its own escapes"


def test_a_live_bar_takes_no_name_for_markup() -> None:
    screen = Screen()
    screen.live.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    screen.cell(0, 2, "probe[/b]:smile:", 0, None)
    screen.task(Task(0, "[/b]", (0,), ("a",)), 2, 1, 4)
    screen.wait("[/b]")
    screen.close()
    assert "probe[/b]:smile:" in screen.live.console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_names_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    rows = [Row(0, 0, "accuracy", 0.5), Row(0, 0, "accuracy_with_task_id", 0.5)]
    task = Task(0, f"[/b]:smile:{HARMLESS}{CLEAR}", (0,), ("a",))
    screen.measured([task], rows)
    screen.scores(task, rows)
    screen.listing([("a", "b=[/c]", "[bold]:smile:", "")])
    shown = capsys.readouterr().out
    assert shown.count(f"[/b]:smile:{HARMLESS}\\x1b[2J") == 2
    assert "[bold]:smile:" in shown
    assert "(b=[/c])" in shown


@pytest.mark.parametrize("text", ["a|b", "a`b", "``", "`|`", CLEAR])
def test_a_method_stays_in_its_cell_of_the_markdown_table(text: str) -> None:
    row: dict[str, Any] = {"method": text, "runs": 1, "step": None}
    keys = (
        "acc",
        "new_task_acc",
        "forgetting",
        "acc_with_task_id",
        "forgetting_with_task_id",
        "stored_bytes",
        "seconds",
        "evaluation_seconds",
    )
    table = markdown([row | {key: [0.5, None] for key in keys}])
    assert harmless(table)
    head, _, line = table.splitlines()
    assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", head))
    fence = re.match(r"\| (`+)", line)
    assert fence
    assert fence[1] not in printable(text)


def test_what_is_harmless_stays_as_it_is_and_the_rest_can_be_read() -> None:
    assert printable(HARMLESS) == HARMLESS
    assert printable(f"{CLEAR}\r\0{TURNED}\udcff") == r"\x1b[2J\x1b[31m\r\x00\u202egod\udcff"
    assert printable_lines("a\nb\rc") == "a\nb\\rc"
    assert json.loads(f'"{shortened("x" * 1000)}"') == f"{'x' * 133} … {'x' * 66}"
    assert shortened("short") == "short"


@pytest.mark.parametrize("folder", ["runs/a", "my runs/a", "it's", "中 文", "$HOME"])
def test_a_command_in_a_message_can_be_pasted(folder: str) -> None:
    said = command("learn", "FOLDER", "--into", folder)
    inside = said[1:-1] if said.startswith("'") else said
    assert shlex.split(inside) == ["perdure", "learn", "FOLDER", "--into", folder]
