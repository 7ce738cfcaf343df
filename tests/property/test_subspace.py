"""The space of past inputs: orthonormal, never left, never too large to store, whatever the tasks."""

import math
from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from perdure.mechanisms.subspace import Subspace, keep_schedule

thorough = settings(deadline=None, max_examples=40)


def moments(fan_in: int, directions: int, noise: float, seed: int) -> Tensor:
    """E[x xᵀ] of inputs that lie in few directions, with noise in all."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(fan_in, directions, dtype=torch.float64, generator=g)
    x = torch.randn(300, directions, dtype=torch.float64, generator=g) @ mix.T
    x += noise * torch.randn(300, fan_in, dtype=torch.float64, generator=g)
    return x.T @ x / len(x)


def stored(space: Subspace) -> Subspace:
    """As a checkpoint gives it back."""
    return Subspace(space.basis.float().double(), space.kind)


def free_projector(space: Subspace) -> Tensor:
    whole = space.basis @ space.basis.T
    return whole if space.kind == "free" else torch.eye(len(whole), dtype=whole.dtype) - whole


@thorough
@given(
    fan_in=st.integers(4, 40),
    directions=st.integers(1, 12),
    noise=st.sampled_from([0.0, 1e-3, 0.05, 0.5]),
    keep=st.sampled_from([0.5, 0.9, 0.95, 0.999, 1.0]),
    power=st.sampled_from([1, 2]),
    rank=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@example(fan_in=48, directions=10, noise=0.05, keep=0.98, power=2, rank=4, seed=0)
@example(fan_in=48, directions=10, noise=0.05, keep=0.9, power=1, rank=4, seed=0)
@example(fan_in=5, directions=3, noise=0.0, keep=0.5, power=2, rank=3, seed=767)
def test_every_task_is_taken_and_left_alone_afterwards(
    fan_in: int, directions: int, noise: float, keep: float, power: int, rank: int, seed: int
) -> None:
    space, kinds = Subspace.empty(fan_in), set()
    for t in range(6):
        r = torch.linalg.matrix_power(moments(fan_in, directions, noise, 10 * seed + t), power)
        before = free_projector(space)

        rows = space.design(r, min(rank, fan_in))
        live = rows.norm(dim=1) > 0
        assert int(live.sum()) <= space.free
        if space.free < len(rows):  # beyond the free space there is no direction, not an arbitrary one
            assert not live.all()
        gram = rows[live] @ rows[live].T
        assert (gram - torch.eye(len(gram))).abs().max().item() < 1e-6 if len(gram) else True
        # nothing leaks into the past, but what float32 lost of the basis, over the share that a direction has of r
        assert (rows - rows @ before).abs().max() < 1e-5

        space = stored(space.take(r, keep))
        kinds.add(space.kind)
        k = space.basis.shape[1]
        assert k <= fan_in / 2
        assert (space.basis.T @ space.basis - torch.eye(k)).abs().max().item() < 1e-6 if k else True
        after = free_projector(space)
        assert (after - before @ after).abs().max() < 1e-5  # what was taken stays taken
        assert float((after @ r @ after).trace()) <= (1 - keep + 1e-6) * float(r.trace())
    if keep == 1.0 and noise == 0.5:
        assert space.free == 0
        assert kinds <= {"free", "taken"}


@thorough
@given(fan_in=st.integers(4, 30), keep=st.floats(0.3, 0.999), power=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_no_direction_is_taken_that_is_not_needed(fan_in: int, keep: float, power: int, seed: int) -> None:
    first, second = (torch.linalg.matrix_power(moments(fan_in, 5, 0.1, s), power) for s in (seed, seed + 1000))
    space = Subspace.empty(fan_in)
    for r in (first, second):
        free = free_projector(space)
        values = torch.linalg.eigvalsh(free @ r @ free).flip(0).clamp_min(0)
        taken = space.take(r, keep)
        count = space.free - taken.free
        if count > (space.free == fan_in):  # the very first task takes one direction in any case
            assert float(values[count - 1 :].sum()) > (1 - keep) * float(r.trace()) * (1 - 1e-6)
        space = taken


@thorough
@given(share=st.floats(0, 1), total=st.integers(1, 30))
def test_the_schedule_rises_from_keep_towards_one(share: float, total: int) -> None:
    shares = [keep_schedule(share, t, total) for t in range(total)]
    assert shares[0] == share
    assert shares == sorted(shares)
    assert all(math.isclose(b - a, (1 - share) / total, abs_tol=1e-12) for a, b in pairwise(shares))
    assert {keep_schedule(share, t, None) for t in range(total)} == {share}
