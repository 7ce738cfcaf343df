"""The options that streams have in common, of labelled and of captioned images, and how a factory gets them."""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import meant
from perdure.options.paths import ORDERS
from perdure.options.ranges import Count, Range, Seed, check_fields, hints_of, refuse, without_effect
from perdure.options.spec import Spec
from perdure.types import Scenario, Stream

StreamPlan = Callable[[Preprocess, int, bool], Stream]
"""A stream described but not yet read: `plan(preprocess, seed, measured=False)` reads it.

`measured`: nothing is learnt from it, all images are test images.
"""

REGISTRY: dict[str, Callable[..., StreamPlan]] = {}
"""Name -> factory, for streams that are made of others; `perdure.streams` fills it."""

Level = Annotated[int, Range(0, 100)]
"""Of folders; 0 is the outermost."""

TOPICS = ("clusters", "random", "natural")
"""What the option `by` of captioned images may be; anything else is a column."""


@dataclass(frozen=True)
class Options:
    """How examples become tasks.

    Args:
        tasks: number of tasks (10 when None, or what the data set's page says); classes are spread as evenly as
            possible, the first tasks get one more.
        increments: classes of each task, in place of `tasks`: `(50, 10, 10)`; the sum must be the number of classes.
        scenario: "class" (all seen classes compete), "task" (the task is told), "domain" (the same classes every time).
        domain: where the domain is written: a column, or a level of folders (0 is the outermost).
        order: of the classes, or of the domains in a domain-incremental stream: None or "seed" (by the run's),
            "natural", an integer seed, all names as a list, or a file with a name a line. An integer in a list or
            file is the class of that number where classes are whole numbers, else a position in the natural order.
        per_class: at most so many train images a class (and domain). Which ones depends neither on the run's seed nor
            on the order; fewer are a subset of more.
        test_per_class: the same for test images.
        draw: a seed of which train images `per_class` keeps; None is as 0.
        skip_bad: leave unreadable images out and list them; otherwise they are an error when they are met.
    """

    tasks: Count | None = None
    increments: Sequence[Count] | None = None
    scenario: Scenario = "class"
    domain: str | Level | None = None
    order: str | Seed | Sequence[str | Seed] | None = None
    per_class: Count | None = None
    test_per_class: Count | None = None
    draw: Seed | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.increments is not None and not self.increments:
            raise ValueError("increments=(): expected each task's number of classes, such as (50, 10, 10)")
        if self.tasks is not None and self.increments is not None and len(self.increments) != self.tasks:
            raise ValueError(
                f"tasks={self.tasks}, but increments={tuple(self.increments)} has {len(self.increments)}: drop tasks"
            )
        check_order(self.order)
        if self.per_class is None:
            without_effect("without per_class", draw=self.draw)

    def domain_column(self) -> str | None:
        """The column of the domain; raises a ValueError when it would have no effect."""
        if self.domain is None:
            return None
        if self.scenario != "domain":
            raise ValueError(f"domain={self.domain!r} has no effect with scenario={self.scenario!r}; use 'domain'")
        return str(self.domain)


@dataclass(frozen=True)
class CaptionOptions:
    """How images with captions become tasks.

    Args:
        by: what a task is: "clusters" of images that look alike (when None), "random" parts, "natural" parts in the
            order of the rows, or the column whose values are the topics, one task each.
        tasks: number of tasks; 5 when None. A column has its own number.
        embed: the backbone whose features are clustered; `pocket()` when None.
        order: of the topics: None or "seed" (by the run's), "natural", an integer seed, or all names as a list.
            Captions in several languages come in the order written when None.
        per_task: at most so many train images a task. Which ones depends neither on the run's seed nor on the order;
            fewer are a subset of more.
        test_per_task: the same for test images.
        draw: a seed of which train images `per_task` keeps; None is as 0.
        texts: at most so many captions an image (and language), the first ones.
        skip_bad: leave unreadable images out and list them; otherwise they are an error when they are met.
    """

    by: str | None = None
    tasks: Count | None = None
    embed: str | None = None
    order: str | Seed | Sequence[str | Seed] | None = None
    per_task: Count | None = None
    test_per_task: Count | None = None
    draw: Seed | None = None
    texts: Count = 5
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_order(self.order)
        if self.by not in (None, "clusters"):
            without_effect(f"with by={self.by!r}", embed=self.embed)
        if self.per_task is None:
            without_effect("without per_task", draw=self.draw)

    @property
    def column(self) -> str | None:
        """The column of the topics, when `by` is one."""
        return None if self.by in (None, *TOPICS) else self.by


