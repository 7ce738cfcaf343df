"""Any text of options and any number: refused in one line or accepted, at once, and within little memory."""

import contextlib
import gc
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.backbones import BACKBONES
from perdure.backbones.tiny import tiny
from perdure.cli.commands import COMMANDS
from perdure.cli.suggestions import command_of
from perdure.core.learner import Core
from perdure.core.method import METHODS
from perdure.objectives import OBJECTIVES
from perdure.options.ranges import Range, hints_of
from perdure.streams import STREAMS, build_stream
from perdure.training.config import RunConfig, make_backbone, make_method, make_objective, register
from perdure.types import Task

register()
SECONDS, BYTES = 5, 2**31
# Those that read the network or weights of others are about neither options nor numbers.
ELSEWHERE = {"pocket", "timm", "vision", "clip", "chinese_clip", "open_clip", "dual"}
REGISTRIES: dict[str, dict[str, Any]] = {
    "method": METHODS,
    "stream": STREAMS,
    "backbone": {name: made for name, made in BACKBONES.items() if name not in ELSEWHERE},
    "objective": OBJECTIVES,
}
WRITTEN = "0 -1 1 2 3 7 100 4096 100000 1000000 10**9 1000000000 -9223372036854775809 0.5 -0.0 1e-300 5e-324 1e300"
NUMBERS = [*WRITTEN.split(), "-1e300", "1e999", "1_000", "0x7fffffff", "nan", "1" * 400, "1" * 5000]
QUOTED = r"'' 'a' '\0' '\ud800' '\x1b[2J' '[/b]' '0-99999999999' '1e400MB' '../..'"
TEXTS = [*QUOTED.split(), f"'{'x' * 100_000}'"]
OTHERS = ["None", "True", "()", "[]", "(1, 2)", "(0,)", "[1e300]", "((((1,),),),)", "[[]] * 9", "{}", "x", "lambda: 0"]
OTHERS += ["b'1'", "[" * 90 + "]" * 90, "(" * 300 + ")" * 300, "-" * 500 + "1", f"({'9, ' * 20_000})"]
FLAGS = [
    f for f, hint in hints_of(RunConfig).items() if any(isinstance(m, Range) for m in getattr(hint, "__metadata__", ()))
]


def written(draw: random.Random, kind: str) -> str:
    """A text that names something of a kind, with some of its options and some mischief."""
    registry = REGISTRIES[kind]
    name = draw.choice(sorted(registry))
    hints = {k: h for k, h in hints_of(registry[name]).items() if k not in ("return", "streams")}
    chosen = draw.sample(sorted(hints), draw.randint(0, min(3, len(hints))))
    given = []
    for option in chosen:
        ends = [str(end) for each in _ranges(hints[option]) for end in (int(each.least), int(each.most))]
        pool = draw.choice([NUMBERS, ends or NUMBERS, ends or NUMBERS, TEXTS, OTHERS])
        given.append(f"{option}={draw.choice(pool)}")
    text = f"{name}({', '.join(given)})"
    if kind == "method" and draw.random() < 0.4:
        text += f" + {written(draw, kind)}"
    if kind == "stream" and draw.random() < 0.1:
        text = f"sequence({text}, {written(draw, kind)})"
    if draw.random() < 0.2:
        place = draw.randrange(len(text) + 1)
        text = (
            text[:place]
            + draw.choice(["(", ")", "'", ",", "=", "+", "#", "\0", "\n", "\ud800", "**", " "])
            + text[place:]
        )
    return text


def _ranges(hint: Any) -> list[Range]:
    parts = [*getattr(hint, "__metadata__", ()), *getattr(hint, "__args__", ())]
    return [r for each in parts for r in ([each] if isinstance(each, Range) else _ranges(each))]


def asked(number: int) -> tuple[str, Callable[[], Any]]:
    """What input number `number` is, and how it is asked for: made, grown for two tasks or read."""
    draw = random.Random(number)
    kind = draw.choice(["method", "method", "stream", "backbone", "objective", "flag"])
    if kind == "flag":
        flag, value = draw.choice(FLAGS), draw.choice(NUMBERS + TEXTS)
        return f"--{flag} {value}", lambda: _flag(flag, value)
    text = written(draw, kind)
    made: dict[str, Callable[[], Any]] = {
        "method": lambda: _grown(text),
        "stream": lambda: build_stream(text, tiny().preprocess, 0),
        "backbone": lambda: make_backbone(text),
        "objective": lambda: make_objective(text),
    }
    return text, made[kind]


def _flag(name: str, value: str) -> None:
    words = ["run", "--stream", "synthetic()", "--out", "x", f"--{name.replace('_', '-')}", value]
    command_of(words, COMMANDS)


def _grown(text: str) -> None:
    learner = Core(tiny(text=True), make_objective("zeroshot()"), make_method(text))
    for number in range(2):
        names = tuple(f"{number} {c}" for c in "ab")
        learner.grow(Task(number, f"{number}", (2 * number, 2 * number + 1), names, 2))


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Within, `BYTES` more cannot be had."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limits")
@pytest.mark.parametrize("inputs", [range(100), pytest.param(range(100, 1000), marks=pytest.mark.slow)], ids=str)
def test_any_options_are_refused_in_one_line_or_accepted_at_once(
    inputs: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accepted = 0
    with little_memory():
        for number in inputs:
            text, ask = asked(number)
            start = time.process_time()
            try:
                ask()
                accepted += 1
            except ValueError:
                pass
            except Exception as error:  # a traceback for whoever typed it
                pytest.fail(f"{number}: {text[:300]}: {type(error).__name__}: {str(error)[:300]}")
            assert time.process_time() - start < SECONDS, f"{number}: {text[:300]}"
    assert len(inputs) * 0.05 < accepted < len(inputs) * 0.7
