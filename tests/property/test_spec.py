"""Whatever can be written as a spec is read back the same; whatever cannot is refused in one line."""

import keyword

from hypothesis import given
from hypothesis import strategies as st

from perdure.options.spec import Spec, parse

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda s: not keyword.iskeyword(s))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
specs = st.builds(lambda n, kw: Spec(n, tuple(kw.items())), names, st.dictionaries(names, values, max_size=3))


@given(st.lists(specs, min_size=1, max_size=4))
def test_written_specs_are_read_back_the_same(chosen: list[Spec]):
    read = parse(" + ".join(map(str, chosen)))
    assert read == tuple(chosen)
    assert [str(s) for s in read] == [str(s) for s in chosen]


@given(st.text() | st.text(alphabet="ab1(),=+-'\"[]{}#*. \n"))
def test_any_text_is_read_or_refused_in_one_line(text: str):
    read, refusal = (), ""
    try:
        read = parse(text)
    except ValueError as error:
        refusal = str(error)
    assert bool(read) != bool(refusal)
    assert "\n" not in refusal
    if read:
        assert parse(" + ".join(map(str, read))) == read
