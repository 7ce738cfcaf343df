"""Cosine heads: directions compete, and class names can be the start."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import make_method, make_objective
from perdure.types import Task


def with_text(lab: Any, method: str, objective: str = "classify") -> Core:
    """A learner whose backbone has a text tower."""
    return Core(tiny(dim=16, text=True), make_objective(objective), make_method(method), "class", lab.seed)


def test_scores_are_scaled_cosines_and_ignore_the_length_of_rows_and_features(lab: Any) -> None:
    learner = lab.taught("cosine(scale=7)")
    rows = torch.cat([head.weight for head in learner.objective.heads])
    features = torch.randn(5, 16)
    expected = 7 * F.cosine_similarity(features.unsqueeze(1), rows.unsqueeze(0), dim=2)
    torch.testing.assert_close(learner.objective.scores(features), expected)
    torch.testing.assert_close(learner.objective.scores(100 * features), expected)
    assert [name for name, _ in learner.objective.named_parameters()] == [f"heads.{i}.weight" for i in range(3)]


def test_only_the_new_head_is_set_when_a_task_comes(lab: Any) -> None:
    learner, stream = lab.learner("cosine"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learnt = learner.objective.heads[0].weight.clone()
    learner.grow(stream.tasks[1])
    assert torch.equal(learner.objective.heads[0].weight, learnt)
    torch.testing.assert_close(learner.objective.heads[1].weight.norm(dim=1), torch.ones(2))
    assert not learner.objective.heads[0].weight.requires_grad
    assert learner.objective.heads[1].weight.requires_grad


def test_a_head_whose_classes_come_again_goes_on(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner, stream = bench.learner("cosine"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    learnt = learner.objective.heads[0].weight.clone()
    learner.grow(stream.tasks[1])
    assert len(learner.objective.heads) == 1
    assert torch.equal(learner.objective.heads[0].weight, learnt)


@pytest.mark.parametrize("template", ["a photo of a {}.", "{}"])
def test_heads_from_class_names_score_as_zero_shot_before_training(template: str, lab: Any) -> None:
    stream = lab.stream()
    heads = with_text(lab, f"cosine(init='zeroshot', template={template!r})")
    names = with_text(lab, "probe", f"zeroshot(templates={template!r})")
    images = stream.tasks[0].test.__getitems__(range(8))
    for task in stream:
        heads.grow(Task.described(task.describe()))
        names.grow(Task.described(task.describe()))
        with heads.inference(), names.inference():
            torch.testing.assert_close(heads(images), names(images))


def test_the_scale_is_ten_or_the_models_own_unless_given(lab: Any) -> None:
    task = lab.stream().tasks[0]
    for method, scale in (
        ("cosine", 10.0),
        ("cosine(init='zeroshot', scale=3.0)", 3.0),
        ("cosine(init='zeroshot')", None),
    ):
        learner = with_text(lab, method)
        learner.grow(task)
        assert learner.objective.cosine == (scale or float(learner.backbone.logit_scale))
