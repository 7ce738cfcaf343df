"""What a sweep searches, `rank=4..32, lr=1e-4..1e-2 log, blocks=["0-4", None]`, and texts with holes, `lora(rank=?)`.

As values only; nothing here computes.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perdure.formatting import meant
from perdure.options.spec import Spec, parse

_FORM = "write it like 'rank=4..32, lr=1e-4..1e-2 log, blocks=[\"0-4\", None]'"
_HOLE = re.compile(r"=\s*\?\s*(\w*)")


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; whole where both are `int`, even in their logarithm if `log`."""

    low: int | float
    high: int | float
    log: bool = False


Space = dict[str, Interval | tuple[Any, ...]]
"""Name of an option -> the interval, or the choices, that it is taken from."""


def parse_space(text: str) -> Space:
    """Read a search space.

    Raises:
        ValueError: when an entry is neither `name=low..high`, with `log` behind it or not, nor `name=[a, b, ...]`.
    """
    space: Space = {}
    for entry in _entries(text):
        name, equals, value = (each.strip() for each in entry.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"cannot read {entry!r} in the space {text!r}: {_FORM}")
        if name in space:
            raise ValueError(f"the space {text!r} names {name} twice: keep one")
        space[name] = _interval(name, value) if ".." in value and value[:1] not in "[(" else _choices(name, value)
    if not space:
        raise ValueError(f"the space {text!r} is empty: {_FORM}")
    return space


def _entries(text: str) -> list[str]:
    """The entries between commas that stand in no bracket and no quotes."""
    found, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[](),":
            depth += (sign in "[(") - (sign in "])")
            if sign == "," and depth == 0:
                found.append("")
                continue
        found[-1] += sign
    return [entry.strip() for entry in found if entry.strip()]


def _interval(name: str, value: str) -> Interval:
    bounds, _, word = value.partition(" ")
    if word.strip() not in ("", "log"):
        raise ValueError(f"{name}={value}: after the interval may stand 'log', not {word.strip()!r}")
    low, high = (_number(name, value, end) for end in bounds.split("..", 1))
    if not low < high:
        raise ValueError(f"{name}={value}: expected a lower and a higher number, as in {name}=4..32")
    if word and low <= 0:
        raise ValueError(f"{name}={value}: a logarithmic interval begins above 0, not at {low}")
    return Interval(low, high, bool(word))


def _number(name: str, value: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(f"{name}={value}: {text!r} is not a number; {_FORM}")
    return number


def _choices(name: str, value: str) -> tuple[Any, ...]:
    try:
        found = ast.literal_eval(value)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot read {name}={value}: {_FORM}") from error
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError(f"{name}={value}: expected an interval such as 4..32, or a list of two values or more")
    wrong = [each for each in found if not isinstance(each, str | int | float | None)]
    if wrong or any(found.count(each) > 1 for each in found):
        raise ValueError(f"{name}={value}: expected different numbers, texts, True, False or None")
    return tuple(found)


def holes(text: str) -> set[str]:
    """Names of the options that a text leaves open: `rank` of `lora(rank=?)`, `r` of `lora(rank=?r)`."""
    return {str(value)[1:] for spec in _parsed(text) for value in _values(spec) if _open(value)}


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A text with its holes filled."""
    return " + ".join(str(_filled(spec, values)) for spec in _parsed(text))


def check_space(space: Space, texts: Mapping[str, str], settings: Iterable[str]) -> None:
    """Refuse a space that leaves a hole open, or searches what nothing takes.

    Args:
        space: what is searched.
        texts: flag -> the text that may have holes.
        settings: names of the training settings that may be searched too.
    """
    opened = {name: flag for flag, text in texts.items() for name in holes(text)}
    known = [*opened, *settings]
    for name in space:
        if name not in known:
            raise ValueError(
                f"the space names {name!r}, which nothing takes{meant(name, known)}: write {name}=? where it belongs, "
                f"as in --method 'lora({name}=?)', or search one of the settings {', '.join(settings)}"
            )
    for name, flag in opened.items():
        if name not in space:
            raise ValueError(f"--{flag} {texts[flag]!r} leaves {name} open: add it to the space, as {name}=4..32")


def _parsed(text: str) -> tuple[Spec, ...]:
    named = re.sub(r"(\w+)\s*=\s*\?\s*(?=[,)])", r"\1=?\1", text)
    return parse(_HOLE.sub(r"='?\1'", named))


def _open(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("?")


def _values(spec: Spec) -> list[Any]:
    return [value for _, value in spec.kwargs] + [value for part in spec.parts for value in _values(part)]


def _filled(spec: Spec, values: Mapping[str, Any]) -> Spec:
    kwargs = tuple((key, values[value[1:]] if _open(value) else value) for key, value in spec.kwargs)
    return Spec(spec.name, kwargs, tuple(_filled(part, values) for part in spec.parts))
