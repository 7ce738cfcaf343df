"""What holds for every score matrix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure import metrics
from perdure.types import Row

score = st.floats(0, 1)
square = st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(score, min_size=n, max_size=n), min_size=n, max_size=n))
several = square.filter(lambda m: len(m) > 1)


@given(square)
def test_averages_stay_within_the_scores(matrix: list[list[float]]):
    values = [v for row in matrix for v in row]
    for number in (metrics.acc(matrix), metrics.aaa(matrix)):
        assert number is not None
        assert min(values) - 1e-12 <= number <= max(values) + 1e-12


@given(several)
def test_forgetting_is_at_least_the_negative_of_backward_transfer(matrix: list[list[float]]):
    # Backward transfer compares with the first score only, forgetting with the best one.
    assert metrics.forgetting(matrix) >= -metrics.bwt(matrix) - 1e-12


@given(several, score)
def test_scores_that_never_change_are_neither_forgotten_nor_improved(matrix: list[list[float]], value: float):
    constant = [[value] * len(matrix) for _ in matrix]
    assert metrics.forgetting(constant) == metrics.bwt(constant) == 0
    assert metrics.fwt(constant, [value] * len(matrix)) == 0
    assert metrics.retention(constant) == (1 if value else None)


@given(square)
def test_scores_on_future_tasks_change_nothing_but_forward_transfer(matrix: list[list[float]]):
    lower = [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(matrix)]
    assert metrics.summarise(lower) == metrics.summarise(matrix)


@given(square, st.randoms())
def test_matrix_is_rebuilt_from_its_rows_in_any_order(matrix: list[list[float]], random):
    rows = [Row(i, j, "accuracy", v) for i, row in enumerate(matrix) for j, v in enumerate(row)]
    random.shuffle(rows)
    assert metrics.matrix_of(rows, "accuracy", len(matrix)) == matrix


@given(st.lists(score, min_size=2), st.floats(-1, 1))
def test_spread_moves_with_its_values_and_keeps_its_width(values: list[float], shift: float):
    mean, std = metrics.spread(values)
    moved_mean, moved_std = metrics.spread([v + shift for v in values])
    assert moved_mean == pytest.approx(mean + shift, abs=1e-9)
    assert moved_std == pytest.approx(std, abs=1e-9)
