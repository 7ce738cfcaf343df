"""CPU seconds (user and system) of commands that compute nothing, each in a fresh process: the least of several.

python benchmarks/start_up.py
"""

import os
import subprocess
import sys
import tempfile

COMMANDS = (
    "--help",
    "list methods",
    "list streams",
    "list methods lora",
    "run --help",
    "lst",
    "run --methd lora",
    "advise",
)
TIMES = 7


def cpu_seconds(words: list[str]) -> float:
    before = os.times()
    subprocess.run(words, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        python = min(cpu_seconds([sys.executable, "-c", ""]) for _ in range(TIMES))
        print(f"{'python by itself':<20}{python:.2f} s")
        for command in COMMANDS:
            words = [sys.executable, "-m", "perdure", *command.split()]
            print(f"{command:<20}{min(cpu_seconds(words) for _ in range(TIMES)):.2f} s")


if __name__ == "__main__":
    main()
