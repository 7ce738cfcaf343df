"""The options that all streams have in common, and how a stream's factory gets them."""

import inspect
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.options.ranges import Count, Range, Seed, check_fields, hints_of, refuse
from perdure.types import Scenario, Stream

StreamPlan = Callable[[Preprocess, int], Stream]
"""A stream described but not yet read: `plan(preprocess, seed)` reads it."""

Level = Annotated[int, Range(0, 100)]
"""Of folders; 0 is the outermost."""
PROGRAM = {"program": True}
"""Marks an option that nobody may write."""


@dataclass(frozen=True)
class Options:
    """How examples become tasks.

    Args:
        tasks: number of tasks (10 when None, or what the data set's page says); classes are spread as evenly as
            possible, the first tasks get one more.
        increments: classes of each task, in place of `tasks`: `(50, 10, 10)`; the sum must be the number of classes.
        scenario: "class" (all seen classes compete), "task" (the task is told), "domain" (the same classes every time).
        domain: where the domain is written: a column, or a level of folders (0 is the outermost).
        order: of the classes, or of the domains in a domain-incremental stream: None (by the run's seed), "natural",
            an integer seed, all names as a list, or a file with a name a line. An integer in a list or file is the
            class of that number where classes are whole numbers, else a position in the natural order.
        per_class: at most so many train images a class (and domain). Which ones depends neither on a seed nor on the
            order; fewer are a subset of more.
        test_per_class: the same for test images.
        skip_bad: leave unreadable images out and list them; otherwise they are an error when they are met.
        measured: nothing is learnt, all images are test images. The program's, not the user's.
    """

    tasks: Count | None = None
    increments: Sequence[Count] | None = None
    scenario: Scenario = "class"
    domain: str | Level | None = None
    order: str | Seed | Sequence[str | Seed] | None = None
    per_class: Count | None = None
    test_per_class: Count | None = None
    skip_bad: bool = False
    measured: bool = field(default=False, metadata=PROGRAM)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.increments is not None and not self.increments:
            raise ValueError("increments=(): expected each task's number of classes, such as (50, 10, 10)")
        if self.tasks is not None and self.increments is not None and len(self.increments) != self.tasks:
            raise ValueError(
                f"tasks={self.tasks}, but increments={tuple(self.increments)} has {len(self.increments)}: drop tasks"
            )
        check_order(self.order)

    def domain_column(self) -> str | None:
        """The column of the domain; raises a ValueError when it would have no effect."""
        if self.domain is None:
            return None
        if self.scenario != "domain":
            raise ValueError(f"domain={self.domain!r} has no effect with scenario={self.scenario!r}; use 'domain'")
        return str(self.domain)

    def by_default(self, tasks: int) -> "Options":
        """These options, with `tasks` where the user leaves the number open."""
        undecided = self.tasks is None and self.increments is None and self.scenario != "domain"
        return replace(self, tasks=1 if self.measured else tasks) if undecided else self


def stream(
    *without: str, common_to: type[Any] = Options
) -> Callable[[Callable[..., StreamPlan]], Callable[..., StreamPlan]]:
    """Give a factory the common options: in its signature, and as its first argument.

    Args:
        without: options that are not offered.
        common_to: the data class of the options: those of labelled or of captioned images.
    """

    def decorate(factory: Callable[..., StreamPlan]) -> Callable[..., StreamPlan]:
        own = list(inspect.signature(factory).parameters.values())[1:]
        offered = [f for f in fields(common_to) if f.name not in without and "program" not in f.metadata]
        common = {f.name: f.default for f in offered}

        def plan(measured: bool, args: Any, written: dict[str, Any]) -> StreamPlan:
            arguments = signature.bind(*args, **written).arguments
            refuse({k: v for k, v in arguments.items() if k in hints}, hints)
            options = common_to(**{k: arguments.pop(k) for k in common if k in arguments}, measured=measured)
            if isinstance(options, Options) and options.scenario == "domain" and "domain" in without:
                raise ValueError(f"scenario='domain': {factory.__name__} has no domains; use 'class' or 'task'")
            return factory(options, **arguments)

        def made(*args: Any, **written: Any) -> StreamPlan:
            return plan(False, args, written)

        def measured(*args: Any, **written: Any) -> StreamPlan:
            return plan(True, args, written)

        hints = hints_of(factory)
        everything = hints_of(common_to)
        hints = {p.name: hints[p.name] for p in own} | {k: everything[k] for k in common}
        shown = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in common.items()]
        parameters = [p.replace(annotation=hints[p.name]) for p in (*own, *shown)]
        signature = inspect.Signature(parameters, return_annotation=StreamPlan)
        for each in (made, measured):
            each.__signature__ = signature  # type: ignore[attr-defined]
            each.__annotations__ = {**hints, "return": StreamPlan}
            each.__name__, each.__doc__, each.__module__ = factory.__name__, factory.__doc__, factory.__module__
        made.measured = measured  # type: ignore[attr-defined]
        return made

    return decorate


def check_order(order: str | int | Sequence[str | int] | None) -> None:
    """Raise a ValueError when `order` is a text but neither "natural" nor the path of a file."""
    if isinstance(order, str) and order != "natural" and not Path(order).expanduser().is_file():
        raise ValueError(
            f"order={order!r}: expected 'natural', a seed, a list of names, or a file with a name a line"
            f"{near(order, ('natural',))}"
        )


def read_order(order: str | Sequence[str | int]) -> Sequence[str | int]:
    """The names in `order`, a list of them, or a file: a JSON list, or a name a line."""
    if not isinstance(order, str):
        return order
    file = Path(order).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        listed = json.loads(text) if file.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"order={order!r} cannot be read ({error}); give a JSON list, or a name a line") from error
    if not isinstance(listed, list) or not all(isinstance(each, str | int) for each in listed):
        raise ValueError(f"order={order!r} is no list of names; give a JSON list, or a name a line")
    return listed


def near(value: object, known: Collection[str]) -> str:
    """What to add to an error message: the nearest of the known names, if one is near."""
    return meant(str(value), known)
