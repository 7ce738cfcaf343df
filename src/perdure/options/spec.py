"""The option syntax of methods, streams and backbones: `lora(rank=8) + replay(size=200)`."""

import ast
import inspect
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perdure.formatting import meant
from perdure.options.ranges import hints_of, refuse

_FORM = "write it like 'lora(rank=8) + replay(size=200)'"
_FILTERS = threading.Lock()
"""Held while filters of warnings, which are the whole process's, are changed."""


@dataclass(frozen=True)
class Spec:
    """A name, its keyword arguments, and the specs it is made of; `str` gives the text that `parse` reads back.

    Values are numbers, strings, bools, None, and tuples or lists of these. Parts are what stands in the parentheses
    without a name: `sequence(images(path="a"), cub200())`.
    """

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    parts: "tuple[Spec, ...]" = ()

    def __str__(self) -> str:
        inner = [f"{part}" if part.kwargs or part.parts else f"{part.name}()" for part in self.parts]
        inner += [f"{key}={value!r}" for key, value in self.kwargs]
        return f"{self.name}({', '.join(inner)})" if inner else self.name


def changed(text: str, **options: Any) -> str:
    """The text of one spec with some of its options replaced."""
    spec = parse_one(text)
    return str(Spec(spec.name, tuple((dict(spec.kwargs) | options).items()), spec.parts))