def stream(
    arrange: Callable[..., Stream], *without: str
) -> Callable[[Callable[..., Callable[[bool], Any]]], Callable[..., StreamPlan]]:
    """Make a stream's factory of a function from common options and its own to what reads the data set.

    The fields of the first argument's class become options beside the function's own.

    Args:
        arrange: from a data set, the common options, preprocessing, seed and whether it is only measured to the stream.
        without: common options that are not offered.
    """

    def decorate(read: Callable[..., Callable[[bool], Any]]) -> Callable[..., StreamPlan]:
        first, *own = inspect.signature(read).parameters.values()
        hints = hints_of(read)
        common = hints.pop(first.name)
        shared = {f.name: f.default for f in fields(common) if f.name not in without}
        hints |= {name: hint for name, hint in hints_of(common).items() if name in shared}
        shown = [*own, *(inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in shared.items())]
        hints["return"] = StreamPlan
        signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in shown])

        @functools.wraps(read)
        def made(*args: Any, **written: Any) -> StreamPlan:
            arguments = signature.bind(*args, **written).arguments
            refuse(arguments, hints)
            options = common(**{k: arguments.pop(k) for k in shared if k in arguments})
            if "domain" in without and getattr(options, "scenario", "") == "domain":
                raise ValueError(f"scenario='domain': {read.__name__} has no domains; use 'class' or 'task'")
            reader = read(options, **arguments)

            def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
                return arrange(reader(measured), options, preprocess, seed, measured)

            return plan

        made.__signature__ = signature  # type: ignore[attr-defined]
        made.__annotations__ = hints
        return made

    return decorate


def redrawn(spec: Spec, draw: int) -> Spec:
    """`spec`, and all that it is made of, with `draw` as the seed of the train images that are drawn.

    Raises:
        ValueError: when none are drawn, or `spec` says itself which ones.
    """
    found = _redrawn(spec, draw)
    if found == spec:
        raise ValueError(
            f"vary names images, but {str(spec)!r} draws none: give per_class, per_task or fewshot's shots, or leave "
            "images out"
        )
    return found


def _redrawn(spec: Spec, draw: int) -> Spec:
    options = dict(spec.kwargs)
    factory = REGISTRY.get(spec.name)
    can = factory is not None and "draw" in inspect.signature(factory).parameters
    if can and (spec.name == "fewshot" or {"per_class", "per_task"} & options.keys()):
        if "draw" in options:
            raise ValueError(f"draw={options['draw']} in {spec.name!r} fixes the images that vary names: drop one")
        options["draw"] = draw
    return Spec(spec.name, tuple(options.items()), tuple(_redrawn(part, draw) for part in spec.parts))


def check_order(order: str | int | Sequence[str | int] | None) -> None:
    """Raise a ValueError when `order` is a text but none of `ORDERS` and no path of a file."""
    if isinstance(order, str) and order not in ORDERS and not Path(order).expanduser().is_file():
        gone = "there is no such file; " if Path(order).suffix or len(Path(order).parts) > 1 else ""
        raise ValueError(
            f"order={order!r}: {gone}expected 'natural', 'seed', a seed, a list of names, or a file with a name a line"
            f"{meant(order, ORDERS)}"
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
