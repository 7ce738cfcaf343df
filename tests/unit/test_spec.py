"""The mini-language: what it reads, what it refuses, and in which words."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from perdure.formatting import meant
from perdure.options.spec import Spec, build, parse, parse_one


class Lora:
    def __init__(
        self,
        rank: int = 8,
        scale: float = 1.0,
        at: Literal["kv", "qv"] = "kv",
        blocks: str | None = None,
        steps: tuple[int, ...] = (),
        masked: bool = True,
    ):
        if rank < 1:
            raise ValueError("rank must be at least 1")
        if scale <= 0:
            raise ValueError(f"scale={scale}: expected a positive number")
        self.options = (rank, scale, at, blocks, steps, masked)


class Bare:
    """As an `nn.Module` without its own constructor: swallows anything."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.kwargs = kwargs


@dataclass(frozen=True)
class Images:
    path: str
    size: int
    per_class: int | None = None


class OtherError(ValueError):
    pass


def broken(rank: int = 8) -> None:
    raise TypeError("unsupported operand type(s) for +: 'NoneType' and 'int'")


def refuses(rank: int = 8) -> None:
    raise OtherError("rank=8: disk is full")


REGISTRY = {
    "lora": Lora,
    "inflora": Lora,
    "bare": Bare,
    "images": Images,
    "broken": broken,
    "refuses": refuses,
    "fast": functools.partial(Lora, masked=False),
}


