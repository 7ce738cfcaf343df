"""RanPAC: one regression, however the data came."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.mechanisms.subspace import unpack_symmetric
from perdure.methods.ranpac import random_signs
from perdure.types import Task


def everything(bench: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of all training images."""
    parts = [task.train.__getitems__(range(len(task.train))) for task in bench.stream()]
    return torch.cat([bench.backbone()(part) for part in parts]), torch.cat([part["label"] for part in parts])


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize("dim", [0, 48])
def test_scores_are_the_ridge_regression_on_all_data_at_once(dim: int, scenario: Any, lab: Any) -> None:
    bench = lab.but(scenario=scenario)
    learner = bench.taught(f"ranpac(dim={dim}, ridge=5.0)")
    features, labels = everything(bench)
    test = bench.backbone()(bench.stream().tasks[1].test.__getitems__(range(8)))

    def expand(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ random_signs(16, dim, 0)).double() if dim else F.pad(x, (0, 1), value=1.0).double()

    h = expand(features)
    weights = torch.linalg.solve(h.T @ h + 5 * torch.eye(h.shape[1]).double(), h.T @ F.one_hot(labels).double())
    with learner.inference():
        given = learner(bench.stream().tasks[1].test.__getitems__(range(8)))
    torch.testing.assert_close(given.double(), expand(test) @ weights, rtol=1e-3, atol=1e-4)


def test_how_classes_are_split_into_tasks_changes_nothing(lab: Any) -> None:
    stream = lab.stream()
    learner = lab.taught("ranpac(dim=32, ridge=1.0)")
    whole = lab.learner("ranpac(dim=32, ridge=1.0)")
    sets = [task.train for task in stream]
    names = tuple(name for task in stream for name in task.names)
    at_once = Task(0, "all", tuple(range(6)), names, train=_Joined(sets))
    whole.grow(at_once)
    whole.method.end_task(whole, at_once)
    test = stream.tasks[2].test.__getitems__(range(8))
    with learner.inference(), whole.inference():
        torch.testing.assert_close(whole(test), learner(test), rtol=1e-3, atol=1e-4)


class _Joined:
    def __init__(self, sets: Any) -> None:
        whole = [each.__getitems__(range(len(each))) for each in sets]
        self.batch = {k: torch.cat([part[k] for part in whole]) for k in whole[0]}
        self.labels = self.batch["label"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Any) -> dict[str, torch.Tensor]:
        return {k: v[torch.as_tensor(positions)] for k, v in self.batch.items()}


def test_ranpac_answers_better_than_heads_learnt_apart(lab: Any) -> None:
    bench = lab.but(per_class=30, noise=0.5)
    learners = [bench.taught(m) for m in ("probe", "ranpac(dim=200)")]
    apart, regressed = (
        sum(learner.objective.evaluate(learner, [task])[0]["accuracy"] for task in bench.stream()) / 3
        for learner in learners
    )
    assert regressed > apart + 0.3
    assert learners[1].trainable() == {}


def test_the_ridge_is_chosen_on_training_images_of_the_task_alone(lab: Any) -> None:
    """Neither the test set nor what other tasks hold has any influence."""
    learner, stream = lab.learner("ranpac(dim=32)"), lab.stream()
    blind = lab.learner("ranpac(dim=32)")
    for task in stream.tasks[:2]:
        lab.teach(learner, [task])
        lab.teach(blind, [Task(task.index, task.name, task.classes, task.names, task.total, train=task.train)])
        assert torch.equal(learner.method.regression["ridge"], blind.method.regression["ridge"])
    alone = lab.learner("ranpac(dim=32)")
    for task in stream.tasks[:2]:
        alone.grow(task)
    alone.method.end_task(alone, stream.tasks[1])
    assert torch.equal(alone.method.regression["ridge"], learner.method.regression["ridge"])