def parse(text: str) -> tuple[Spec, ...]:
    """Read one or several specs joined by `+`.

    Raises:
        ValueError: when `text` is anything but names with literal keyword arguments and parts of the same form.
    """
    if not isinstance(text, str):
        raise ValueError(f"got {text!r:.60}, expected a text: {_FORM}")
    line = text.replace("\n", " ").strip()
    if not line:
        raise ValueError(f"cannot read an empty text: {_FORM}")
    try:
        with _FILTERS, warnings.catch_warnings():
            # An unknown escape such as '\d' of a Windows path is only a warning to Python; here it is a mistake.
            warnings.simplefilter("error")
            tree = ast.parse(line, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot read {text!r} ({_reason(error)}): {_FORM}") from error
    # Python would silently drop a comment, and with it what the user wrote there.
    if b"#" in line.encode()[tree.end_col_offset :]:
        raise ValueError(f"cannot read {text!r}: '#' starts a comment; remove it and what follows")
    parts = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        parts.append(tree.right)
        tree = tree.left
    try:
        return tuple(_spec(part, text) for part in (tree, *reversed(parts)))
    except RecursionError as error:  # Python reads deeper trees than it writes
        raise ValueError(f"cannot read {text!r} ({_reason(error)}): {_FORM}") from error


def parse_one(text: str) -> Spec:
    """Read exactly one spec, as a stream or a backbone needs."""
    specs = parse(text)
    if len(specs) > 1:
        raise ValueError(f"{text!r} joins {len(specs)} parts with '+', but only one is possible here: keep {specs[0]}")
    return specs[0]


def build(spec: Spec, registry: Mapping[str, Callable[..., Any]], kind: str, **given: Any) -> Any:
    """Call the factory or class that `registry` holds under `spec.name` with the options of `spec`.

    Options are the factory's named parameters; `**kwargs` in its signature are not options.

    Args:
        spec: what the user wrote.
        registry: name -> factory or class.
        kind: what the registry holds, for messages: `"method"`.
        given: arguments that the program supplies; the user may not write them.

    Raises:
        ValueError: for an unknown name or option, a missing option, or a value that does not fit.
    """
    if spec.name not in registry:
        raise ValueError(f"unknown {kind} {spec.name!r}{_suggest(spec.name, registry)}")
    factory = registry[spec.name]
    who = f"{kind} {spec.name!r}"
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(factory)
    if spec.parts and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        raise ValueError(f"{who} is not made of others: remove {str(spec.parts[0])!r}, or write it as option=value")
    options = {k: p for k, p in signature.parameters.items() if p.kind in named and k not in given}
    hints = hints_of(factory)
    for key, value in spec.kwargs:
        if key in given:
            raise ValueError(f"{who}: option {key!r} is set by the program; remove it from {str(spec)!r}")
        if key not in options:
            near = meant(key, options)
            have = f"it has: {', '.join(options)}" if options else "it takes none"
            raise ValueError(f"{who} has no option {key!r}{near}; {have}")
        refuse({key: value}, {key: hints.get(key, Any)}, f"{who}, option ")
    written = dict(spec.kwargs)
    if missing := [k for k, p in options.items() if p.default is p.empty and k not in written]:
        raise ValueError(f"{who} needs {' and '.join(missing)}: write '{spec.name}({missing[0]}=...)'")
    # Outside of the try below: arguments that do not bind are the program's fault, not the value's.
    signature.bind(*spec.parts, **written, **given)
    try:
        return factory(*spec.parts, **written, **given)
    except (TypeError, ValueError) as error:
        # Subclasses carry their own meaning, and an error that does not name an option may be a bug of the factory.
        if type(error) not in (TypeError, ValueError) or (guilty := _named_in(str(error), written)) is None:
            raise
        # "rank=0: must be positive" already shows the option.
        shown = "" if str(error).startswith(f"{guilty}=") else f"{guilty}={written[guilty]!r}: "
        raise ValueError(f"{who}, option {shown}{error}") from error


def _spec(node: ast.expr, text: str) -> Spec:
    match node:
        case ast.Name(id=name):
            return Spec(name)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(
            isinstance(each, ast.Call) for each in args
        ):
            kwargs: dict[str, Any] = {}
            for keyword in keywords:
                if keyword.arg is None:
                    raise ValueError(f"cannot read '**' in {text!r}: write each option as name=value")
                if keyword.arg in kwargs:
                    raise ValueError(f"{text!r} gives option {keyword.arg!r} of {name!r} twice: keep one")
                kwargs[keyword.arg] = _literal(keyword.value, f"{name}({keyword.arg}=...)", text)
            return Spec(name, tuple(kwargs.items()), tuple(_spec(each, text) for each in args))
        case ast.Call(func=ast.Name(id=name), args=args):
            first = next(each for each in args if not isinstance(each, ast.Call))
            shown = ast.unparse(first)
            other = f", or '{name}({shown}())' for a part" if isinstance(first, ast.Name) else ""
            raise ValueError(
                f"{text!r} gives {shown} to {name!r} without a name: write '{name}(option={shown})'{other}"
            )
    raise ValueError(f"cannot read {ast.unparse(node)!r} in {text!r}: {_FORM}")


def _literal(node: ast.expr, place: str, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | str() | None | int() as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool) and math.isfinite(value)
        ):
            return -value if isinstance(sign, ast.USub) else value
        case ast.Tuple(elts=items):
            return tuple(_literal(item, place, text) for item in items)
        case ast.List(elts=items):
            return [_literal(item, place, text) for item in items]
    shown = ast.unparse(node)
    quote = f" (a text needs quotes: {shown!r})" if isinstance(node, ast.Name | ast.Attribute) else ""
    raise ValueError(
        f"{place} in {text!r}: {shown} is not a plain value{quote}; write a finite number, a quoted text, True, False, "
        "None, or a tuple or list of these"
    )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "msg", None) or "too deep or not text").splitlines()[0]


def _suggest(name: str, known: Iterable[str]) -> str:
    return meant(name, known) or f"; known: {', '.join(sorted(known))}"


def _named_in(message: str, options: Iterable[str]) -> str | None:
    """The option that `message` is about: named at its start, with `=` or in quotes; the first of several."""
    places = {k: found.start() for k in options if (found := re.search(rf"^{k}\b|\b{k}\s?=|'{k}'", message))}
    return min(places, key=places.__getitem__, default=None)
