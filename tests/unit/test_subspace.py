"""DualGPM against the formulas of the published code, and against cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perdure.memory.subspace import Subspace


def random_moments(d: int, directions: int, noise: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, directions, dtype=torch.float64, generator=g)
    x = x @ torch.randn(directions, d, dtype=torch.float64, generator=g)
    x = x + noise * torch.randn(400, d, dtype=torch.float64, generator=g)
    return x.T @ x / len(x)


def published_design(moments: Tensor, basis: Tensor, kind: str, rank: int, symmetric: bool) -> Tensor:
    """B_t of the published code (an SVD of the moments projected on one side), or its symmetric form."""
    old = basis @ basis.T
    free = torch.eye(len(moments), dtype=moments.dtype) - old if kind == "taken" else old
    return torch.linalg.svd(free @ moments @ free if symmetric else free @ moments)[0][:, :rank].T


def published_first_basis(moments: Tensor, keep: float) -> Tensor:
    """Of the first task, in the published code: it stops one direction short of `keep`."""
    u, s, _ = torch.linalg.svd(moments)
    k = max(int((torch.cumsum(s**2 / (s**2).sum(), 0) < keep).sum()), 1)
    return u[:, :k]


def span(rows: Tensor) -> Tensor:
    return rows.T @ rows


@pytest.mark.parametrize("kind", ["taken", "free"])
def test_the_design_is_the_leading_space_of_the_symmetric_form(kind: str) -> None:
    basis = torch.linalg.qr(torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    moments = random_moments(24, 6, 0.1, 2)
    ours = Subspace(basis, kind).design(moments, 4)
    torch.testing.assert_close(span(ours), span(published_design(moments, basis, kind, 4, True)), rtol=0, atol=1e-8)
    official = published_design(moments, basis, kind, 4, False)
    inside = basis @ basis.T if kind == "free" else torch.eye(24, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(official @ inside, official, rtol=0, atol=1e-8)  # another choice, in the same free space
    caught, theirs = (float(torch.trace(b @ moments @ b.T)) for b in (ours, official))
    assert caught >= theirs  # and no choice catches more of the inputs' energy


def test_without_a_past_both_forms_are_one() -> None:
    moments, empty = random_moments(20, 5, 0.1, 3), torch.zeros(20, 0, dtype=torch.float64)
    ours = Subspace.empty(20).design(moments, 3)
    for symmetric in (True, False):
        theirs = published_design(moments, empty, "taken", 3, symmetric)
        torch.testing.assert_close(span(ours), span(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.98])
def test_the_first_task_takes_the_published_directions_and_the_one_that_reaches_keep(keep: float) -> None:
    moments = random_moments(30, 8, 0.1, 4)
    theirs, ours = published_first_basis(moments, keep), Subspace.empty(30).take(moments, keep, 2)
    short = float(torch.trace((theirs.T @ moments @ theirs) ** 2)) / float((moments**2).sum()) < keep
    assert ours.basis.shape[1] - theirs.shape[1] == short
    torch.testing.assert_close(ours.basis @ (ours.basis.T @ theirs), theirs, rtol=0, atol=1e-8)


def test_energy_counts_squared_or_plain_by_hand() -> None:
    moments = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    # λ: 8 12 14 15 16 of 16; λ²: 64 80 84 85 86 of 86
    for power, keep, directions in ((1, 0.5, 1), (1, 0.51, 2), (1, 0.76, 3), (2, 0.74, 1), (2, 0.75, 2), (2, 0.94, 3)):
        assert 8 - Subspace.empty(8).take(moments, keep, power).free == directions, (power, keep)
    assert 8 - Subspace.empty(8).take(moments, 1.0, 1).free == 5
    assert 8 - Subspace.empty(8).take(moments, 0.0, 1).free == 1


def test_energy_that_is_protected_already_counts() -> None:
    first = torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64))
    second = torch.diag(torch.tensor([9.0, 3, 2, 1, 0, 0, 0, 0], dtype=torch.float64))
    space = Subspace.empty(8).take(first, 0.9, 1)
    assert space.take(second, 0.6, 1).free == 7  # 9 of 15 lie in what is taken
    assert space.take(second, 0.61, 1).free == 6


def test_the_smaller_of_the_two_bases_is_stored() -> None:
    moments = torch.diag(torch.arange(10.0, 0, -1, dtype=torch.float64))
    spaces = [Subspace.empty(10).take(moments, keep, 1) for keep in (0.7, 0.74, 0.9)]
    assert [(s.kind, tuple(s.basis.shape), s.free) for s in spaces] == [
        ("taken", (10, 5), 5),
        ("free", (10, 4), 4),
        ("free", (10, 2), 2),
    ]
    torch.testing.assert_close(spaces[1].basis[:6], torch.zeros(6, 4, dtype=torch.float64))


def test_rows_beyond_the_free_space_are_zero() -> None:
    moments = random_moments(12, 12, 0.1, 5)
    taken = Subspace(torch.linalg.qr(random_moments(12, 12, 0.1, 6)).Q[:, :10])
    rows = taken.design(moments, 4)
    assert (rows.norm(dim=1) > 0).tolist() == [True, True, False, False]
    # the published code fills them with vectors of the past
    arbitrary = published_design(moments, taken.basis, "taken", 4, False)[2:]
    assert (arbitrary @ taken.basis).norm(dim=1).min() > 0.99


def test_an_exhausted_space_stays_exhausted() -> None:
    moments = random_moments(6, 6, 0.1, 7)
    space = Subspace.empty(6).take(moments, 1.0, 1)
    assert (space.kind, space.free) == ("free", 0)
    assert not space.design(moments, 3).any()
    assert space.take(random_moments(6, 6, 0.1, 8), 0.9, 2).free == 0


def test_keep_one_takes_exactly_the_directions_that_inputs_have() -> None:
    moments = random_moments(32, 5, 0.0, 9)
    space = Subspace.empty(32).take(moments, 1.0, 1)
    assert space.basis.shape == (32, 5)
    assert float(torch.trace(space.project(moments))) < 1e-9 * float(torch.trace(moments))
    assert math.isclose(float(torch.trace(space.basis.T @ moments @ space.basis)), float(torch.trace(moments)))


def test_a_space_without_a_past_works_where_the_moments_are() -> None:
    with FakeTensorMode(), torch.device("cuda"):  # knows devices, needs none
        moments = torch.eye(6, dtype=torch.float64)
        space = Subspace.empty(6, moments.device)
        assert space.project(moments).device == moments.device
        assert space.inside(torch.ones(2, 6)).device == moments.device
        with pytest.raises(RuntimeError, match="device"):
            Subspace.empty(6).project(moments)
