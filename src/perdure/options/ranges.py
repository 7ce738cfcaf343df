"""What an option may be: types and ranges, written as annotations and checked wherever something is made of options.

    def __init__(self, rank: Rank = 10, keep: Share = 0.95, at: Literal["kv", "qv"] = "kv") -> None: ...

Every numeric option has a range. Its ends are no advice: below and above them nothing sensible was ever meant, and what
a value within them costs is asked where it is known (`perdure.formatting.room_for`).
"""

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from perdure.formatting import meant, shortened

F = TypeVar("F", bound=Callable[..., Any])
_SEQUENCES = (tuple, list, Sequence, Iterable, Collection)
_NUMBERS = {int: numbers.Integral, float: numbers.Real}  # numpy's too


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; NaN and infinity are in none.

    Args:
        least: the smallest.
        most: the largest.
        above: `least` itself is too small.
        below: `most` itself is too large.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        least, most = _number(self.least), _number(self.most)
        if self.above or self.below:
            return f"{'above' if self.above else 'at least'} {least} and {'below' if self.below else 'at most'} {most}"
        return f"from {least} to {most}"


Count = Annotated[int, Range(1, 10**6)]
"""Images, tasks, steps, classes."""
Epochs = Annotated[int, Range(1, 10**5)]
"""Passes over a training set."""
BatchSize = Annotated[int, Range(1, 65536)]
"""Examples per step."""
Rank = Annotated[int, Range(1, 4096)]
"""Of a matrix, or the units of a bottleneck."""
Length = Annotated[int, Range(1, 256)]
"""Tokens of a prompt."""
Strength = Annotated[float, Range(0, 1e9)]
"""Weight of a penalty; 0 for none."""
Factor = Annotated[float, Range(0, 1e4, above=True)]
"""Factors, temperatures."""
Rate = Annotated[float, Range(0, 1e6, above=True)]
"""Learning rates."""
Share = Annotated[float, Range(0, 1, above=True)]
"""Part of a whole, and not none of it."""
Ratio = Annotated[float, Range(0, 100, above=True)]
"""Old images for each new one."""
Bytes = Annotated[float, Range(1, 1e15)]
"""Of memory or of a file."""
Seed = Annotated[int, Range(-(10**12), 10**12)]
"""Of randomness."""


def checked(made: F, only: Collection[str] = ()) -> F:
    """The function or constructor, refusing arguments that its annotations do not allow with a `ValueError`.

    Args:
        made: what is called.
        only: the arguments that are looked at; all when there are none.
    """
    signature = inspect.signature(made)

    @functools.wraps(made)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below says it better
        hints = hints_of(made)
        refuse({name: value for name, value in given.items() if name in (only or hints) and name in hints}, hints)
        return made(*args, **kwargs)

    return refusing  # type: ignore[return-value]


def checking(*names: str) -> Callable[[F], F]:
    """`checked`, of these arguments alone; beside them stand such as images, of which there are too many kinds."""
    return lambda made: checked(made, names)


def check_fields(made: Any) -> None:
    """Raise a `ValueError` for the first field of a dataclass that its annotation does not allow."""
    # An empty text stands for what is left open: the stream of a learner that is taught from folders.
    refuse({f.name: v for f in fields(made) if (v := getattr(made, f.name)) != ""}, hints_of(type(made)))


def refuse(values: Mapping[str, Any], hints: Mapping[str, Any], who: str = "") -> None:
    """Raise a `ValueError` for the first value that its hint does not allow; `who` stands before its name."""
    for name, value in values.items():
        if wrong := problem(value, hints[name]):
            raise ValueError(f"{who}{name}={shortened(repr(value))}: {wrong}")


def without_effect(why: str, **options: object) -> None:
    """Raise `ValueError` for the first option that was given, which is not None."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no effect {why}: leave it out")


def problem(value: Any, hint: Any) -> str:
    """What was expected instead of a value; empty when it is as expected."""
    if fits(value, hint):
        return ""
    more = meant(value, _words(hint)) if isinstance(value, str) else ""
    return f"expected {expected(hint)}{', not empty' if value == '' else more}"


def hints_of(made: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a factory's or a class's options, with their ranges; empty where there is nothing to go by."""
    while isinstance(made, functools.partial):
        made = made.func
    built = isinstance(made, type) and "__dataclass_fields__" not in vars(made)
    try:
        return typing.get_type_hints(made.__init__ if built else made, include_extras=True)
    except (NameError, TypeError):
        # A name imported for the type checker only, or a callable without annotations: nothing to check against.
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a hint names, and in its range."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0]) and all(value in each for each in inner[1:] if isinstance(each, Range))
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if (origin or hint) in _SEQUENCES:
        return isinstance(value, tuple | list) and _items_fit(value, origin, inner)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike) and value != ""
    if hint is Path:
        return isinstance(value, os.PathLike)
    if hint is bool:
        return isinstance(value, bool)
    return value is None if hint is type(None) else True


def expected(hint: Any) -> str:
    """A hint in words: `int from 1 to 4096 or None`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        words = [" ".join([expected(inner[0]), *(str(each) for each in inner[1:] if isinstance(each, Range))])]
    elif origin is Literal:
        words = [repr(each) for each in inner]
    elif origin in (typing.Union, types.UnionType):
        words = [expected(each) for each in inner]
    elif origin in _SEQUENCES:
        words = [f"{origin.__name__}[{', '.join('...' if each is ... else expected(each) for each in inner)}]"]
    elif hint is type(None):
        words = ["None"]
    else:
        words = [hint.__name__ if isinstance(hint, type) and not inner else str(hint)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def ranged(hint: Any) -> bool:
    """Whether a hint has a range, in whatever it is made of."""
    return any(isinstance(each, Range) or ranged(each) for each in typing.get_args(hint))


def _items_fit(value: Sequence[Any], origin: Any, inner: tuple[Any, ...]) -> bool:
    if origin is tuple and inner and inner[-1] is not ...:
        return len(value) == len(inner) and all(fits(v, hint) for v, hint in zip(value, inner, strict=True))
    return not inner or all(fits(v, inner[0]) for v in value)


def _words(hint: Any) -> list[str]:
    """The texts that a literal, or one of several types, allows."""
    return [w for each in typing.get_args(hint) for w in ([each] if isinstance(each, str) else _words(each))]


def _number(value: float) -> str:
    return (
        str(value)
        if isinstance(value, int) and abs(value) <= 10**6
        else f"{value:g}".replace("e+0", "e").replace("e+", "e")
    )