def message(text: str, **given: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(parse_one(text), REGISTRY, "method", **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unreadable(text: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_is_read_as_names_with_keyword_arguments():
    assert parse("lora(rank=8) + replay(size=200)+align") == (
        Spec("lora", (("rank", 8),)),
        Spec("replay", (("size", 200),)),
        Spec("align"),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", -3),
        ("+3", 3),
        ("1e-4", 1e-4),
        ("-0.5", -0.5),
        ("None", None),
        ("True", True),
        ("'a + b'", "a + b"),
        ("'# not a comment'", "# not a comment"),
        ("'图像'", "图像"),
        ("(1, -2)", (1, -2)),
        ("()", ()),
        ("(4,)", (4,)),
        ("[10, [5, 'x']]", [10, [5, "x"]]),
    ],
)
def test_every_kind_of_literal_is_read_and_written_back(text: str, value: object):
    spec = parse_one(f"m(x={text})")
    assert dict(spec.kwargs)["x"] == value
    assert type(dict(spec.kwargs)["x"]) is type(value)
    assert parse_one(str(spec)) == spec


def test_a_spec_may_span_several_lines():
    assert parse("lora(\n  rank=8\n)\n  + replay\n") == (Spec("lora", (("rank", 8),)), Spec("replay"))


UNREADABLE = """|   |lora(|lora(rank)|lora - replay|3|'lora'|a.b(rank=1)|lora(rank=8)(alpha=1)|lora(**{'a': 1})
|lora(rank=f())|lora(rank=lora)|lora(rank=1 + 1)|lora(rank=2j)|lora(rank={1: 2})|lora(rank=b'x')|lora(rank=...)
|lora(rank=1e999)|lora(rank=-True)|lora(rank=f'{1}')|lora(rank=lambda: 0)|lora(*[1])|lora, replay
|lora; replay|lora(path='C:\\data')"""


@pytest.mark.parametrize("text", [*UNREADABLE.replace("\n", "").split("|"), "lora\0", "(" * 300 + ")" * 300])
def test_anything_but_literal_options_is_refused_in_one_line(text: str):
    assert any(word in unreadable(text) for word in ("write", "keep", "remove"))


def test_a_comment_is_refused_rather_than_dropped():
    assert "comment" in unreadable("lora # + replay")


def test_an_option_given_twice_is_refused():
    assert unreadable("lora(rank=8, rank=9)") == "'lora(rank=8, rank=9)' gives option 'rank' of 'lora' twice: keep one"


def test_a_positional_argument_is_refused_and_the_right_form_shown():
    assert "write 'lora(option=8)'" in unreadable("lora(8)")


def test_a_text_without_quotes_is_told_to_need_them():
    assert "a text needs quotes: 'kv'" in unreadable("lora(at=kv)")


def test_one_spec_is_demanded_where_only_one_is_possible():
    with pytest.raises(ValueError, match="joins 2 parts"):
        parse_one("lora + replay")


def test_build_calls_what_the_registry_holds():
    made = build(parse_one("lora(rank=4, at='qv', steps=[1, 2])"), REGISTRY, "method")
    assert made.options == (4, 1.0, "qv", None, [1, 2], True)
    assert build(parse_one("images(path='x')"), REGISTRY, "stream", size=48) == Images("x", 48)
    assert build(parse_one("fast(rank=2)"), REGISTRY, "method").options[-1] is False


def test_an_unknown_name_suggests_a_near_one_or_lists_the_known():
    assert message("inflor") == "unknown method 'inflor'; did you mean 'inflora'?"
    assert message("zzz") == "unknown method 'zzz'; known: bare, broken, fast, images, inflora, lora, refuses"


def test_an_unknown_option_suggests_a_near_one_and_lists_all():
    assert message("lora(rnk=3)") == (
        "method 'lora' has no option 'rnk'; did you mean 'rank'?; it has: rank, scale, at, blocks, steps, masked"
    )


def test_a_class_that_swallows_keywords_still_has_no_options():
    assert message("bare(rank=3)") == "method 'bare' has no option 'rank'; it takes none"


def test_a_missing_option_is_named_with_the_way_to_write_it():
    assert message("images") == "method 'images' needs path and size: write 'images(path=...)'"
    assert message("images", size=48) == "method 'images' needs path: write 'images(path=...)'"


def test_an_argument_of_the_program_may_not_be_written_and_is_not_offered():
    assert "'size' is set by the program" in message("images(path='x', size=3)", size=48)
    assert message("images(path='x', z=3)", size=48).endswith("it has: path, per_class")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora(rank='8')", "method 'lora', option rank='8': expected int"),
        ("lora(rank=8.0)", "method 'lora', option rank=8.0: expected int"),
        ("lora(rank=True)", "method 'lora', option rank=True: expected int"),
        ("lora(rank=None)", "method 'lora', option rank=None: expected int"),
        ("lora(scale='big')", "method 'lora', option scale='big': expected float"),
        ("lora(masked=1)", "method 'lora', option masked=1: expected bool"),
        ("lora(blocks=3)", "method 'lora', option blocks=3: expected str or None"),
        ("lora(at='kvv')", "method 'lora', option at='kvv': expected 'kv' or 'qv'; did you mean 'kv'?"),
        ("lora(steps=3)", "method 'lora', option steps=3: expected tuple[int, ...]"),
        ("lora(steps=(1, 'a'))", "method 'lora', option steps=(1, 'a'): expected tuple[int, ...]"),
        ("fast(rank='8')", "method 'fast', option rank='8': expected int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_anything_is_built(text: str, expected: str):
    assert message(text) == expected


@pytest.mark.parametrize("text", ["lora(scale=2)", "lora(blocks='0-4')", "lora(blocks=None)", "lora(steps=())"])
def test_a_value_of_a_fitting_type_is_accepted(text: str):
    assert isinstance(build(parse_one(text), REGISTRY, "method"), Lora)


def test_an_error_about_a_value_names_the_option():
    assert message("lora(rank=0)") == "method 'lora', option rank=0: rank must be at least 1"
    assert message("lora(rank=1, scale=0)") == "method 'lora', option scale=0: expected a positive number"


def test_a_bug_inside_a_factory_is_not_blamed_on_the_value():
    with pytest.raises(TypeError, match="unsupported operand"):
        build(parse_one("broken(rank=8)"), REGISTRY, "method")


def test_an_error_with_a_meaning_of_its_own_keeps_its_type():
    with pytest.raises(OtherError):
        build(parse_one("refuses(rank=8)"), REGISTRY, "method")


def test_an_argument_that_the_program_gives_in_vain_is_the_programs_bug():
    with pytest.raises(TypeError, match="unexpected keyword"):
        build(parse_one("lora"), REGISTRY, "method", nonsense=1)


@pytest.mark.parametrize(
    "text",
    [
        "sequence(images(path='a'), cub200())",
        "sequence(images(path='a'), sequence(cub200(), cub200()), order='natural')",
    ],
)
def test_specs_within_a_spec_are_read_and_written_back(text: str):
    spec = parse_one(text)
    assert str(spec) == text
    assert parse_one(str(spec)) == spec
    assert spec.parts[0].name == "images"


def test_parts_reach_a_factory_that_takes_them_and_no_other():
    def made(*parts: Spec, size: int = 3) -> tuple[tuple[Spec, ...], int]:
        return parts, size

    parts, size = build(parse_one("made(lora(rank=2), replay(), size=4)"), {"made": made}, "stream")
    assert parts == (Spec("lora", (("rank", 2),)), Spec("replay"))
    assert size == 4
    assert message("lora(images(path='x'))").startswith("method 'lora' is not made of others: remove")


@pytest.mark.parametrize("text", ["a(b)", "a(3)", "a(*b())", "a(b() + c())", "a(b(), c)", "a(b(d.e()))", "a(x=b())"])
def test_parts_that_are_not_specs_with_parentheses_are_refused(text: str):
    assert "write" in unreadable(text)


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("learning_rate", ["lr", "epochs"], "'lr'"),
        ("--learning-rate", ["--lr", "--epochs"], "'--lr'"),
        ("r", ["rank", "alpha"], "'rank'"),
        ("InfLoRA", ["inflora", "lora"], "'inflora'"),
        ("slca", ["align", "lora"], "'align'"),
        ("threshold", ["keep", "rank"], "'keep'"),
        ("language+projector", ["vision", "projector", "projector+language"], "'projector+language'"),
        ("Language + vision + projector", ["language", "vision+projector+language"], "'vision+projector+language'"),
    ],
)
def test_words_of_others_lead_to_ours(word: str, known: list[str], found: str) -> None:
    assert found in meant(word, known)
