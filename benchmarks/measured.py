"""The table that `perdure advise` answers from, made of finished runs, and its copies in both pages on choosing.

    python benchmarks/measured.py runs/cifar runs/prompts --seeds 0 1 2
    python benchmarks/measured.py runs/again --keep    # these methods anew, and what was measured before
    python benchmarks/measured.py        # without runs: the English page's tables, in Chinese, into the Chinese page

Folders are grids' (with their steps.json), or any with runs in them. Running a finished grid's `perdure compare` once
more measures the step costs that it lacks.
"""

import argparse
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from perdure.formatting import human_bytes, times
from perdure.reporting import charts
from perdure.reporting.advise import growth
from perdure.reporting.runs import steps_of
from perdure.reporting.tables import settings_of

ROOT = Path(__file__).parents[1]
PARTS = ("measured", "families")  # what is made by programs, between `begin` and `end`
TITLES = ("method", "orders", "accuracy", "new task", "forgetting", "with task id", "stored", "a task more", "step")
TITLES += ("keeps old data",)
DIGITS = 5  # significant ones
CHINESE = {
    **{"method": "方法", "orders": "顺序数", "accuracy": "准确率", "new task": "新任务", "forgetting": "遗忘"},
    **{"with task id": "知道任务时", "stored": "存储", "a task more": "每多一个任务", "step": "每步"},
    **{"keeps old data": "保存旧数据", "yes": "是", "no": "否", "none": "无", "not measured": "未测"},
    "measured apart": "另行测量",
    **{"family": "家族", "best of it": "其中最好的", "lines": "代码行数", "growing structure": "增长结构"},
    **{"replay": "回放", "isolation and regularisation": "隔离与正则化", "distillation": "蒸馏"},
    **{"elastic representations": "弹性表示", "meta-learning": "元学习", "cooperating specialists": "协作的专家"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="others are left out")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--keep", action="store_true", help="rows of the table that is there, where there is none anew")
    parser.add_argument("--steps", type=Path, help="folder with a steps.json for rows that have none beside them")
    parser.add_argument("--out", type=Path, default=ROOT / "src/perdure/reporting/measured.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/choosing.md")
    options = parser.parse_args()
    if options.folders:
        measured(options)
    twin = options.page.with_suffix(".zh-CN.md")
    if not twin.is_file():
        return
    english, chinese = options.page.read_text(encoding="utf-8"), twin.read_text(encoding="utf-8")
    for part in PARTS:
        chinese = replaced(chinese, part, in_chinese(part_of(english, part)))
    twin.write_text(chinese, encoding="utf-8")


def measured(options: argparse.Namespace) -> None:
    """Writes the table and the English page."""
    settings = settings_of(options.folders, options.seeds, shorten=True)
    steps = steps_of(options.steps)["methods"] if options.steps else {}
    for setting in settings:
        setting["rows"] = [row for row in setting["rows"] if row["method"] not in options.without]
        for row in setting["rows"]:
            row["step"] = row["step"] or steps.get(row["method"])
    if options.keep:
        settings = kept(json.loads(options.out.read_text(encoding="utf-8"))["settings"], settings)
    for setting in settings:
        setting["rows"].sort(key=lambda row: -row["after"]["acc"][-1][0])
    options.out.write_text(in_json({"settings": settings}), encoding="utf-8")
    tables = "\n".join(table(setting) for setting in settings)
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(replaced(page, "measured", f"\n\n{tables}\n"), encoding="utf-8")
    for setting in settings:
        print(f"{setting['data']}, {setting['tasks']} tasks, {setting['backbone']}: {len(setting['rows'])} methods")


def kept(before: list[dict[str, Any]], anew: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured before, with the rows in its place that were measured anew, and the days of both.

    Raises:
        ValueError: when something new was measured in a setting that is not among the former ones.
    """
    same = ("data", "scenario", "tasks", "classes", "images", "test_images", "backbone", "fingerprint")

    def alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
        decided = [(old[what][name], new[what][name]) for what in ("training", "computed") for name in old[what]]
        return all(old[name] == new[name] for name in same) and all(a == b for a, b in decided)

    for new in anew:
        found = [old for old in before if alike(old, new)]
        if len(found) != 1:
            raise ValueError(f"{new['command']}: not a setting of the table, whose rows --keep keeps")
        [old] = found
        rows = {(row["method"], row.get("backbone")): row for row in old["rows"]}
        for row in new["rows"]:
            key = row["method"], row.get("backbone")
            row["step"] = row["step"] or rows.get(key, {}).get("step")
            rows[key] = row
        old["rows"], old["created"] = list(rows.values()), sorted({*old["created"], *new["created"]})
    return before


def part_of(page: str, part: str) -> str:
    """What stands between the marks of a part."""
    return page.partition(f"<!-- {part}: begin -->")[2].partition(f"<!-- {part}: end -->")[0]


def replaced(page: str, part: str, text: str) -> str:
    before, begin, rest = page.partition(f"<!-- {part}: begin -->")
    return "".join((before, begin, text, *rest.partition(f"<!-- {part}: end -->")[1:]))


def in_chinese(tables: str) -> str:
    """Made tables with their words in Chinese; numbers, methods and commands are the same in every language."""
    lines = []
    for line in tables.splitlines(keepends=True):
        if line.startswith("| "):
            cells = [CHINESE.get(cell.strip(), cell.strip()) for cell in line.strip("|\n").split("|")]
            line = re.sub(r"(`.*?`) on (`.*?`)", r"\2 上的 \1", f"| {' | '.join(cells)} |\n")
        elif line.endswith(".\n"):
            line = re.sub(r", (\d+) tasks, (?:(\d+) classes|class-incremental), ", _setting, line)
            line = line.replace("`, ", "`，").replace(" to ", " 至 ").replace(".\n", "。\n")
        lines.append(line)
    return "".join(lines)


def _setting(found: re.Match[str]) -> str:
    return f"，{found[1]} 个任务，{f'{found[2]} 个类别' if found[2] else '类增量'}，"


def table(setting: dict[str, Any]) -> str:
    """The rows after the last task, in Markdown."""
    days = " to ".join(dict.fromkeys((setting["created"][0], setting["created"][-1])))
    lines = [
        f"{setting['data']}, {setting['tasks']} tasks, {setting['classes']} classes, `{setting['backbone']}`, {days}.",
        "",
        f"| {' | '.join(TITLES)} |",
        "|---" * len(TITLES) + "|",
    ]
    for row in setting["rows"]:
        after = row["after"]
        numbers = [share(after[k][-1]) for k in ("acc", "new_task_acc", "forgetting", "acc_with_task_id")]
        grown = growth(after["stored_bytes"])
        more = human_bytes(statistics.median(grown)) if grown else "–"
        cells = [
            *numbers,
            human_bytes(after["stored_bytes"][-1][0]),
            more,
            times(row["step"]),
            "yes" if row["referenced_bytes"] else "no",
        ]
        other = f" on `{row['backbone']}`" if row.get("backbone") else ""
        lines.append(f"| `{row['method']}`{other} | {len(row['seeds'])} | {' | '.join(cells)} |")
    backbones = dict.fromkeys(row.get("backbone", "") for row in sorted(setting["rows"], key=lambda r: "backbone" in r))
    commands = [" \\\n  ".join([setting["command"], *asked(setting, backbone)]) for backbone in backbones]
    return "\n".join([*lines, "", "```bash", *commands, "```", ""])


def asked(setting: dict[str, Any], backbone: str) -> list[str]:
    """What the command for rows of `backbone`, or of the setting's, lacks, in lines."""
    rows = [row for row in setting["rows"] if row.get("backbone", "") == backbone]
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    other = f"--backbone {shlex.quote(backbone)} " if backbone else ""
    lines = [
        f"{other}--seeds {' '.join(map(str, seeds))} --out runs/measured{'-layers' if backbone else ''}",
        "--methods",
    ]
    for method in map(shlex.quote, (row["method"] for row in rows)):  # a shell keeps a line's end within quotes
        fits = len(lines[-1]) + len(method) < 116
        lines[-1:] = [f"{lines[-1]} {method}"] if fits else [lines[-1], method]
    return lines


def share(pair: Any) -> str:
    if pair is None:
        return "–"
    return charts.percent(pair[0]) + ("" if pair[1] is None else f" ± {charts.percent(pair[1])}")


def in_json(content: dict[str, Any]) -> str:
    """Readable, with lists of numbers on one line."""
    lines = []
    for setting in rounded(content)["settings"]:
        head = json.dumps({k: v for k, v in setting.items() if k != "rows"}, ensure_ascii=False)[1:-1]
        rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in setting["rows"])
        lines.append(f'{{{head}, "rows": [\n{rows}\n]}}')
    return f'{{"settings": [\n{",".join(lines)}\n]}}\n'


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        # whole bytes stay: of two sizes of 14 MB the difference, what a task more takes, may be 10 kB
        found = float(f"{round(value, 6):.{DIGITS}g}") if abs(value) < 10**DIGITS else round(value)
        return int(found) if found == int(found) else found
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
