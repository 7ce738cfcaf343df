"""A command line becomes a command, by tyro; what is wrong with it becomes one line, with what may have been meant."""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from perdure.formatting import meant, shortened
from perdure.options.ranges import expected, problem, ranged

_CONFIG = (tyro.conf.OmitArgPrefixes,)
_SEVERAL = re.compile(r"(?P<flag>\S+): no type matching .* could be instantiated from \[(?P<typed>.*?)\]\. Got errors")
_CHOICE = re.compile(r"invalid choice '(?P<typed>.*)' for argument '(?P<flag>.*)'\. Expected one of \((?P<known>.*)\)")
_NUMBER = re.compile(r"(?P<flag>\S+): (invalid literal for int|could not convert string to float).*?: '(?P<typed>.*)'$")
_LIST = re.compile(r"(?P<flag>\S+): Could not find valid parse for arguments: \[(?P<typed>.*)\]$")
_SHELLS = ("bash", "zsh", "tcsh")


FORMER = {"--id-at-test": "--task-id-known"}
"""Flags that have another name now."""


def _renamed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"{FORMER.get(flag, flag)}{equals}{value}"


def command_of(arguments: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> Any:
    """The command that was typed, its values in the ranges of its fields.

    Args:
        arguments: what was typed.
        commands: name -> frozen dataclass whose fields are the flags.

    Raises:
        ValueError: for the first mistake.
        SystemExit: when help was asked for, and is printed.
    """
    if not arguments:
        raise ValueError(f"say what to do: {', '.join(commands)}; 'perdure --help' explains them")
    name, *words = arguments
    words = list(map(_renamed, words))
    if "-h" in arguments or "--help" in arguments:
        about = "Teach pre-trained vision and vision-language models one task after another, without forgetting."
        listed = {name: commands[name]} if name in commands else dict(commands)  # each parser takes its time
        return tyro.extras.subcommand_cli_from_dict(
            listed, prog="perdure", description=about, args=arguments, config=_CONFIG
        )
    if name not in commands:
        raise ValueError(
            f"there is no command {name!r}{meant(name, commands) or '; there are: ' + ', '.join(commands)}"
        )
    flags, more = _flags(commands[name]), f"'perdure {name} --help' lists what there is"
    for word, following in itertools.pairwise([*words, "--"]):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        known = flag.replace("_", "-")
        positive = known if known in flags else f"--{known[2:].removeprefix('no-')}"
        hint = flags[positive][1] if positive in flags else None
        if hint is None or (positive != known and hint is not bool):
            near = meant(known, (each for each in flags if each.startswith("--")))
            raise ValueError(f"'perdure {name}' has no option {flag}{near or '; ' + more}")
        if hint is not bool and not (value if equals else following):
            raise ValueError(f"{flag} needs a value, not an empty one")
        if hint is not bool and not equals and following.startswith("--"):
            raise ValueError(f"{flag} needs a value")
    if "" in words:  # which a path would take for the folder that we are in
        raise ValueError(f"an empty word, number {words.index('') + 1} after 'perdure {name}', says nothing; {more}")
    made, unknown = _parsed(commands[name], name, words, flags)
    if unknown:
        what = f"{unknown[0]!r}: is an option's name or a quote missing?"
        raise ValueError(f"'perdure {name}' does not know what to do with {what}")
    for shown, (field, hint) in flags.items():
        value = getattr(made, field.name)
        if value == () and field.default is MISSING:
            raise ValueError(f"'perdure {name}' needs {shown}; {more}")
        if value != field.default and (wrong := problem(value, hint)):
            raise ValueError(f"{shown} {shortened(repr(value))}: {wrong}")
    return made


def completion(shell: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> str:
    """The script that completes commands and flags in a shell.

    Raises:
        ValueError: for another shell.
    """
    if len(shell) != 1 or shell[0] not in _SHELLS:
        raise ValueError(f"--completion needs one of {', '.join(_SHELLS)}")
    said = io.StringIO()
    asked = ["--tyro-print-completion", shell[0]]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog="perdure", args=asked, config=_CONFIG)
    return said.getvalue()


def _flags(command: Callable[..., Any]) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type by how it is typed: `--batch-size`, or `FOLDER` for what stands by itself."""
    hints, found = get_type_hints(command, include_extras=True), {}
    for field in fields(command):  # type: ignore[arg-type]
        marks = getattr(hints[field.name], "__metadata__", ())
        name = field.name.removesuffix("_")  # `from_`, for `from` is a word of Python
        if tyro.conf.Suppress not in marks:
            shown = name.upper() if tyro.conf.Positional in marks else f"--{name.replace('_', '-')}"
            found[shown] = field, hints[field.name]
    return found


def _parsed(
    command: Callable[..., Any], name: str, words: Sequence[str], flags: Mapping[str, tuple[Field[Any], Any]]
) -> tuple[Any, list[str]]:
    """What tyro makes of the words, and those that it has no use for; its box of an error as one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=f"perdure {name}", args=words, config=_CONFIG, return_unknown_args=True)
    except SystemExit as stop:
        # A heading, a rule, what is wrong, another rule, and help that is not asked for.
        _, wrong, *_ = re.split(r"^\s*-{9,}\s*$", said.getvalue(), flags=re.MULTILINE)
        line = " ".join(wrong.split()).removeprefix("Error parsing ")
        hint = next((hint for shown, (_, hint) in flags.items() if line.startswith(f"{shown}:")), None)
        if choice := _CHOICE.match(line):  # in the order of a set, and with None for a flag that is left out
            known = sorted({*re.findall("'(.*?)'", choice["known"])} - {"None"})
            flag, typed = choice["flag"], choice["typed"]
            where = flag if flag.startswith("-") else flag.upper()
            near = meant(typed, known) or f": expected {', '.join(known)}"
            raise ValueError(f"{where} {shortened(typed)!r} is not among the choices{near}") from stop
        if listed := _LIST.match(line):
            raise ValueError(_unlisted(listed["flag"], listed["typed"], hint)) from stop
        if one := _SEVERAL.match(line) or _NUMBER.match(line):  # tyro names its own types, one by one
            typed = shortened(" ".join(one["typed"].strip("'\"").split("', '")))
            raise ValueError(f"{one['flag']} {typed!r}; expected {expected(hint)}") from stop
        raise ValueError(f"{line}; expected {expected(hint)}" if ranged(hint) else line) from stop


def _unlisted(flag: str, typed: str, hint: Any) -> str:
    """What is wrong with the words of a flag that takes several, with how numbers in one word are written."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    words = " ".join(typed.strip("'\"").split("', '"))
    numbers = words.rstrip(",").split(",")
    if ends := re.fullmatch(r"(\d{1,9})(?:-|\.\.)(\d{1,9})", words):
        numbers = [str(each) for each in range(int(ends[1]), min(int(ends[2]), int(ends[1]) + 99) + 1)]
    meant_so = len(numbers) > 1 and all(number.strip().isdecimal() for number in numbers)
    remedy = f": write {flag} {' '.join(map(str.strip, numbers))}" if meant_so else ", or several with spaces between"
    return f"{flag} {shortened(words)!r}; expected {expected(get_args(hint)[0])}{remedy}"
