"""DualGPM against the formulas of the published code and of the paper, and against cases worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perdure.mechanisms.moments import second_moments
from perdure.mechanisms.subspace import Subspace


def random_moments(d: int, directions: int, noise: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, directions, dtype=torch.float64, generator=g)
    x = x @ torch.randn(directions, d, dtype=torch.float64, generator=g)
    x = x + noise * torch.randn(400, d, dtype=torch.float64, generator=g)
    return x.T @ x / len(x)


def published_design(moments: Tensor, basis: Tensor, kind: str, rank: int) -> Tensor:
    """B_t of the published code: an SVD of the moments projected on one side."""
    free = outside(basis, kind)
    return torch.from_numpy(np.linalg.svd(free @ moments.numpy())[0][:, :rank].T.copy())


def outside(basis: Tensor, kind: str) -> np.ndarray:
    """The projector on the free directions."""
    whole = basis.numpy() @ basis.numpy().T
    return whole if kind == "free" else np.eye(len(whole)) - whole


def published_space(moments: Tensor, basis: Tensor, kind: str, keep: float) -> np.ndarray:
    """Projector on what is free after a later task in the published code's DualGPM, where energy is a sum of S²."""
    free, whole = outside(basis, kind), np.linalg.svd(moments.numpy())[1]
    u, s, _ = np.linalg.svd(free @ moments.numpy())
    total, held, count = (whole**2).sum(), (whole**2).sum() - (s**2).sum(), 0
    while held < keep * total:
        held += s[count] ** 2
        count += 1
    return free - u[:, :count] @ u[:, :count].T


def published_first_basis(moments: Tensor, keep: float) -> Tensor:
    """Of the first task, in the published code: it stops one direction short of `keep`."""
    u, s, _ = torch.linalg.svd(moments)
    k = max(int((torch.cumsum(s**2 / (s**2).sum(), 0) < keep).sum()), 1)
    return u[:, :k]


def span(rows: Tensor) -> Tensor:
    return rows.T @ rows


@pytest.mark.parametrize("keep", [0.8, 0.95])
def test_of_squared_moments_design_and_space_are_the_published_codes_task_after_task(keep: float) -> None:
    space, kinds = Subspace.empty(24).take(torch.eye(24, dtype=torch.float64), 0.0), []
    for task in range(6):
        moments = random_moments(24, 6, 0.3, task)
        square = moments @ moments
        theirs = published_design(moments, space.basis, space.kind, 4)
        torch.testing.assert_close(span(space.design(square, 4)), span(theirs), rtol=0, atol=1e-8)
        expected = published_space(moments, space.basis, space.kind, keep)
        space = space.take(square, keep)
        kinds.append(space.kind)
        np.testing.assert_allclose(outside(space.basis, space.kind), expected, rtol=0, atol=1e-8)
    assert {*kinds} == {"taken", "free"}


@pytest.mark.parametrize("kind", ["taken", "free"])
def test_of_the_moments_the_design_is_the_papers_and_catches_the_most_of_the_inputs(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(24, 8, dtype=torch.float64, generator=generator)).Q
    inputs = torch.randn(24, 400, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, 24)[:, None]
    ours = Subspace(basis, kind).design(inputs @ inputs.T, 4)
    paper = torch.from_numpy(np.linalg.svd(outside(basis, kind) @ inputs.numpy())[0][:, :4].T.copy())
    torch.testing.assert_close(span(ours), span(paper), rtol=0, atol=1e-8)
    code = published_design(inputs @ inputs.T, basis, kind, 4)
    caught, less = (float(torch.trace(b @ inputs @ inputs.T @ b.T)) for b in (ours, code))
    assert caught > less


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.98])
def test_the_first_task_takes_the_published_directions_and_the_one_that_reaches_keep(keep: float) -> None:
    moments = random_moments(30, 8, 0.1, 4)
    theirs, ours = published_first_basis(moments, keep), Subspace.empty(30).take(moments @ moments, keep)
    short = float(torch.trace((theirs.T @ moments @ theirs) ** 2)) / float((moments**2).sum()) < keep
    assert ours.basis.shape[1] - theirs.shape[1] == short
    torch.testing.assert_close(ours.basis @ (ours.basis.T @ theirs), theirs, rtol=0, atol=1e-8)


def test_energy_counts_squared_or_plain_by_hand() -> None:
    moments = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    # λ: 8 12 14 15 16 of 16; λ²: 64 80 84 85 86 of 86
    for power, keep, directions in ((1, 0.5, 1), (1, 0.51, 2), (1, 0.76, 3), (2, 0.74, 1), (2, 0.75, 2), (2, 0.94, 3)):
        assert 8 - Subspace.empty(8).take(moments**power, keep).free == directions, (power, keep)
    assert 8 - Subspace.empty(8).take(moments, 1.0).free == 5
    assert 8 - Subspace.empty(8).take(moments, 0.0).free == 1


def test_energy_that_is_protected_already_counts() -> None:
    first = torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64))
    second = torch.diag(torch.tensor([9.0, 3, 2, 1, 0, 0, 0, 0], dtype=torch.float64))
    space = Subspace.empty(8).take(first, 0.9)
    assert space.take(second, 0.6).free == 7  # 9 of 15 lie in what is taken
    assert space.take(second, 0.61).free == 6


def test_the_smaller_of_the_two_bases_is_stored() -> None:
    moments = torch.diag(torch.arange(10.0, 0, -1, dtype=torch.float64))
    spaces = [Subspace.empty(10).take(moments, keep) for keep in (0.7, 0.74, 0.9)]
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
    arbitrary = published_design(moments, taken.basis, "taken", 4)[2:]
    assert (arbitrary @ taken.basis).norm(dim=1).min() > 0.99


def test_an_exhausted_space_stays_exhausted() -> None:
    moments = random_moments(6, 6, 0.1, 7)
    space = Subspace.empty(6).take(moments, 1.0)
    assert (space.kind, space.free) == ("free", 0)
    assert not space.design(moments, 3).any()
    assert space.take(random_moments(6, 6, 0.1, 8), 0.9).free == 0


def test_keep_one_takes_exactly_the_directions_that_inputs_have() -> None:
    moments = random_moments(32, 5, 0.0, 9)
    space = Subspace.empty(32).take(moments, 1.0)
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


@pytest.mark.parametrize("method", ["inflora(rank=2, {})", "gpm(at='kv', {})"])
@pytest.mark.parametrize("power", [1, 2])
def test_power_two_of_a_method_takes_the_space_of_squared_moments(method: str, power: int, lab: Any) -> None:
    learner, first = lab.learner(method.format(f"power={power}, keep=0.9")), lab.stream().tasks[0]
    lab.teach(learner, [first])
    sites = learner.backbone.sites_by_input("kv")
    layers = {key: learner.backbone.get_submodule(site[0].layer) for key, site in sites.items()}
    found = second_moments(learner.forward_towers, layers, learner.batches(first.train, 64))
    for key, moments in found.items():
        expected = Subspace.empty(16).take(moments @ moments if power == 2 else moments, 0.9)
        for name in (key, key.replace(".", "/")):
            if f"{name}/taken" in learner.method.subspaces or f"{name}/free" in learner.method.subspaces:
                space = learner.method.subspaces.of(name, 16)
        assert space.free == expected.free
        np.testing.assert_allclose(outside(space.basis, space.kind), outside(expected.basis, expected.kind), atol=1e-4)
