"""The pages say what is true: commands parse, Python runs, links lead somewhere, tables equal the code."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image

from perdure.backbones import BACKBONES
from perdure.cli.catalogue import described
from perdure.cli.commands import COMMANDS
from perdure.cli.tune import Tune
from perdure.core.method import FORMER_HOOKS, METHODS, Method
from perdure.experiments.tune import check_ends
from perdure.options.search_space import parse_space
from perdure.options.spec import build, parse_one
from perdure.streams import STREAMS
from perdure.training.config import RunConfig, make_method, make_objective, register
from perdure.training.run import run

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(r"^(?:<!-- tested(?:: (?P<tag>\w+))? -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
register()
OURS = sorted(name for name, method in METHODS.items() if method.__module__.startswith("perdure.methods."))


@dataclass(frozen=True)
class Block:
    page: str
    kind: str
    text: str
    tested: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:40]}"


def blocks(kind: str) -> Iterator[Block]:
    for page in PAGES:
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["kind"] == kind:
                tested = (found["tag"] or "plain") if found[0].startswith("<!--") else None
                yield Block(str(page.relative_to(ROOT)), kind, found["text"], tested)


def commands() -> Iterator[tuple[str, str]]:
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("perdure "):
                yield block.page, line


def test_no_line_of_a_command_ends_within_quotes() -> None:
    for block in blocks("bash"):
        text = ""
        for line in block.text.splitlines(keepends=True):
            text += line
            if not line.endswith("\\\n"):
                text = ""
            elif not line.lstrip().startswith("#"):
                shlex.split(text.removesuffix("\\\n"), comments=True)  # of an open quote it says so


COMMAND_LINES = list(commands())
PLAIN = [block for block in blocks("python") if block.tested == "plain"]


def parsed(line: str) -> Any:
    """The command as its frozen dataclass, not carried out; "..." stands for what the command before it said."""
    line = line.replace(" ... ", " --stream 'synthetic()' --out runs/x ")
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="perdure", args=shlex.split(line, comments=True)[1:], config=(tyro.conf.OmitArgPrefixes,)
    )


def test_there_are_commands_and_code_on_the_pages() -> None:
    assert len(COMMAND_LINES) > 20
    assert len(PLAIN) >= 3


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{page}: {line[:60]}" for page, line in COMMAND_LINES])
def test_every_command_on_the_pages_parses(page: str, line: str) -> None:
    command = parsed(line)
    if isinstance(command, Tune):
        check_ends(RunConfig(stream=command.stream, method=command.method), parse_space(command.space))
        return
    for text in (getattr(command, "method", None), *getattr(command, "methods", ())):
        if text:
            make_method(text)
    if getattr(command, "objective", None):
        make_objective(command.objective)
    if getattr(command, "stream", None):
        build(parse_one(command.stream), STREAMS, "stream")
    if getattr(command, "backbone", None):
        spec = parse_one(command.backbone)  # not built: that would read weights
        inspect.signature(BACKBONES[spec.name]).bind(**dict(spec.kwargs))


def test_a_command_with_an_unknown_flag_does_not_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("perdure run --stream 'synthetic()' --out x --no-such-flag 1")
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("block", list(blocks("python")), ids=str)
def test_python_on_the_pages_is_python(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("block", PLAIN, ids=str)
def test_marked_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for month, colours in (("january", ("red", "green")), ("february", ("blue", "white"))):
        for colour in colours:
            folder = tmp_path / "photos" / month / colour
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20 + i, 20), colour).save(folder / f"{i}.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "cat.jpg")
    exec(compile(block.text.replace('"pocket()"', '"tiny()"').replace("rank=10", "rank=2"), block.page, "exec"), {})


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The method of `docs/write-a-method.md`, as a module of its own."""
    (example,) = [block for block in blocks("python") if block.tested == "l2sp"]
    (tmp_path / "l2sp.py").write_text(example.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("l2sp")
    yield METHODS["l2sp"]
    del METHODS["l2sp"], sys.modules["l2sp"]


def test_a_method_in_one_file_learns_and_resumes_in_the_middle_of_a_task(
    newcomer: type, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    lab.run("lora(rank=2) + l2sp(strength=0.5)", tmp_path / "unbroken")
    lab.broken_run("lora(rank=2) + l2sp(strength=0.5)", tmp_path / "broken", (1, 3), save_every=2)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "unbroken")


def test_the_example_method_pulls_parameters_back(newcomer: type, lab: Any) -> None:
    def drift(strength: float) -> float:
        learner, tasks = lab.learner(f"lora(rank=2) + l2sp(strength={strength})"), lab.stream().tasks
        first, second = (
            {k: v.clone() for k, v in lab.teach(learner, [task]).learnt_state().items()} for task in tasks[:2]
        )
        return sum(float((second[k] - value).square().sum()) for k, value in first.items() if ".up." in k)

    assert drift(100.0) < 0.5 * drift(0.0)


def test_the_example_method_is_short(newcomer: type) -> None:
    (example,) = [block for block in blocks("python") if block.tested == "l2sp"]
    body = [line for line in example.text.partition("class ")[2].splitlines() if line.strip()]
    assert len(body) <= 20


def _slug(heading: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_inside_the_pages_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {_slug(heading.replace("`", "")) for heading in headings}, f"{target}: no such heading"


NAMED = sorted(
    {
        (str(p.relative_to(ROOT)), path)
        for p in PAGES
        if p.name != "CHANGELOG.md"  # what is past has the names of its time
        for path in re.findall(r"\bperdure(?:\.\w+)+", p.read_text("utf-8"))
    }
)


@pytest.mark.parametrize(("page", "path"), NAMED, ids=lambda each: str(each))
def test_what_a_page_names_by_its_path_is_there(page: str, path: str) -> None:
    module, _, name = path.rpartition(".")
    if importlib.util.find_spec(module) is None or not hasattr(importlib.import_module(module), name):
        assert importlib.util.find_spec(path) is not None


HOOKS = {name for name, value in vars(Method).items() if inspect.isfunction(value) and not name.startswith("_")}


@pytest.mark.parametrize("name", OURS)
def test_a_card_explains_hooks_that_methods_have(name: str) -> None:
    text = (ROOT / f"docs/methods/{name}.md").read_text("utf-8")
    told = text.partition("**Hooks")[2].partition("**Options.**")[0]
    named = re.findall(r"^\| `(\w+)`", told, re.M) + re.findall(r"`(\w+)`(?:, \w+)?: ", told)
    assert set(named) <= HOOKS
    assert not set(re.findall(r"`(\w+)`", told)) & set(FORMER_HOOKS)


def test_every_page_is_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = {file: title for title, file in re.findall(r"- (.+): ([\w./-]+\.md)$", site, flags=re.M)}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {name for name in pages if ".zh-CN" not in name} == set(listed)
    for page in TWINS:
        assert page.parent == ROOT or f"            {listed[page.name]}: " in site.partition("nav_translations")[2], (
            page
        )


TWINS = sorted(page for page in PAGES if page.with_suffix(".zh-CN.md").is_file())


def _parts(text: str) -> dict[str, Any]:
    """What two pages have in common that say the same in different languages."""
    found = list(_BLOCK.finditer(text))
    shown = [
        (each["kind"], each["kind"] != "text" and "".join(line.split("#")[0] for line in each["text"].splitlines()))
        for each in found
    ]
    rest = _BLOCK.sub("", text)
    links = [link.partition("#")[0].replace(".zh-CN", "") for link in re.findall(r"\]\((\S+?)\)", rest)]
    return {
        "blocks": shown,
        "links": sorted(links),  # of languages that order their sentences in different ways
        "code": {re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", rest)},
        "tables": [line.count("|") for line in rest.splitlines() if line.startswith("|")],
        "headings": re.findall(r"^#+ ", rest, flags=re.M),
        "items": len(re.findall(r"^- ", rest, flags=re.M)),
    }


@pytest.mark.parametrize("page", [page for page in TWINS if page.parent != ROOT], ids=lambda page: page.name)
def test_a_page_in_chinese_has_the_code_links_and_tables_of_the_english_one(page: Path) -> None:
    english, chinese = (_parts(each.read_text(encoding="utf-8")) for each in (page, page.with_suffix(".zh-CN.md")))
    for part in english:
        assert chinese[part] == english[part], part


@pytest.mark.parametrize("page", TWINS, ids=lambda page: page.name)
def test_a_page_and_its_twin_lead_to_each_other_and_readers_stay_in_their_language(page: Path) -> None:
    twin = page.with_suffix(".zh-CN.md")
    english, chinese = (each.read_text(encoding="utf-8") for each in (page, twin))
    assert f"]({twin.name})" in english
    assert f"]({page.name})" in chinese
    links = [page.parent / link.partition("#")[0] for link in re.findall(r"\]\((\S+?)\)", chinese)]
    assert [link for link in links if link in TWINS and link != page] == []


def test_made_tables_are_the_same_in_both_languages() -> None:
    spec = importlib.util.spec_from_file_location("measured", ROOT / "benchmarks/measured.py")
    assert spec
    assert spec.loader
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    english, chinese = (ROOT / f"docs/choosing{end}.md" for end in ("", ".zh-CN"))
    for part in measured.PARTS:
        made = measured.in_chinese(measured.part_of(english.read_text(encoding="utf-8"), part))
        assert made.count("|") > 50
        assert measured.part_of(chinese.read_text(encoding="utf-8"), part) == made, "run: python benchmarks/measured.py"


def _table(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table below `heading`, by their first cell; `|` never stands in our cells."""
    below = text.split(heading, 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", below, flags=re.M)
    assert lines, f"no table below {heading!r}"
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[0].splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("name", OURS)
def test_every_method_has_a_card_with_its_options_and_defaults(name: str) -> None:
    card = ROOT / "docs/methods" / f"{name}.md"
    assert card.is_file(), f"write docs/methods/{name}.md"
    text = card.read_text(encoding="utf-8")
    options = {
        k: p.default
        for k, p in inspect.signature(METHODS[name]).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if not options:
        assert "**Options.** None." in text
        return
    table = _table(text, "**Options.**")
    assert {k: ast.literal_eval(cells[0].strip("`")) for k, cells in table.items()} == options
    assert {k: cells[1] for k, cells in table.items() if cells[1]} == described(METHODS[name]).ranges


@pytest.mark.parametrize("name", OURS)
def test_every_card_has_the_same_parts(name: str) -> None:
    text = (ROOT / "docs/methods" / f"{name}.md").read_text(encoding="utf-8")
    for part in ("**Idea.**", "**Hooks", "**Options.**", "**Cost.**", "**Differs.**", "**Choose it**", "```bash\n"):
        assert part in text, f"no {part}"
    assert f"]({name}.md)" in (ROOT / "docs/methods/index.md").read_text(encoding="utf-8")
    module = inspect.getmodule(METHODS[name])
    assert module is not None
    for number in re.findall(r"arXiv:\d{4}\.\d{5}", module.__doc__ or ""):
        assert number in text, f"the module cites {number}, the card does not"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_short_and_has_both_commands(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.search(r"```bash\n(make .*?)```", text, flags=re.S)
    assert found
    assert re.findall(r"^make \w+", found[1], flags=re.M) == ["make demo", "make test"]
    assert len(text.splitlines()) <= 90
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert ("README.zh-CN.md" if readme == "README.md" else "README.md") in text


def test_both_readmes_have_the_same_commands_and_links() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))

    def said(text: str) -> tuple[list[str], list[str]]:
        code = re.findall(r"^```\w+\n(.*?)^```", text, flags=re.S | re.M)
        links = {link.replace(".zh-CN", "") for link in re.findall(r"\]\((.*?)\)", text)}
        return [re.sub(r" *# .*", "", block) for block in code], sorted(links)

    assert said(english) == said(chinese)


def test_the_reference_lists_every_command_and_every_key_of_the_summary(lab: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert list(_table(text, "## Commands")) == list(COMMANDS)
    sequence = "sequence(synthetic(), synthetic(noise=0.5))"
    few = "fewshot(synthetic(classes_per_task=5), ways=2)"
    kinds = {
        "zeroshot": {"stream": sequence, "retain": ("synthetic(tasks=2)",)},
        "classify": {"stream": few, "early_stop": 1},
        "retrieve": {},
    }
    kinds["classify(cosine=True)"] = {"online": True, "epochs": 1}
    runs = [lab.but(objective=o, tasks=2).run("probe", tmp_path / o, **more) for o, more in kinds.items()]
    for name in ("a", "b", "c"):
        spoken = [("user", "a?"), ("assistant", "b")]
        line = json.dumps({"messages": [{"role": role, "content": said} for role, said in spoken]})
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n" * 5)
    taught, scored, held = (f"conversations(path={str(tmp_path / n)!r}" for n in ("a.jsonl", "b.jsonl", "c.jsonl"))
    for stream in (f"{taught})", f"in_turn({taught}), {scored}, score='cider'))"):
        config = RunConfig(
            stream=stream,
            backbone="tiny_mllm()",
            objective="generate(tokens=2)",
            method="probe",
            retain=(f"{held})",),
            precision="fp32",
        )
        runs.append(run(config, tmp_path / str(len(runs))))
    keys = {key for summary in runs for key in summary}
    assert {key for keys in _table(text, "## `summary.json`") for key in keys.split("`, `")} == keys


@pytest.mark.parametrize("end", ["", ".zh-CN"])
def test_options_of_captions_stand_on_the_page_with_their_defaults(end: str) -> None:
    text = (ROOT / f"docs/bring-your-data{end}.md").read_text(encoding="utf-8")
    shown = dict(option.split("=") for option in _table(text, "--objective retrieve"))
    options = {k: p.default for k, p in inspect.signature(STREAMS["captions"]).parameters.items() if k != "path"}
    assert {k: ast.literal_eval(v) for k, v in shown.items()} == options


def test_no_page_refers_to_a_folder_of_one_machine() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|Users)/", text), page


def test_the_architecture_answers_each_question_with_one_file() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    answers = {
        "replay buffer": "class ReplayBuffer",
        "classifier of an export": "def head_of",
        "end of a task": "method.end_task(learner, task)",
        "prompt pool": "class PromptPool",
        "may be cached": "class Cache",
    }
    questions = re.findall(r"^- \[([^]]+\?)\]\((\S+)\)$", text, flags=re.M)
    assert len(questions) == len(answers)
    for (question, link), (subject, words) in zip(questions, answers.items(), strict=True):
        assert subject in question
        assert words in (ROOT / "docs" / link).read_text(encoding="utf-8")


def test_the_architectures_tree_names_every_file_and_no_other() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    tree = text.partition("## The tree")[2].partition("## Nouns")[0]
    named: set[str] = set()
    package = ""
    for line in tree.partition("```text")[2].partition("```")[0].strip().splitlines():
        if found := re.match(r"(\w+)/", line):
            package = found[1]
        named |= {f"{package}/{name}".lstrip("/") for name in re.findall(r"\b(\w+\.py)\b", line)}
    source = ROOT / "src/perdure"
    there = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    assert named <= there
    whole = {"methods", "scoring"}  # one line for all of their files
    left_out = {name for name in there - named if name.partition("/")[0] not in whole}
    assert all(name.endswith(("__init__.py", "__main__.py")) or "/conversation_" in name for name in left_out), left_out
