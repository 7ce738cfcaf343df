"""Every number that a user may write has a range, and what is outside of it is refused before anything is made."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from perdure.backbones import BACKBONES
from perdure.cli.commands import COMMANDS
from perdure.core.method import METHODS, Method
from perdure.formatting import room_for
from perdure.objectives import OBJECTIVES
from perdure.options.ranges import Range, check_fields, checked, expected, fits, hints_of
from perdure.options.spec import Spec, build
from perdure.streams import STREAMS
from perdure.training.config import RunConfig, register

register()
REGISTRIES: dict[str, dict[str, Any]] = {
    "method": METHODS,
    "stream": STREAMS,
    "backbone": BACKBONES,
    "objective": OBJECTIVES,
}
MADE = [(kind, name) for kind, made in REGISTRIES.items() for name in sorted(made)]


def numbers(hint: Any, within: Range | None = None) -> Iterator[Range | None]:
    """The range of each number that a hint allows; None where it has none."""
    if typing.get_origin(hint) is Annotated:
        ranges = [each for each in hint.__metadata__ if isinstance(each, Range)]
        yield from numbers(hint.__origin__, ranges[0] if ranges else None)
    elif hint in (int, float):
        yield within
    elif typing.get_origin(hint) is not Literal:
        for each in typing.get_args(hint):
            yield from numbers(each)


@pytest.mark.parametrize(("kind", "name"), MADE)
def test_every_number_that_may_be_written_has_a_range(kind: str, name: str) -> None:
    made = REGISTRIES[kind][name]
    hints = hints_of(made)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = [k for k, p in inspect.signature(made).parameters.items() if p.kind in named]
    assert [k for k in options if k not in hints] == [], "no annotation"
    assert [k for k in options if None in numbers(hints[k])] == [], "no range"


@pytest.mark.parametrize("made", [RunConfig, *COMMANDS.values()])
def test_every_number_of_a_command_has_a_range(made: Any) -> None:
    hints = hints_of(made)
    assert [f.name for f in dataclasses.fields(made) if None in numbers(hints[f.name])] == []


@pytest.mark.parametrize(("kind", "name"), MADE)
def test_what_is_outside_of_a_range_is_refused_in_texts_and_in_python(kind: str, name: str) -> None:
    made = REGISTRIES[kind][name]
    for option, hint in hints_of(made).items():
        for each in numbers(hint):
            assert each is not None
            for value in (each.least - 1, each.most + 1, 1e300, -1e300, math.nan, math.inf):
                with pytest.raises(ValueError, match=rf"option {option}=.*: expected .*{expected(hint)[-9:]}"):
                    build(Spec(name, ((option, value),)), REGISTRIES[kind], kind)
                needed = {k: "x" for k, p in inspect.signature(made).parameters.items() if p.default is p.empty}
                with pytest.raises(ValueError, match=f"^{option}=.*: expected"):
                    made(
                        **{k: v for k, v in needed.items() if k not in ("args", "kwargs", "streams", "stream")},
                        **{option: value},
                    )


@pytest.mark.parametrize(
    ("one", "inside", "outside"),
    [
        (Range(1, 4), (1, 4, 2.5), (0, 5, math.nan)),
        (Range(0, 1, above=True), (1e-9, 1), (0, -0.0, 1.1)),
        (Range(0, 1, below=True), (0, 0.999), (1, -1e-9, math.inf)),
        (Range(0, 1, above=True, below=True), (0.5,), (0, 1)),
    ],
)
def test_ends_are_in_unless_they_are_left_out(
    one: Range, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert all(value in one for value in inside)
    assert not any(value in one for value in outside)


def test_a_range_is_said_in_words() -> None:
    assert str(Range(1, 4096)) == "from 1 to 4096"
    assert str(Range(0, 1e9)) == "from 0 to 1e9"
    assert str(Range(0, 0.5, above=True)) == "above 0 and at most 0.5"
    assert str(Range(0, 1, below=True)) == "at least 0 and below 1"
    some = Annotated[int, Range(1, 9)]
    assert expected(some | tuple[some, ...] | None) == "int from 1 to 9, tuple[int from 1 to 9, ...] or None"


def test_numbers_of_numpy_are_numbers_and_truth_is_none() -> None:
    some = Annotated[int, Range(0, 9)]
    assert fits(np.int64(3), some)
    assert fits(np.float32(0.5), float)
    assert not fits(True, some)
    assert not fits(np.float32(0.5), some)


@checked
def made(size: Annotated[int, Range(1, 9)] = 3, name: str = "x", at: Literal["kv", "qv"] = "kv") -> int:
    return size


def test_a_function_refuses_what_its_annotations_do_not_allow() -> None:
    assert made() == made(3) == made(size=3, name="y") == 3
    for wrong, said in (
        ({"size": 10}, "size=10: expected int from 1 to 9"),
        ({"size": "3"}, "size='3': expected int from 1 to 9"),
        ({"name": ""}, "name='': expected str, not empty"),
        ({"at": "kvv"}, "at='kvv': expected 'kv' or 'qv'; did you mean 'kv'?"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$".replace("?", r"\?")):
            made(**wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        made(sise=3)  # type: ignore[call-arg]


def test_a_method_of_third_parties_is_checked_alike() -> None:
    class Theirs(Method, name="theirs"):
        """Its range is checked though it checks nothing."""

        def __init__(self, rank: Annotated[int, Range(1, 4)] = 1) -> None:
            super().__init__()
            self.rank = rank

    del METHODS["theirs"]
    assert Theirs(rank=4).rank == 4
    with pytest.raises(ValueError, match=r"^rank=5: expected int from 1 to 4$"):
        Theirs(rank=5)


def test_the_first_field_out_of_its_range_is_named() -> None:
    @dataclasses.dataclass
    class Some:
        size: Annotated[int, Range(1, 9)] = 1
        left_open: str = ""

    check_fields(Some())
    with pytest.raises(ValueError, match=r"^size=0: expected int from 1 to 9$"):
        check_fields(Some(size=0))


def test_what_does_not_fit_in_memory_is_refused_before_it_is_allocated(lab: Any) -> None:
    room_for(1, "a byte")
    with pytest.raises(ValueError, match=r"^all takes 1,000,000.0 GB of memory, and [\d,.]+ GB are free: give less$"):
        room_for(1e15, "all")
    for method in ("ranpac(dim=100000)", "moe_adapters(experts=1024, rank=4096)"):
        learner = lab.but(dim=512).learner(method)
        with pytest.raises(ValueError, match=r"GB of memory, and [\d,.]+ GB are free: give less$"):
            learner.grow(lab.stream().tasks[0])
