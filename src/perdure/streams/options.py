"""The options that all streams have in common, and how a stream's factory gets them."""

import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from perdure.images import Preprocess
from perdure.types import Scenario, Stream

StreamPlan = Callable[[Preprocess, int], Stream]
"""A stream described but not yet read: `plan(preprocess, seed)` reads it."""

_SCENARIOS = ("class", "task", "domain")


@dataclass(frozen=True)
class Options:
    """How examples become tasks.

    Args:
        tasks: number of tasks (10 when None); the classes are spread as evenly as possible, the first tasks get one more.
        increments: classes of each task, in place of `tasks`: `(50, 10, 10)`; the sum must be the number of classes.
        scenario: "class" (all seen classes compete), "task" (the task is told), "domain" (the same classes every time).
        domain: where the domain is written: a column, or a level of folders (0 is the outermost).
        order: of the classes, or of the domains in a domain-incremental stream: None (by the run's seed), "natural",
            an integer seed, or all names (or positions in the natural order) as a list.
        per_class: at most so many train images a class (and domain). Which ones depends neither on a seed nor on the
            order; fewer are a subset of more.
        test_per_class: the same for test images.
        skip_bad: leave unreadable images out and list them; otherwise they are an error when they are met.
    """

    tasks: int | None = None
    increments: Sequence[int] | None = None
    scenario: Scenario = "class"
    domain: str | int | None = None
    order: str | int | Sequence[str | int] | None = None
    per_class: int | None = None
    test_per_class: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.scenario not in _SCENARIOS:
            raise ValueError(
                f"scenario={self.scenario!r}: expected one of {', '.join(_SCENARIOS)}{near(self.scenario, _SCENARIOS)}"
            )
        for name in ("tasks", "per_class", "test_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if self.increments is not None and (not self.increments or min(self.increments) < 1):
            raise ValueError(f"increments={tuple(self.increments)}: expected the number of classes of each task, all >= 1")
        if self.tasks is not None and self.increments is not None and len(self.increments) != self.tasks:
            raise ValueError(
                f"tasks={self.tasks} but increments={tuple(self.increments)} are {len(self.increments)}: leave tasks out"
            )
        if isinstance(self.order, str) and self.order != "natural":
            raise ValueError(
                f"order={self.order!r}: expected 'natural', a seed, or a list of names{near(self.order, ('natural',))}"
            )


def stream(**defaults: Any) -> Callable[[Callable[..., StreamPlan]], Callable[..., StreamPlan]]:
    """Give a factory the common options, in its signature and as its first argument.

    Args:
        defaults: other defaults than `Options` has. An option with the default `...` is not offered: the factory
            decides it.
    """

    def decorate(factory: Callable[..., StreamPlan]) -> Callable[..., StreamPlan]:
        own = list(inspect.signature(factory).parameters.values())[1:]
        hidden = {k for k, v in defaults.items() if v is ...}
        hints = get_type_hints(factory)
        common = {f.name: defaults.get(f.name, f.default) for f in fields(Options) if f.name not in hidden}
        assert MISSING not in common.values()

        def made(*args: Any, **written: Any) -> StreamPlan:
            bound = signature.bind(*args, **written)
            chosen = {k: bound.arguments.pop(k, default) for k, default in common.items()}
            return factory(Options(**chosen), **bound.arguments)

        signature = inspect.Signature(
            [
                *(p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in own),
                *(inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in common.items()),
            ]
        )
        made.__signature__ = signature  # type: ignore[attr-defined]
        made.__annotations__ = {p.name: hints[p.name] for p in own}
        made.__annotations__ |= {k: hint for k, hint in get_type_hints(Options).items() if k in common}
        made.__name__, made.__doc__, made.__module__ = factory.__name__, factory.__doc__, factory.__module__
        return made

    return decorate


def near(value: object, known: Collection[str]) -> str:
    """What to add to an error message: the nearest of the known names, if one is near."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
