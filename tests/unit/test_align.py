"""Classifier alignment: Gaussians that merge exactly, heads that compete on their samples."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.mechanisms.class_statistics import ClassStatistics, Covariance
from perdure.mechanisms.subspace import pack_symmetric, shrunk, unpack_symmetric

FORMS: tuple[Covariance, ...] = ("shared", "full", "diagonal", "lowrank")


def mixed(n: int = 40, dim: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Correlated features of some classes, in random order."""
    torch.manual_seed(0)
    labels = torch.randint(classes, (n,))
    return torch.randn(n, dim) @ torch.randn(dim, dim) + 3 * torch.randn(classes, dim)[labels], labels


def accuracy(learner: Any, stream: Any) -> float:
    return sum(learner.objective.evaluate(learner, [task])[0]["accuracy"] for task in stream) / len(stream)


def held_bytes(learner: Any) -> int:
    return sum(v.nbytes for k, v in learner.learnt_state().items() if k.startswith("method."))


@pytest.mark.parametrize("spec", [*(f"align(covariance={form!r})" for form in FORMS), "align(start='heads')"])
def test_heads_learnt_apart_answer_better_once_aligned(spec: str, lab: Any) -> None:
    bench = lab.but(per_class=30, noise=0.5)
    apart, aligned = (accuracy(bench.taught(m), bench.stream()) for m in ("probe", spec))
    assert aligned > apart + 0.3


def test_align_after_an_adapter_answers_better_than_the_adapter_alone(lab: Any) -> None:
    bench = lab.but(per_class=16, noise=0.5)
    apart, aligned = (accuracy(bench.taught(m), bench.stream()) for m in ("inflora(rank=2)", "inflora(rank=2) + align"))
    assert aligned > apart + 0.1


@pytest.mark.parametrize("form", ["shared", "full", "diagonal"])
def test_a_class_that_comes_again_is_merged_as_if_it_had_come_at_once(form: Covariance) -> None:
    features, labels = mixed()
    once, twice = ClassStatistics(form), ClassStatistics(form)
    once.add(features, labels)
    twice.add(features[:25], labels[:25])
    twice.add(features[25:], labels[25:])
    for c in range(3):
        torch.testing.assert_close(twice.mean(c), features[labels == c].mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twice.covariance_of(c), once.covariance_of(c), rtol=1e-4, atol=1e-4)
    assert twice.freedom == once.freedom == len(features) - 3


