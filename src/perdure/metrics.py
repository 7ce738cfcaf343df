"""Numbers of the matrix of scores, as the literature defines them; recall at K of rankings."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from perdure.types import Row

if TYPE_CHECKING:
    from torch import Tensor

Scores = Sequence[float | None]
Matrix = Sequence[Scores]

ACCURACY = ("accuracy", "accuracy_with_task_id", "task_id_accuracy")
RECALL = ("recall", "recall_own_gallery", "task_id_accuracy")
SAID = ("strict", "strict_with_task_id", "task_id_accuracy")
"""The score, the same with the task told (its own classes, its own gallery), and how often the task is right."""


def scored(rows: Iterable[Row]) -> tuple[str, str, str]:
    """`SAID` where answers in words were scored, `RECALL` where images and captions were ranked, else `ACCURACY`."""
    measured = {row.metric for row in rows}
    return next((names for names in (SAID, RECALL) if names[0] in measured), ACCURACY)


def average_after(rows: Iterable[Row], task: int) -> float | None:
    """Mean score on all tasks that were measured right after `task`; None where no old one was, or none at all."""
    rows = list(rows)
    score, _, _ = scored(rows)
    values = {row.on: row.value for row in rows if row.metric == score and row.after == task and row.on is not None}
    return None if only_new(values, task) else statistics.fmean(values.values())


def only_new(measured: Iterable[int], task: int, unlabelled: Collection[int] = ()) -> bool:
    """Whether after `task` no old one was `measured` though there are some, or none at all: then there is no mean.

    Steps of pre-training, `unlabelled`, can never be.
    """
    on = [each for each in measured if each <= task]
    return not on or (min(on) == task and any(old not in unlabelled for old in range(task)))


def matrix_of(rows: Iterable[Row], metric: str, tasks: int) -> list[list[float | None]]:
    """The T×T matrix of `metric` for T = `tasks`; of two rows for the same place the later one counts.

    Rows of the pre-trained model (`after` = -1) and facts about the learner itself (`on` is None) are left out.

    Raises:
        ValueError: when a row is about a task beyond the last.
    """
    matrix: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    for row in rows:
        if row.metric != metric or row.on is None or row.after == -1:
            continue
        if not (0 <= row.after < tasks and 0 <= row.on < tasks):
            raise ValueError(
                f"a result is about task {row.on} after task {row.after}, but there are {tasks} tasks (0-{tasks - 1}): "
                "the results belong to another stream"
            )
        matrix[row.after][row.on] = row.value
    return matrix


def taught_only(matrix: Matrix, unlabelled: Collection[int]) -> Matrix:
    """A T×T matrix without the tasks that taught nothing to score; its last row is what was known after all T.

    Args:
        matrix: of all tasks.
        unlabelled: which of them had no labels.
    """
    taught = [i for i in range(len(matrix)) if i not in unlabelled]
    rows = [matrix[i] for i in taught[:-1]] + [matrix[-1]] if taught else []
    return [[row[j] for j in taught] for row in rows]


def baseline_of(rows: Iterable[Row], metric: str, tasks: int) -> list[float | None]:
    """Scores (T) of the pre-trained model, before the first task."""
    baseline: list[float | None] = [None] * tasks
    for row in rows:
        if row.metric == metric and row.after == -1 and row.on is not None and row.on < tasks:
            baseline[row.on] = row.value
    return baseline


def acc(matrix: Matrix) -> float | None:
    """Mean score over all tasks after the last one: (1/T) Σ_j R_Tj."""
    return _mean(_square(matrix)[-1]) if matrix else None


def running_averages(matrix: Matrix) -> list[float | None]:
    """For each i: mean score over the tasks learnt so far, A_i = (1/i) Σ_{j≤i} R_ij; length T.

    None where no old task was measured, see `only_new`: the score on the new one alone is no mean.
    """
    square = _square(matrix)
    seen = [[j for j, value in enumerate(row[: i + 1]) if value is not None] for i, row in enumerate(square)]
    never = never_measured(square)
    return [None if only_new(seen[i], i, never) else _mean(row[: i + 1]) for i, row in enumerate(square)]


def never_measured(matrix: Sequence[Sequence[float | None]]) -> set[int]:
    """The tasks of a T×T matrix that nothing is known of, not even right after they were learnt."""
    return {j for j in range(len(matrix)) if all(row[j] is None for row in matrix)}


def aaa(matrix: Matrix) -> float | None:
    """Average of the running averages: (1/T) Σ_i A_i."""
    return _mean(running_averages(matrix))


def forgetting_per_task(matrix: Matrix) -> list[float | None]:
    """For each j < T: best score before the last task minus the score after it, max_{i in j..T-1} R_ij - R_Tj.

    Length T-1: the last task had no time to be forgotten. Negative where the last task improved an old one.
    """
    last = len(_square(matrix)) - 1
    lost: list[float | None] = []
    for j in range(last):
        before = _known([matrix[i][j] for i in range(j, last)])
        after = matrix[last][j]
        lost.append(None if before is None or after is None else max(before) - after)
    return lost


def forgetting(matrix: Matrix) -> float | None:
    """Mean of `forgetting_per_task`; None for a single task."""
    return _mean(forgetting_per_task(matrix))


def bwt(matrix: Matrix) -> float | None:
    """Backward transfer: mean over j < T of R_Tj - R_jj; negative is forgetting; None for a single task."""
    return _mean([_minus(matrix[-1][j], matrix[j][j]) for j in range(len(_square(matrix)) - 1)])


def fwt(matrix: Matrix, baseline: Scores | None = None) -> float | None:
    """Forward transfer: mean over j ≥ 2 of R_{j-1,j} - b_j, what earlier tasks gave to one not yet learnt.

    Args:
        matrix: with its first superdiagonal evaluated; otherwise the result is None.
        baseline: score (T) on each task of the model that has learnt nothing; None gives None.
    """
    if baseline is None:
        return None
    if len(baseline) != len(_square(matrix)):
        raise ValueError(f"baseline has {len(baseline)} scores, expected one for each of the {len(matrix)} tasks")
    return _mean([_minus(matrix[j - 1][j], baseline[j]) for j in range(1, len(matrix))])


def retention(matrix: Matrix) -> float | None:
    """Mean over j < T of R_Tj / R_jj: the share of what was learnt that is still there; None when an R_jj is 0."""
    kept: list[float | None] = []
    for j in range(len(_square(matrix)) - 1):
        first, after = matrix[j][j], matrix[-1][j]
        kept.append(None if not first or after is None else after / first)
    return _mean(kept)


def transfer(matrix: Matrix) -> float | None:
    """MTIL's Transfer: mean over tasks j ≥ 2 of the mean score on j before it was learnt, R_ij with i < j.

    Zheng et al., ICCV 2023, arXiv:2303.06628. Needs the whole square matrix.
    """
    _square(matrix)
    return _mean([_mean([matrix[i][j] for i in range(j)]) for j in range(1, len(matrix))])


def average(matrix: Matrix) -> float | None:
    """MTIL's Avg: the mean of all scores, on every task after every task; its Last is `acc`."""
    return _mean([value for row in _square(matrix) for value in row])


