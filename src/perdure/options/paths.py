"""Paths in what a user described: recorded so that they lead there from anywhere, and put right when they moved."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from perdure.options.spec import Spec, parse

_PATHS = ("path", "checkpoint", "name", "vision", "text", "order", "images", "frames")
"""Options that may be a file or folder, of streams and backbones."""
ORDERS = ("natural", "seed")
"""What the option `order` may be besides a file: as the data has it, or by the run's seed."""
_NESTED = ("embed", "reference", "teacher")
"""Options that are themselves described like this."""

Relocation = tuple[str, str]
"""Where something was, and where it is now: absolute paths, or the beginnings of some."""


def anchored(text: str) -> str:
    """A description whose paths are absolute where there is something; what is no path, as a hub's name, stays."""

    def anchor(value: str) -> str:
        try:
            place = Path(value).expanduser()
            return str(place.absolute()) if value and place.exists() else value
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, or no such user's home
            return value

    return _changed(text, anchor)


def moved(text: str, moves: Sequence[Relocation]) -> str:
    """A description after some moves, the first one first."""
    for move in moves:
        text = _changed(text, partial(relocated, move=move))
    return text


def relocated(path: str, move: Relocation) -> str:
    """A path after a move, when it is what moved or lies within."""
    old, new = move
    if path == old:
        return new
    return new + path[len(old) :] if path.startswith(old.rstrip(os.sep) + os.sep) else path


def pathless(text: str) -> str:
    """A description without its paths: what stays the same wherever they lead."""
    return _changed(text, lambda _: "")


def unplaced(text: str) -> str:
    """A description whose absolute paths are cut to their last name: what others may read."""
    return _changed(text, unplaced_path)


def unplaced_path(value: str) -> str:
    """The last name of an absolute path; what is none stays."""
    return PurePath(value).name if PurePath(value).is_absolute() or value.startswith("~") else value


def paths_in(text: str) -> list[str]:
    """What in a description may be a path."""
    found: list[str] = []

    def note(value: str) -> str:
        found.append(value)
        return value

    _changed(text, note)
    return found


def refuse_same(out: Path, *described: str) -> None:
    """Raise a `ValueError` where results would be written into a folder of data, among what is read from it."""
    refuse_same_folder(out, *(Path(value) for text in described for value in paths_in(text)))


def refuse_same_folder(out: Path, *places: Path) -> None:
    """The same of folders that are named themselves."""
    for place in places:
        if is_folder(place) and is_folder(out) and place.samefile(out):
            raise ValueError(f"{out} is the data's own folder, where results would stand among the data: give another")


def is_folder(path: Path) -> bool:
    """Whether a path, or any text as one, is that of a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # longer than names may be, or a NUL in it
        return False


def _changed(text: str, change: Callable[[str], str]) -> str:
    try:
        specs = parse(text)
    except ValueError:  # whoever builds it says what is wrong
        return text
    made = tuple(_in_spec(spec, change) for spec in specs)
    return text if made == specs else " + ".join(map(str, made))


def _in_spec(spec: Spec, change: Callable[[str], str]) -> Spec:
    def option(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(option(name, each) for each in value)
        if isinstance(value, str) and name in _PATHS and not (name == "order" and value in ORDERS):
            return change(value)
        return _changed(value, change) if isinstance(value, str) and name in _NESTED else value

    kwargs = tuple((name, option(name, value)) for name, value in spec.kwargs)
    return Spec(spec.name, kwargs, tuple(_in_spec(part, change) for part in spec.parts))


def is_file(text: str) -> bool:
    """Whether any text, a question too, is the path of a file."""
    try:
        return Path(text).is_file()
    except OSError:  # longer than names may be
        return False
