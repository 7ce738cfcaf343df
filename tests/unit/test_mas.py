"""MAS: how much the scores of single examples depend on each parameter, whatever their labels."""

from typing import Any

import pytest
import torch

from perdure.types import Batch


class Mislabelled:
    """Data whose labels are wrong."""

    def __init__(self, data: Any) -> None:
        self.data, self.labels = data, data.labels.flip(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, positions: Any) -> Batch:
        return self.data.__getitems__(positions) | {"label": self.labels[torch.as_tensor(positions)]}


def by_hand(learner: Any, data: Any) -> dict[str, torch.Tensor]:
    """Mean over examples of |∂ ‖scores‖² / ∂θ|, over its mean."""
    total = {name: torch.zeros_like(p) for name, p in learner.shared().items()}
    batch = data.__getitems__(range(len(data)))
    for i in range(len(data)):
        learner.zero_grad()
        scores = learner.objective.scores(learner.encode({k: v[i : i + 1] for k, v in batch.items()}))
        scores.norm().square().backward()
        for name in total:
            total[name] += learner.get_parameter(name).grad.abs()
    mean = torch.cat([value.flatten() for value in total.values()]).mean()
    return {name: value / mean for name, value in total.items()}


@pytest.mark.parametrize("carrier", ["lora(rank=2)", "finetune"])
def test_importance_is_the_mean_of_single_examples_and_adds_up_over_tasks(carrier: str, lab: Any) -> None:
    learner, stream = lab.learner(f"{carrier} + mas(samples=1000)"), lab.stream()
    guard, expected = learner.method.parts[1], {}
    for task in stream.tasks[:2]:
        lab.teach(learner, [task])
        expected = {name: value + expected.get(name, 0) for name, value in by_hand(learner, task.train).items()}
        assert set(guard.quadratic_penalty.weights) == set(expected)
        for name, weight in guard.quadratic_penalty.weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=2e-3, atol=1e-4)
            assert torch.equal(guard.quadratic_penalty.anchors[name], learner.get_parameter(name))


def test_labels_do_not_matter(lab: Any) -> None:
    learner, task = lab.learner("lora(rank=2) + mas + ewc"), lab.stream().tasks[0]
    lab.teach(learner, [task])
    wrong = Mislabelled(task.train)
    assert not torch.equal(wrong.labels, task.train.labels)
    for part, same in ((learner.method.parts[1], True), (learner.method.parts[2], False)):
        before = {name: weight.clone() for name, weight in part.quadratic_penalty.weights.items()}
        part.quadratic_penalty = type(part.quadratic_penalty)()
        part.end_task(learner, type(task)(**{**vars(task), "train": wrong}))
        assert all(torch.equal(part.quadratic_penalty.weights[name], weight) for name, weight in before.items()) is same
