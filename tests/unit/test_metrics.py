"""Numbers of the score matrix against calculations by hand."""

import pytest

from perdure import metrics
from perdure.types import Row

# After each of three tasks; the part above the diagonal is what the model answers before having learnt the task.
MATRIX = [[0.9, 0.1, 0.2], [0.8, 0.85, 0.2], [0.7, 0.8, 0.9]]
LOWER = [[0.9, None, None], [0.8, 0.85, None], [0.7, 0.8, 0.9]]


def test_three_tasks_give_the_numbers_calculated_by_hand():
    assert metrics.summarise(MATRIX, baseline=[0.1, 0.1, 0.1]) == pytest.approx(
        {
            "acc": 2.4 / 3,
            "aaa": (0.9 + 0.825 + 0.8) / 3,
            "forgetting": (0.2 + 0.05) / 2,
            "bwt": (-0.2 - 0.05) / 2,
            "fwt": (0.0 + 0.1) / 2,
            "retention": (0.7 / 0.9 + 0.8 / 0.85) / 2,
        }
    )


def test_only_forward_transfer_needs_scores_on_tasks_not_yet_learnt():
    full, lower = metrics.summarise(MATRIX, [0.1] * 3), metrics.summarise(LOWER, [0.1] * 3)
    assert lower.pop("fwt") is None
    assert full.pop("fwt") == pytest.approx(0.05)
    assert lower == full


def test_forward_transfer_without_a_baseline_is_undefined():
    assert metrics.fwt(MATRIX) is None
    assert metrics.fwt(MATRIX, [0.1, None, 0.1]) is None


def test_baseline_of_another_length_is_refused():
    with pytest.raises(ValueError, match="baseline has 2 scores"):
        metrics.fwt(MATRIX, [0.1, 0.1])


def test_forgetting_counts_from_the_best_score_not_from_the_first():
    matrix = [[0.5, None, None], [0.7, 0.6, None], [0.4, 0.6, 0.9]]
    assert metrics.forgetting_per_task(matrix) == pytest.approx([0.3, 0.0])
    assert metrics.bwt(matrix) == pytest.approx(-0.05)


def test_forgetting_is_negative_when_the_last_task_improves_an_old_one():
    assert metrics.forgetting([[0.5, None], [0.6, 0.9]]) == pytest.approx(-0.1)


def test_one_task_has_no_forgetting_rather_than_none_of_it():
    assert metrics.summarise([[0.8]]) == {
        "acc": 0.8,
        "aaa": 0.8,
        "forgetting": None,
        "bwt": None,
        "fwt": None,
        "retention": None,
    }


def test_retention_is_undefined_when_a_task_was_never_learnt():
    assert metrics.retention([[0.0, None], [0.5, 0.5]]) is None


def test_a_missing_score_makes_the_numbers_that_need_it_undefined():
    unfinished = [[0.9, None], [None, None]]
    assert metrics.summarise(unfinished) == dict.fromkeys(("acc", "aaa", "forgetting", "bwt", "fwt", "retention"))
    assert metrics.running_averages(unfinished) == [0.9, None]


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="row 1 of the score matrix has 1 entries, expected 2"):
        metrics.acc([[0.1, 0.2], [0.3]])


def test_matrix_takes_the_rows_of_its_metric_and_the_latest_of_two():
    rows = [
        Row(-1, 0, "accuracy", 0.05),
        Row(0, 0, "accuracy", 0.1),
        Row(0, 0, "accuracy", 0.9),
        Row(0, 0, "task_id_accuracy", 0.4),
        Row(0, None, "accuracy", 0.3),
        Row(1, 0, "accuracy", 0.8),
        Row(1, 1, "accuracy", 0.7),
    ]
    assert metrics.matrix_of(rows, "accuracy", 2) == [[0.9, None], [0.8, 0.7]]
    assert metrics.baseline_of(rows, "accuracy", 2) == [0.05, None]


def test_a_result_beyond_the_last_task_is_refused():
    with pytest.raises(ValueError, match="task 2 after task 2, but there are 2 tasks"):
        metrics.matrix_of([Row(2, 2, "accuracy", 0.5)], "accuracy", 2)


def test_spread_is_mean_and_sample_deviation():
    assert metrics.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert metrics.spread([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no values"):
        metrics.spread([])


def test_the_score_on_the_new_task_alone_is_no_mean() -> None:
    last = [[0.9, None, None], [None, 0.5, None], [0.3, 0.4, 0.8]]
    assert metrics.running_averages(last) == [0.9, None, pytest.approx(0.5)]
    untested = [[None, None], [None, 0.5]]
    assert metrics.running_averages(untested) == [None, None]
