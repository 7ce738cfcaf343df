"""Progressive columns: former ones never change, and a new one hears them."""

from typing import Any

import pytest
import torch

from perdure.adapters.progressive_columns import ProgressiveColumns
from perdure.types import Told


def columns(tasks: int, lateral: bool = True, width: int = 6, rank: int = 3) -> ProgressiveColumns:
    """With as many closed columns, none of which is trivial."""
    torch.manual_seed(0)
    made = ProgressiveColumns(width, rank, lateral)
    for task in range(tasks):
        made.start(torch.device("cpu"), task)
        with torch.no_grad():
            for name in made.open.names:
                made.open[name].add_(torch.randn_like(made.open[name]))
        made.close(task)
    return made.eval()


def test_a_column_is_its_own_bottleneck_and_what_it_hears_of_each_former_one() -> None:
    kept, h = columns(3), torch.randn(4, 5, 6)
    found: list[Any] = []
    for task in range(3):
        own = {key.partition("/")[2]: value for key, value in kept.closed.items() if key.startswith(f"{task}/")}
        added = torch.nn.functional.gelu(h @ own["down"].T + own["bias"]) @ own["up"].T
        if task:
            heard = sum(own["scale"][j] * a @ own["lateral_down"][j].T for j, a in enumerate(found))
            added = added + torch.nn.functional.gelu(heard) @ own["lateral_up"].T
        found.append(added)
    kept.routes = torch.tensor([2, 0, -1, 1])
    taken = [found[2][0], found[0][1], torch.zeros(5, 6), found[1][3]]
    torch.testing.assert_close(kept(h, h, 0) - h, torch.stack(taken), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "lateral_down", "lateral_up"])
def test_with_laterals_at_zero_a_column_is_an_isolated_adapter(name: str) -> None:
    kept, h = columns(2), torch.randn(4, 6)
    alone = ProgressiveColumns(6, 3, lateral=False).eval()
    for key, value in kept.closed.items():
        if key.partition("/")[2] in ("down", "bias", "up"):
            alone.closed[key] = value
    assert not torch.equal(kept.given(h, 1), alone.given(h, 1))
    kept.closed[f"1/{name}"] = torch.zeros_like(kept.closed[f"1/{name}"])
    assert torch.equal(kept.given(h, 1), alone.given(h, 1))


def test_former_columns_are_heard_without_gradient() -> None:
    kept, h = columns(1), torch.randn(4, 6, requires_grad=True)
    kept.start(torch.device("cpu"), 1)
    torch.nn.init.normal_(kept.open["lateral_up"])
    kept.train()
    heard, opened = kept.given(h.detach(), 0), {name: kept.open[name] for name in kept.open.names}
    wanted = h + kept._column(opened, h, [heard])
    found = kept(h, h, 0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), h) for each in (found, wanted)))


def test_options_say_where_columns_stand_and_whether_they_hear_each_other(lab: Any) -> None:
    learner = lab.learner("pnn(rank=3, blocks='1', lateral=False)")
    for task in lab.stream().tasks[:2]:
        learner.grow(task)
    (columns,) = learner.method.experts
    assert set(columns.open.names) == {"down", "bias", "up"}
    assert {len(columns.open.down), len(columns.open.bias)} == {3}


@pytest.mark.parametrize("backbone", [{}, {"fused": False}, {"objective": "zeroshot"}])
def test_told_the_task_an_old_column_answers_bit_for_bit_as_before_others_were_learnt(backbone: Any, lab: Any) -> None:
    bench = lab.but(**backbone, scenario="task")
    stream, learner = bench.stream(), bench.learner("pnn(rank=4)")
    before = []
    for task in stream:
        bench.teach(learner, [task])
        before.append(told(learner, task))
        kept = {key: value.clone() for key, value in learner.method.experts[0].closed.items() if key.startswith("0/")}
    for task, features in zip(stream, before, strict=True):
        assert torch.equal(told(learner, task), features)
    assert all(torch.equal(learner.method.experts[0].closed[key], value) for key, value in kept.items())
    assert not torch.equal(before[0], before[1])


def told(learner: Any, task: Any) -> Any:
    with learner.inference():
        return torch.cat([learner.encode(batch) for batch in learner.batches(Told(task.test, task.index), 8)]).clone()


def test_parameters_grow_with_the_square_of_the_number_of_tasks_as_the_card_says(lab: Any) -> None:
    bench = lab.but(tasks=4, epochs=1)
    learner, stored = bench.learner("pnn(rank=3)"), []
    for task in bench.stream():
        bench.teach(learner, [task])
        stored.append(learner.method.measures(learner)["column_parameters"])
    blocks, d, r = len(learner.method.experts), bench.dim, 3
    news = [blocks * (2 * r * d + r + (k * (r * d + 1) + r * d if k else 0)) for k in range(4)]
    assert [now - before for now, before in zip(stored, [0.0, *stored], strict=False)] == news