def test_labels_that_mean_nothing_get_a_stronger_ridge(lab: Any) -> None:
    learner = lab.learner("ranpac(dim=0)")
    learner.grow(lab.stream().tasks[0])
    features = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    shuffled = labels[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    choose = learner.method._choose
    assert choose(learner, features, shuffled) > choose(learner, features, labels)


def test_a_given_ridge_is_used(lab: Any) -> None:
    assert lab.taught("ranpac(dim=8, ridge=123.0)").method.measures(None) == {"ridge": 123.0}


@pytest.mark.parametrize("option", ["ridge=1e-30", ""])
def test_the_ridge_that_is_measured_is_the_one_that_is_solved_with(option: str, lab: Any) -> None:
    learner = lab.taught(f"ranpac(dim=300, {option})")
    method, classes = learner.method, learner.objective.classes
    gram, ridge = unpack_symmetric(method.regression["gram"]), method.measures(learner)["ridge"]
    assert ridge >= 0.99e-7 * float(gram.trace())
    sums = torch.stack([method.sums[str(c)].double() for c in classes], dim=1)
    expected = torch.linalg.solve(gram + ridge * torch.eye(300).double(), sums)
    torch.testing.assert_close(method._solve(classes, 300).double(), expected, rtol=1e-5, atol=1e-7)


def test_no_ridge_below_the_least_is_chosen(lab: Any) -> None:
    learner = lab.learner("ranpac(dim=0)")
    learner.grow(lab.stream().tasks[0])
    features = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    free = learner.method._choose(learner, features, labels)
    assert learner.method._choose(learner, features, labels, least=3e7) in (3e7, 1e8)
    assert learner.method._choose(learner, features[:1], labels[:1], least=3e7) == 3e7
    assert free < 3e7


def test_a_class_not_learnt_yet_scores_zero(lab: Any) -> None:
    learner, stream = lab.learner("ranpac(dim=16)"), lab.stream()
    test = stream.tasks[0].test.__getitems__(range(4))
    learner.grow(stream.tasks[0])
    with learner.inference():
        assert torch.equal(learner(test), torch.zeros(4, 2))
    learner.method.end_task(learner, stream.tasks[0])
    learner.grow(stream.tasks[1])
    with learner.inference():
        scores = learner(test)
    assert scores[:, :2].abs().min() > 0
    assert torch.equal(scores[:, 2:], torch.zeros(4, 2))


def test_the_regression_is_solved_once_for_many_batches(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, data = lab.taught("ranpac(dim=16)"), lab.stream().tasks[0].test
    solved = []
    original = type(learner.method)._solve
    monkeypatch.setattr(type(learner.method), "_solve", lambda *args: solved.append(1) or original(*args))
    with learner.inference():
        learner.scores_of(data, 1)
        learner.scores_of(data, 2)
    assert len(solved) <= 1
    learner.load_state_dict(learner.learnt_state(), strict=False)
    with learner.inference():
        learner.scores_of(data, 1)
    assert len(solved) <= 2


def test_the_state_is_one_triangle_and_a_sum_for_each_class(lab: Any) -> None:
    learner = lab.taught("ranpac(dim=40)")
    held = {k: v for k, v in learner.learnt_state().items() if k.startswith("method.")}
    assert sum(v.nbytes for v in held.values()) == 40 * 41 // 2 * 4 + 6 * 40 * 4 + 4
    gram = unpack_symmetric(learner.method.regression["gram"])
    assert torch.equal(gram, gram.T)


def test_the_projection_depends_on_the_seed_alone_and_has_independent_signs() -> None:
    assert torch.equal(random_signs(16, 100, 3), random_signs(16, 100, 3))
    assert not torch.equal(random_signs(16, 100, 3), random_signs(16, 100, 4))
    signs = random_signs(64, 4096, 0)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert (signs @ signs.T / 4096 - torch.eye(64)).abs().max() < 0.1
    # The first bits of a hash never change; if these do, saved learners stop working.
    assert random_signs(1, 8, 0).tolist() == [FIRST]


FIRST = [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0]


def test_in_a_composition_features_are_of_the_tasks_end(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + ranpac(dim=0)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    features, _ = learner.features(stream.tasks[0].train)
    wide = F.pad(features, (0, 1), value=1.0)
    torch.testing.assert_close(
        unpack_symmetric(learner.method.parts[1].regression["gram"]).float(), wide.T @ wide, rtol=1e-4, atol=1e-4
    )


def test_the_ridge_of_the_first_task_can_be_kept(lab: Any) -> None:
    learner, stream = lab.learner("ranpac(dim=32, ridge='first')"), lab.stream()
    chosen = []
    for task in stream:
        lab.teach(learner, [task])
        chosen.append(learner.method.measures(learner)["ridge"])
    assert len(set(chosen)) == 1
    alone = lab.learner("ranpac(dim=32)")
    lab.teach(alone, stream.tasks[:1])
    assert alone.method.measures(alone)["ridge"] == chosen[0]
