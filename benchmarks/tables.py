"""A Markdown table of runs, from any number of folders with runs of one experiment in them; one row per method.

python benchmarks/tables.py runs/cifar
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from perdure.reporting.runs import RunResults

SHARES = {
    "acc": "acc",
    "aaa": "aaa",
    "forgetting": "forgetting",
    "acc_with_task_id": "with task id",
    "forgetting_with_task_id": "forgetting with task id",
    "task_id_acc": "task-id acc",
}


def share(values: list[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread}"


def main() -> None:
    folders = sorted({file.parent for each in sys.argv[1:] for file in Path(each).rglob("summary.json")})
    print("| method | orders | " + " | ".join(SHARES.values()) + " | trained / task | stored | seconds |")
    print("|---" * (len(SHARES) + 5) + "|")
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in map(RunResults.read, folders):
        runs.setdefault(run.method, []).append(run.summary)
    for method, found in runs.items():
        shares = " | ".join(share([each.get(key) for each in found]) for key in SHARES)
        seconds = sum(sum(sum(task.values()) for task in each["seconds_per_task"]) for each in found) / len(found)
        stored = sum(each["stored_bytes"] for each in found) / len(found) / 1e6
        trained = max(each["trainable_parameters"] for each in found)
        print(f"| `{method}` | {len(found)} | {shares} | {trained:,} | {stored:.2f} MB | {seconds:,.0f} |")


if __name__ == "__main__":
    main()
