"""What a sweep searches, as text."""

import pytest

from perdure.options.search_space import Interval, check_space, filled, holes, parse_space


def test_a_space_is_read_as_it_is_written() -> None:
    assert parse_space('rank=4..32, lr=1e-4..1e-2 log, blocks=["0-4", None]') == {
        "rank": Interval(4, 32),
        "lr": Interval(1e-4, 1e-2, log=True),
        "blocks": ("0-4", None),
    }
    assert parse_space("keep=0.5..1") == {"keep": Interval(0.5, 1)}
    assert parse_space('at=["q,v", "k"]') == {"at": ("q,v", "k")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("rank", "cannot read 'rank'"),
        ("rank=8", "expected an interval"),
        ("rank=[8]", "two values or more"),
        ("rank=[8, 8]", "different"),
        ("rank=[(1, 2), 3]", "numbers, texts"),
        ("rank=8..4", "a lower and a higher"),
        ("rank=4..x", "'x' is not a number"),
        ("lr=0..1 log", "begins above 0"),
        ("lr=1..2 logarithmic", "'logarithmic'"),
        ("lr=nan..1", "'nan' is not a number"),
        ("lr=1..2, lr=2..3", "names lr twice"),
        ("rank=[8, open('x')]", "cannot read rank"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_space(text)
    assert "\n" not in str(caught.value)


def test_holes_are_named_by_their_option_or_as_written_and_filled() -> None:
    text = "lora(rank=?, at='qv') + replay(size = ?memory)"
    assert holes(text) == {"rank", "memory"}
    assert filled(text, {"rank": 8, "memory": 200}) == "lora(rank=8, at='qv') + replay(size=200)"
    assert filled("lora(blocks=?)", {"blocks": None}) == "lora(blocks=None)"


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("rank=1..4, size=1..2", "leaves memory open"),
        ("rank=1..4, memory=1..2, kank=1..2", "'kank', which nothing takes .*did you mean|'kank', which nothing takes"),
    ],
)
def test_a_space_that_fits_no_hole_is_refused(space: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_space(parse_space(space), {"method": "lora(rank=?) + replay(size=?memory)"}, ("lr", "size"))