def session_accuracies(matrix: Matrix, images: Sequence[int]) -> list[float | None]:
    """After each task: the share of right answers on all test images of the tasks learnt so far; length T.

    Args:
        matrix: of shares.
        images: test images of each task, (T).
    """
    return [_weighted(row[: i + 1], images[: i + 1]) for i, row in enumerate(_square(matrix))]


def harmonic_means(matrix: Matrix, images: Sequence[int]) -> list[float | None]:
    """After each task: 2 a b / (a + b), a the accuracy on the first task, b that on all images of the others learnt.

    None after the first. One that learns nothing new has 0 (Peng et al., ECCV 2022, arXiv:2208.00147).
    """
    found: list[float | None] = []
    for i, row in enumerate(_square(matrix)):
        base, new = row[0], _weighted(row[1 : i + 1], images[1 : i + 1])
        both = None if base is None or new is None else base + new
        found.append(None if both is None or base is None or new is None else 2 * base * new / both if both else 0.0)
    return found


def new_task_acc(matrix: Matrix) -> float | None:
    """Mean score on each task right after it was learnt: (1/T) Σ_j R_jj."""
    return _mean([row[j] for j, row in enumerate(_square(matrix))])


def summarise(matrix: Matrix, baseline: Scores | None = None) -> dict[str, float | None]:
    """All of the above by name: acc, aaa, forgetting, bwt, fwt, retention."""
    return {
        "acc": acc(matrix),
        "aaa": aaa(matrix),
        "forgetting": forgetting(matrix),
        "bwt": bwt(matrix),
        "fwt": fwt(matrix, baseline),
        "retention": retention(matrix),
    }


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n-1) over seeds; the latter None for a single value.

    Raises:
        ValueError: when there is no value.
    """
    if not values:
        raise ValueError("no values to average: give at least one")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _square(matrix: Matrix) -> Matrix:
    for i, row in enumerate(matrix):
        if len(row) != len(matrix):
            raise ValueError(
                f"row {i} of the score matrix has {len(row)} entries, expected {len(matrix)}, one a task; "
                "write None where a task was not evaluated"
            )
    return matrix


def _known(values: Scores) -> list[float] | None:
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) else None


def _mean(values: Scores) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _weighted(values: Scores, weights: Sequence[int]) -> float | None:
    known = _known(values)
    return sum(v * w for v, w in zip(known, weights, strict=True)) / sum(weights) if known else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


CUTS = (1, 5, 10)
_CHUNK = 1024  # queries whose scores are held at once


def ranks(
    queries: Tensor, owners: Tensor, gallery: Tensor, gallery_owners: Tensor, right: Tensor | None = None
) -> Tensor:
    """How many of the gallery that belong to others score at least as high as the query's best own, int64 (n,).

    Equal scores, and what is no number, count against the query: a model that finds all alike finds nothing.

    Args:
        queries: unit-length embeddings (n, dim).
        owners: to whom each query belongs, (n,).
        gallery: unit-length embeddings (m, dim).
        gallery_owners: to whom each of the gallery belongs, (m,).
        right: which of the gallery count as answers, bool (m,), all when None; others of a query's own owner are
            neither right nor wrong.
    """
    import torch  # here: the numbers of a matrix need none

    found = []
    for some, mine in zip(torch.split(queries, _CHUNK), torch.split(owners, _CHUNK), strict=True):
        scores = some @ gallery.T
        own = mine[:, None] == gallery_owners[None]
        answers = own if right is None else own & right
        best = scores.masked_fill(~answers, -torch.inf).amax(1, keepdim=True)
        found.append((~(scores < best) & ~own).sum(1))
    return torch.cat(found)


def recalls(
    images: Tensor,
    image_owners: Tensor,
    texts: Tensor,
    text_owners: Tensor,
    galleries: tuple[Tensor, ...],
    right: Tensor | None = None,
) -> dict[str, float]:
    """Share of queries whose best own answer is among the first K, in both directions.

    Args:
        images: queries, unit-length (n, dim).
        image_owners: identity of each image, (n,).
        texts: queries, unit-length (m, dim).
        text_owners: identity of the image of each text, (m,).
        galleries: images, their owners, texts, their owners: in which is searched.
        right: which texts of the gallery count as answers, see `ranks`.

    Returns:
        `i2t@1` (an image finds any of its texts), ..., `t2i@10` (a text finds its image).
    """
    gallery, owners, lines, line_owners = galleries
    both = {
        "i2t": ranks(images, image_owners, lines, line_owners, right),
        "t2i": ranks(texts, text_owners, gallery, owners),
    }
    return {f"{way}@{k}": (rank < k).double().mean().item() for way, rank in both.items() for k in CUTS}