def test_the_full_covariance_is_the_unbiased_one_and_all_forms_agree_on_its_diagonal() -> None:
    features, labels = mixed()
    forms = {form: ClassStatistics(form, rank=2) for form in FORMS}
    for gaussians in forms.values():
        gaussians.add(features, labels)
    expected = features[labels == 1].T.cov().double()
    torch.testing.assert_close(forms["full"].covariance_of(1), expected, rtol=1e-5, atol=1e-5)
    for form in ("diagonal", "lowrank"):
        torch.testing.assert_close(forms[form].covariance_of(1).diagonal(), expected.diagonal(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forms["shared"].covariance_of(1), forms["full"].pooled(), rtol=1e-5, atol=1e-5)


def test_low_rank_of_all_directions_is_the_full_covariance() -> None:
    features, labels = mixed()
    low, full = ClassStatistics("lowrank", rank=6), ClassStatistics("full")
    for gaussians in (low, full):
        gaussians.add(features, labels)
    torch.testing.assert_close(low.covariance_of(0), full.covariance_of(0), rtol=1e-4, atol=1e-4)


def test_diagonal_equals_full_when_features_are_independent() -> None:
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-2.0, 2.0) for c in (-3.0, 3.0)])
    diagonal, full = ClassStatistics("diagonal"), ClassStatistics("full")
    for gaussians in (diagonal, full):
        gaussians.add(signs, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(diagonal.covariance_of(0), full.covariance_of(0))


@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_covariance_that_is_stored(form: Covariance) -> None:
    features, labels = mixed(n=200, dim=4)
    gaussians = ClassStatistics(form, rank=2)
    gaussians.add(features, labels)
    drawn = gaussians.draw(20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 20_000, 4)
    for c in range(3):
        spread = gaussians.covariance_of(c).float()
        torch.testing.assert_close(drawn[c].T.cov(), spread, rtol=0, atol=0.05 * float(spread.diagonal().max()))
        assert drawn[c].mean(0).abs().max() < 0.03 * float(spread.diagonal().max().sqrt())


def test_the_order_in_which_a_state_is_loaded_changes_no_sample() -> None:
    features, labels = mixed()
    one, two = ClassStatistics("diagonal"), ClassStatistics("diagonal")
    one.add(features, labels)
    two.load_state_dict(dict(reversed(one.state_dict().items())))
    a, b = (each.draw(5, torch.Generator().manual_seed(0)) for each in (one, two))
    assert torch.equal(a, b)


def test_bytes_in_the_checkpoint_are_ordered_by_form(lab: Any) -> None:
    bench = lab.but(per_class=4, epochs=1)
    specs = ("shared", "diagonal", "lowrank', rank=2, start='heads", "full")
    sizes = [held_bytes(bench.taught(f"align(covariance='{form}')")) for form in specs]
    means = 6 * (16 * 4 + 8)
    packed = 16 * 17 // 2 * 4
    assert sizes == [means + packed, means + 6 * 16 * 4, means + 6 * 3 * 16 * 4, means + 6 * packed]


def test_packing_keeps_a_symmetric_matrix_and_takes_half_its_bytes() -> None:
    matrix = torch.randn(7, 7)
    matrix = matrix + matrix.T
    assert pack_symmetric(matrix).numel() == 28
    assert torch.equal(unpack_symmetric(pack_symmetric(matrix)).float(), matrix)


def test_shrinkage_leaves_many_examples_alone_and_makes_few_regular() -> None:
    torch.manual_seed(0)
    features = torch.randn(5, 20, dtype=torch.float64) * torch.linspace(1, 4, 20, dtype=torch.float64)
    scarce = features.T.cov()
    assert torch.linalg.matrix_rank(shrunk(scarce, 4)) == 20
    torch.testing.assert_close(shrunk(scarce, 10**9), scarce)
    torch.testing.assert_close(shrunk(scarce, 4).trace(), scarce.trace())
    assert torch.equal(shrunk(scarce, 0), torch.eye(20, dtype=torch.float64))


def test_the_closed_form_scores_by_the_distance_under_the_shared_covariance(lab: Any) -> None:
    learner = lab.taught("align")
    gaussians, classes = learner.method.class_statistics, learner.objective.classes
    inverse = torch.linalg.inv(shrunk(gaussians.pooled(), gaussians.freedom)).float()
    features, _ = learner.features(lab.stream().tasks[1].test)
    away = features.unsqueeze(1) - torch.stack([gaussians.mean(c) for c in classes])
    distance = torch.einsum("ncd,de,nce->nc", away, inverse, away)
    expected, given = (-distance / 2).softmax(1), learner.objective.scores(features).softmax(1)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["probe + align(epochs=1)", "lora(rank=2) + replay(size=6) + align(epochs=1)"])
def test_what_was_frozen_is_aligned_and_frozen_again(method: str, lab: Any) -> None:
    learner, stream = lab.learner(method), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    first = learner.objective.heads[0].weight.clone()
    learner.grow(stream.tasks[1])
    before = [p.requires_grad for p in learner.objective.parameters()]
    learner.method.begin_task(learner, stream.tasks[1])
    learner.method.end_task(learner, stream.tasks[1])
    assert [p.requires_grad for p in learner.objective.parameters()] == before
    assert not torch.equal(learner.objective.heads[0].weight, first)
    assert all(p.grad is None for p in learner.objective.parameters())


def test_shrinking_shortens_old_means_as_slca_does(lab: Any) -> None:
    learner = lab.taught("align(shrink=0.1)")
    align = learner.method
    means = align._means(learner, learner.tasks[2])
    for c, factor in enumerate([0.9 + 0.1 / 3] * 2 + [0.9 + 0.2 / 3] * 2 + [1.0] * 2):
        torch.testing.assert_close(means[c], align.class_statistics.mean(c) * factor)


def test_the_temperature_levels_the_logits_of_tasks(lab: Any) -> None:
    learner = lab.taught("align(temperature=0.5, epochs=1)")
    scores = torch.tensor([[3.0, 4.0, 0.0, 1.0, 0.0, 0.0]])  # norms 5, 1, 0
    torch.testing.assert_close(learner.method._levelled(learner, scores), scores / 2.0 / 0.5)


def test_directions_lie_in_memory_as_they_would_be_loaded() -> None:
    gaussians = ClassStatistics("lowrank", rank=2)
    gaussians.add(*mixed())
    assert gaussians.covariances["0/directions"].is_contiguous()


def test_a_learning_rate_that_is_too_high_is_named(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"^align diverged after task 2: give a lower lr than 1e\+06$"):
        lab.taught("align(start='heads', lr=1e6)")
