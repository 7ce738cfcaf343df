"""Markdown tables of grids that `perdure compare` wrote.

python benchmarks/tables.py runs/cifar
"""

import json
import sys
from pathlib import Path

COLUMNS = {
    "acc": "acc",
    "aaa": "aaa",
    "forgetting": "forgetting",
    "acc_with_task_id": "with task id",
    "forgetting_with_task_id": "forgetting with task id",
    "task_id_acc": "task-id acc",
}


def share(value: list[float | None] | None) -> str:
    if value is None or value[0] is None:
        return "–"
    return f"{100 * value[0]:.1f}" + (f" ± {100 * value[1]:.1f}" if value[1] is not None else "")


def main() -> None:
    print("| method | " + " | ".join(COLUMNS.values()) + " | trained / task | stored | seconds |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for folder in sys.argv[1:]:
        for row in json.loads((Path(folder) / "compare.json").read_text()):
            shares = " | ".join(share(row[key]) for key in COLUMNS)
            stored = f"{row['stored_bytes'][0] / 1e6:.2f} MB"
            seconds = f"{row['seconds'][0]:,.0f}"
            print(f"| {row['method']} | {shares} | {row['trainable_parameters']:,} | {stored} | {seconds} |")


if __name__ == "__main__":
    main()
