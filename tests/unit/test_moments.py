"""Second moments: which tokens count, how much, and what a sketch loses of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.core.learner import Core
from perdure.mechanisms import moments
from perdure.mechanisms.moments import Sketch, second_moments
from perdure.mechanisms.subspace import Subspace
from perdure.objectives.generate import Generate
from perdure.training.config import make_method

WIDTH = 24


def read(tokens: Tensor, kinds: list[Tensor], **options: Any) -> Any:
    """Second moments of a layer that reads `tokens` (n, L, d), of which `kinds` (n, L) count."""
    layer = nn.Linear(tokens.shape[-1], 2)
    return second_moments(lambda batch: layer(batch["x"]), {"a": layer}, [{"x": tokens}], lambda _: kinds, **options)[
        "a"
    ]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_padding_does_not_count_and_a_balance_weighs_kinds_however_many_tokens_they_have() -> None:
    x, shown, said = drawn(2, 6, 5), torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    shown[:, :3], said[0, 3:6], said[1, 3:4] = True, True, True
    found, other = read(x, [shown, said]), x.clone()
    other[1, 4:] = 100
    assert torch.equal(read(other, [shown, said]), found)
    mean = [x[kind].double().T @ x[kind].double() / kind.sum() for kind in (shown, said)]
    balanced = read(x, [shown, said], balance=0.25)
    torch.testing.assert_close(balanced, 0.25 * mean[0] + 0.75 * mean[1], rtol=1e-5, atol=1e-6)
    twice = [torch.cat([each, kind], 1) for each, kind in ((shown, shown), (said, torch.zeros_like(said)))]
    again = read(torch.cat([x, x], 1), twice, balance=0.25)
    torch.testing.assert_close(again, balanced, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(read(x, [shown, ~said & False], balance=0.25), mean[0], rtol=1e-5, atol=1e-6)


def test_a_batch_without_tokens_of_a_kind_leaves_its_sketch_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDE", 8)
    x, all_of_it = drawn(2, 6, WIDTH), torch.ones(2, 6, dtype=torch.bool)
    found = read(x, [torch.zeros_like(all_of_it), all_of_it], balance=0.5, sketch=4)
    alone = read(x, [all_of_it], sketch=4)
    torch.testing.assert_close(found.rows.T @ found.rows, alone.rows.T @ alone.rows)
    empty = Sketch.empty(WIDTH, 4).taking(torch.zeros(0, WIDTH))
    assert empty.rows.shape == (4, WIDTH)
    assert not empty.rows.any()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_sketch_loses_no_more_than_its_bound_and_never_adds(size: int) -> None:
    x = (drawn(300, 6) @ drawn(6, WIDTH, seed=1) + 0.1 * drawn(300, WIDTH, seed=2)).double()
    exact, sketch = x.T @ x, Sketch.empty(WIDTH, size)
    for piece in x.split(37):
        sketch = sketch.taking(piece)
    torch.testing.assert_close(sketch.trace, exact.trace(), rtol=1e-6, atol=1e-6)
    lost = torch.linalg.eigvalsh(exact - sketch.rows.T @ sketch.rows)
    spectrum = torch.linalg.eigvalsh(exact).flip(0)
    bound = min(float(spectrum[k:].sum()) / (size - k) for k in range(size))
    slack = 1e-6 * float(spectrum[0])
    assert lost.min() >= -slack
    assert lost.max() <= bound + slack


@pytest.mark.parametrize("power", [1, 2])
def test_with_as_many_rows_as_inputs_a_sketch_takes_and_designs_what_the_matrix_does(
    power: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "WIDE", WIDTH - 1)
    tokens = (drawn(40, 5, 6) @ drawn(6, WIDTH, seed=1)) + 0.05 * drawn(40, 5, WIDTH, seed=2)
    whole = [torch.ones(40, 5, dtype=torch.bool)]
    matrix, sketch = read(tokens, whole), read(tokens, whole, sketch=WIDTH)
    assert isinstance(sketch, Sketch)
    torch.testing.assert_close(sketch.rows.T @ sketch.rows, matrix, rtol=1e-4, atol=1e-4)
    old = Subspace.empty(WIDTH).take(read(drawn(8, 4, WIDTH, seed=5), [torch.ones(8, 4, dtype=torch.bool)]), 0.3)
    for space in (Subspace.empty(WIDTH), old):
        one, other = (space.take(each, 0.95, power) for each in (matrix, sketch))
        assert one.basis.shape == other.basis.shape
        torch.testing.assert_close(other.basis @ other.basis.T, one.basis @ one.basis.T, rtol=1e-3, atol=1e-3)
        one, other = (space.design(each, 3, power) for each in (matrix, sketch))
        torch.testing.assert_close(other.T @ other, one.T @ one, rtol=1e-3, atol=1e-3)


def test_what_a_small_sketch_lost_counts_as_not_yet_taken() -> None:
    x = drawn(500, WIDTH).double()
    sketch = Sketch.empty(WIDTH, 4).taking(x)
    assert Subspace.empty(WIDTH).take(sketch, 0.9).basis.shape[1] == int((sketch.rows.norm(dim=1) > 1e-9).sum())
    assert Subspace.empty(WIDTH).design(sketch, 6)[4:].abs().sum() == 0


def test_balance_is_refused_where_all_tokens_are_of_one_kind(lab: Any) -> None:
    for method in ("inflora(rank=2, balance=0.5)", "gpm(balance=0.5)"):
        with pytest.raises(ValueError, match=r"balance=0.5\): the vision tower has tokens of one kind only"):
            lab.learner(method).grow(lab.stream().tasks[0])


def test_a_language_models_inflora_stands_on_q_k_and_v_unless_told(lab: Any) -> None:
    from perdure.backbones.tiny_mllm import tiny_mllm
    from perdure.types import Task

    learner = Core(tiny_mllm(), Generate(), make_method("inflora(rank=2, tower='language')"))
    learner.grow(Task(0, "a", (0,), ("a",)))
    assert [len(adapter.up) for adapter in learner.method.adapters.values()] == [3, 3]
