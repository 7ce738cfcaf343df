"""Numbers, sizes and texts as people read and write them."""

import difflib
import math
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Pair = Sequence[float | None] | None
"""Mean and standard deviation; None where nothing was measured."""

_SAID = ("lenient_acc", "lenient_forgetting", "empty", "unparsable", "answers_kept_strict", "answers_kept_lenient")
OF_STREAMS = ("transfer", "average", "performance_drop", "harmonic_mean", "anytime_acc")
"""Scores that only some streams have."""
RARE = (*OF_STREAMS, "zero_shot_ratio", *_SAID)
"""What a summary has of some streams (sequences of data sets, few-shot ones, passes without borders), with held-out
data, and of answers in words."""


class Aside(str):
    """A note on what happens, which who asks for results alone (`--quiet`) need not read."""

    __slots__ = ()


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'."""
    if count < 0:
        return f"-{human_bytes(-count)}"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def human_seconds(seconds: float) -> str:
    """2.34 -> '2.3 s', 754 -> '13 min', 9000 -> '2.5 h'."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def percent_with_spread(value: Pair) -> str:
    """(0.155, 0.021) -> '15.5 ±2.1'."""
    if value is None or value[0] is None:
        return "–"
    spread = f" ±{100 * value[1]:.1f}" if value[1] is not None else ""
    return f"{100 * value[0]:.1f}{spread}"


def number(value: Pair) -> str:
    """(1234.5, 20) -> '1,234'."""
    return "–" if value is None or value[0] is None else f"{value[0]:,.0f}"


def counted(count: int, one: str, several: str = "") -> str:
    """(1, "trial") -> '1 trial', (2, "class", "classes") -> '2 classes'."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def settings(options: Mapping[str, Any]) -> str:
    """{"rank": 8, "lr": 0.00123456} -> 'rank=8, lr=0.001235'."""
    return ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v!r}" for n, v in options.items())


def rate(lr: float, images_per_second: Sequence[float] | None) -> str:
    """A learning rate; '–' where no image was trained on in any task."""
    return f"{lr:g}" if images_per_second and images_per_second[0] else "–"


def times(step: dict[str, Any] | None) -> str:
    """What a step costs: a multiple of plain LoRA's, 'none' without steps, '–' where it is not known."""
    if step is None or (step["ratio"] is None and step.get("why") != "no steps"):
        return "–"
    return "none" if step["ratio"] is None else f"{step['ratio']:.2f}"


