"""What is wrong with a command line, in one line: unknown, missing and misspelt words, and what may have been meant."""

import contextlib
import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro

from perdure.formatting import shortened
from perdure.options.ranges import problem, ranged


def mistake(arguments: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> str | None:
    """The first mistake in `arguments`; None when there is none, or help is asked for.

    Args:
        arguments: what was typed.
        commands: name -> frozen dataclass whose fields are the flags.
    """
    if not arguments:
        return f"say what to do: {', '.join(commands)}; 'perdure --help' explains them"
    name, *words = arguments
    if any(word in ("-h", "--help") for word in arguments):
        return None
    if name not in commands:
        near = _near(name, commands) or f"; there are: {', '.join(commands)}"
        return f"there is no command {name!r}{near}"
    flags = _flags(commands[name])
    given, loose, wrong = _sorted(words, flags)
    if wrong is not None:
        near = _near(wrong.lstrip("-"), (flag.shown.lstrip("-") for flag in flags.values()), "--")
        return f"'perdure {name}' has no option {wrong}{near or '; '}{_help(name)}"
    for flag in (f for f in flags.values() if f.positional):
        taken = len(loose) if flag.many else 1
        given[flag.name], loose = loose[:taken], loose[taken:]
        if not given[flag.name]:
            del given[flag.name]
    if loose:
        return f"'perdure {name}' does not know what to do with {loose[0]!r}: is an option's name or a quote missing?"
    for flag in flags.values():
        if flag.name not in given:
            if flag.required:
                return f"'perdure {name}' needs {flag.shown}; {_help(name)}"
        elif problem := flag.problem(given[flag.name]):
            return problem
    return None


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A field of a command as it is typed."""

    name: str
    shown: str
    hint: Any  # of one value
    many: bool
    positional: bool
    required: bool

    @property
    def switch(self) -> bool:
        return self.hint is bool

    def problem(self, values: Sequence[str]) -> str | None:
        if self.switch:
            return None
        if not values or not all(values):
            return f"{self.shown} needs a value{', not an empty one' if values else ''}"
        if len(values) > 1 and not self.many:
            return f"{self.shown} takes one value, not {len(values)}: does {' '.join(values)!r} need quotes?"
        who = "" if self.positional else f"{self.shown} "
        for value in values:
            if said := min((problem(read, self.hint) for read in _readings(value)), key=len):
                return f"{who}{shortened(repr(value))}: {said}"
        return None


def _flags(command: Callable[..., Any]) -> dict[str, _Flag]:
    hints = get_type_hints(command, include_extras=True)
    found = {}
    for field in dataclasses.fields(command):  # type: ignore[arg-type]
        hint, marks = hints[field.name], getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        hint = hint if ranged(hint) or not marks else get_args(hint)[0]
        many = get_origin(hint) is tuple
        hint = get_args(hint)[0] if many else hint
        if get_origin(hint) in (Union, types.UnionType):
            hint = Union[tuple(kind for kind in get_args(hint) if kind is not type(None))]  # noqa: UP007
        positional = tyro.conf.Positional in marks
        name = field.name.removesuffix("_")  # `from_`, for `from` is a word of Python
        shown = name.upper() if positional else f"--{name.replace('_', '-')}"
        required = field.default is field.default_factory is dataclasses.MISSING
        found[name] = _Flag(name, shown, hint, many, positional, required)
    return found


def _sorted(words: Sequence[str], flags: Mapping[str, _Flag]) -> tuple[dict[str, list[str]], list[str], str | None]:
    """What each flag was given, what stands by itself, and the first word that should be a flag and is none."""
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    current: _Flag | None = None
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            key = key.replace("-", "_")
            flag = flags.get(key) or (flags.get(key[3:]) if key.startswith("no_") else None)
            if flag is None or flag.positional or (key != flag.name and not flag.switch):
                return given, loose, word.partition("=")[0]
            given[flag.name] = [value] if "=" in word else []
            current = None if flag.switch or "=" in word else flag
        elif current is not None:
            given[current.name].append(word)
            if not current.many:
                current = None
        else:
            loose.append(word)
    return given, loose, None


def _readings(word: str) -> list[str | float]:
    """What a word may mean: itself, and a number."""
    found: list[str | float] = [word]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            found.append(kind(word))
    return found


def _near(word: str, known: Iterable[str], before: str = "") -> str:
    close = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1)
    return f"; did you mean '{before}{close[0]}'? " if close else ""


def _help(name: str) -> str:
    return f"'perdure {name} --help' lists what there is"
