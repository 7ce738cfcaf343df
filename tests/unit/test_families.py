"""The seven families: which methods are theirs, how much code they are, and the page that shows them."""

import json
from pathlib import Path
from typing import Any

from perdure.cli.main import main
from perdure.reporting.advise import Advice, Constraints, advise, shipped
from perdure.reporting.families import FAMILIES, TITLES, best_of_families, code_lines, family_cells, family_of

ROOT = Path(__file__).parents[2]
METHODS = {file.stem for file in (ROOT / "src/perdure/methods").glob("*.py")} - {"__init__"}


def test_a_method_belongs_to_one_family_at_most_and_exists() -> None:
    named = [name for family in FAMILIES for name in family.methods]
    assert len(named) == len(set(named))
    assert set(named) - METHODS <= {"head_gates"}


def test_what_statistics_or_another_family_add_is_no_merit_of_a_family() -> None:
    assert family_of("lora + replay(size=9)").name == "replay"  # type: ignore[union-attr]
    assert family_of("inflora(keep=0.9)").name == "isolation and regularisation"  # type: ignore[union-attr]
    for method in ("lora", "ncm", "probe + align", "inflora + ranpac", "inflora + replay", "lora + replay + lwf"):
        assert family_of(method) is None, method


def test_code_is_counted_with_all_that_it_is_made_of() -> None:
    own = len((ROOT / "src/perdure/methods/lora.py").read_text().splitlines())
    assert code_lines("lora") > own
    assert code_lines("lora + replay") > code_lines("lora")


def table(answer: Advice) -> list[str]:
    """The lines of the page on choosing."""
    about = answer.setting
    rows = [TITLES, ("---",) * len(TITLES), *(family_cells(*each) for each in best_of_families(answer))]
    data = f"{about['data']}, {about['tasks']} tasks, {about['scenario']}-incremental, `{about['backbone']}`."
    return [data, "", *(f"| {' | '.join(row)} |" for row in rows)]


def test_the_page_shows_what_was_measured_and_says_what_was_not() -> None:
    text = (ROOT / "docs/choosing.md").read_text("utf-8")
    shown = text.partition("<!-- families: begin -->\n\n")[2].partition("\n<!-- families: end -->")[0].splitlines()
    made = table(advise(shipped(), Constraints(tasks=10))[0])
    assert len(shown) == len(made)
    for line, wanted in zip(shown, made, strict=True):
        *cells, lines, _ = line.split("|") if line.startswith("|") else (line, "", "")
        *same, count, _ = wanted.split("|") if wanted.startswith("|") else (wanted, "", "")
        assert cells == same
        if count.strip().isdigit():  # code grows from day to day: on the page its size may lag behind
            assert abs(int(lines) - int(count)) < 0.3 * int(count), wanted
    assert any("measured apart" in line for line in shown)


def test_the_command_shows_the_best_of_each_family(capsys: Any) -> None:
    main(["advise", "--family", "--tasks", "10", "--json"])
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = {each["family"]: each["choice"] for each in found["answers"][0]["families"]}
    assert list(first) == [family.name for family in FAMILIES]
    assert first["replay"]["method"] == "lora + icarl"
    assert first["meta-learning"]["method"] == "lora + reptile"
    assert first["cooperating specialists"] == "measured apart"
    main(["advise", "--family", "--no-old-data"])
    said = capsys.readouterr().out
    assert "not measured" in said
    assert "lora + icarl" not in said
    assert "left out" in said
    (answer, *_) = advise(shipped(), Constraints())
    assert len(best_of_families(answer)) == 7