def shortened(text: str, most: int = 200) -> str:
    """The beginning and the end of a text that is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"


_USUAL = {
    **dict.fromkeys(("learning_rate", "eta", "step_size"), "lr"),
    **dict.fromkeys(("r", "lora_r", "dim"), "rank"),
    **dict.fromkeys(("lora_alpha", "scaling"), "alpha"),
    **dict.fromkeys(("bs", "batch", "per_device_train_batch_size"), "batch_size"),
    **dict.fromkeys(("num_epochs", "epoch", "num_train_epochs"), "epochs"),
    **dict.fromkeys(("target_modules", "modules"), "at"),
    **dict.fromkeys(("lambda", "reg", "weight"), "strength"),
    **dict.fromkeys(("buffer_size", "memory_size", "mem_size"), "size"),
    **dict.fromkeys(("model", "network"), "backbone"),
    **dict.fromkeys(("dataset", "data"), "stream"),
    **dict.fromkeys(("output", "output_dir", "out_dir"), "out"),
    **dict.fromkeys(("slca", "layup"), "align"),
    **dict.fromkeys(("er", "experience_replay", "rehearsal"), "replay"),
    **dict.fromkeys(("der", "der++"), "derpp"),
    **dict.fromkeys(("sgd", "sequential", "finetuning"), "finetune"),
    **dict.fromkeys(("linear_probe", "frozen"), "probe"),
    "a_gem": "agem",
    "threshold": "keep",
}
"""What others call it -> our name."""


def command(*words: object) -> str:
    """A command of perdure as a message names it, to be pasted: in quotes, where its words need none of their own."""
    line = shlex.join(["perdure", *map(str, words)])
    return line if "'" in line else f"'{line}'"


def meant(word: str, known: Iterable[str]) -> str:
    """What to add to an error message about a word: the nearest of those that are known, if one is near."""
    spelt = {each.lower(): each for each in known}
    plain = word.lower()
    usual = _USUAL.get(plain.lstrip("-").replace("-", "_"), "")
    for meaning in (usual, f"--{usual}".replace("_", "-")):
        if usual and meaning in spelt:
            return f"; did you mean {spelt[meaning]!r}?"
    # a sum in another order, of which difflib takes the last part to be meant
    near = [each for each in spelt if "+" in each and sorted(each.split("+")) == sorted(re.split(r"\s*\+\s*", plain))]
    near = near or (difflib.get_close_matches(plain, list(spelt), n=1) if len(word) < 100 else [])
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def printable(text: str, escaped: Callable[[str], str] | None = None) -> str:
    """A text on one line, with escapes such as `\\x1b` for what would steer a terminal or turn the reading direction.

    Names of classes and files, and what is said of them, come from anywhere: a control character in one could clear the
    screen, colour or hide what follows, or forge a line of its own.

    Args:
        text: what is to be shown.
        escaped: what stands for a character that is not; as Python writes it when None.
    """
    if text.isprintable():
        return text
    escaped = escaped or (lambda character: character.encode("unicode_escape").decode("ascii"))
    return "".join(character if _harmless(character) else escaped(character) for character in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines, such as a document."""
    return "\n".join(map(printable, text.split("\n")))


def _harmless(character: str) -> bool:
    # Wide and unbreakable spaces are blanks; joiners are part of words in some scripts, and of emoji.
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}


def count_bytes(text: float | str, named: str = "bytes=") -> int:
    """The number of bytes that `text` means; kB is 1000, as in what the console shows, and KiB 1024.

    Raises:
        ValueError: when it is no positive number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, or none.
    """
    count = _counted(text) if isinstance(text, str) else text
    if not (math.isfinite(count) and count >= 1):
        raise ValueError(f"{named}{text!r}: expected a positive number of bytes, such as 50e6, 50MB or 50MiB")
    return int(count)


def _counted(text: str) -> float:
    found = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\d+)?) *([a-z]*)", text.strip().lower())
    return float(found[1]) * _UNITS.get(found[2], math.nan) if found else math.nan


def room_for(count: float, what: str) -> None:
    """Raise a `ValueError` when `what` would need more than this machine has free: before anything is allocated.

    An allocation that is too large may seem to succeed, and the process be killed when the memory is used.
    """
    import psutil  # here: advice, which reads numbers of bytes too, needs it not

    free = psutil.virtual_memory().available
    if count > free:
        raise ValueError(f"{what} takes {human_bytes(count)} of memory, and {human_bytes(free)} are free: give less")


def told_apart(folders: Sequence[Path], between: str = "/") -> list[str]:
    """Names of folders: the last part of each, and as much of what they lie in as tells those of one name apart."""
    parts = [folder.absolute().parts for folder in folders]
    names = [each[-1] for each in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        longer = [between.join(each[-length:]) for each in parts]
        names = [more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)]
    return names


def spread_of(methods: Sequence[tuple[str, int, str | None]]) -> list[str]:
    """What ± is of in a table: a sentence without its end, or one for each way in which repetitions differ.

    Args:
        methods: each with how many runs it has, and in what they differ as `reporting.runs.varied` says it, or None
            where that is not known.
    """
    ways: dict[tuple[int, str], list[str]] = {}
    for method, runs, varied in methods:
        if runs > 1 and varied is not None:
            ways.setdefault((runs, varied), []).append(method)
    return [
        f"± is the standard deviation over {runs} runs that differ in {varied or 'nothing but their seed'}"
        + (f" ({', '.join(map(printable, names))})" if len(ways) > 1 else "")
        for (runs, varied), names in ways.items()
    ]
