"""Which classes compete for new images where old images are kept: all, unless the method's source masks them."""

from typing import Any

import pytest
import torch

ALL = ("gem", "gem(mask=False)", "agem(mask=False)", "derpp", "replay(schedule='periodic')", "icarl", "joint")
OWN = ("gem(mask=True)", "agem", "derpp(mask=True)", "lwf", "ewc")


def pushed(lab: Any, spec: str) -> bool:
    """Whether new images move the head of old classes."""
    learner, stream = lab.learner(f"finetune + {spec}"), lab.stream()
    learner.grow(stream.tasks[0])
    learner.grow(stream.tasks[1])
    new = stream.tasks[1].train.__getitems__(range(4))
    learner.objective.loss(learner.encode(new), new).backward()
    old, own = (head.weight.grad for head in learner.objective.heads)
    assert own.any()
    return old is not None and bool(old.any())


@pytest.mark.parametrize("spec", ALL + OWN)
def test_new_images_compete_with_old_classes_where_the_methods_source_has_it(spec: str, lab: Any) -> None:
    assert pushed(lab, spec) == (spec in ALL)


@pytest.mark.parametrize(("spec", "competes"), [("gem", False), ("gem(mask=False)", True), ("derpp", True)])
def test_where_the_task_is_told_gem_masks_as_its_source_does(spec: str, competes: bool, lab: Any) -> None:
    assert pushed(lab.but(scenario="task"), spec) == competes


def test_without_the_mask_gem_compares_all_heads(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + gem(size=12)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    before = learner.objective.heads[0].weight.clone()
    lab.teach(learner, stream.tasks[1:2])
    assert not torch.equal(learner.objective.heads[0].weight, before)
