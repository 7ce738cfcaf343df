"""What descriptions rule out is refused before anything is learnt, and looking ahead leaves no trace."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from perdure.core.learner import Core
from perdure.training.building import dry_run
from perdure.training.config import make_method
from perdure.training.loop import fit_task
from perdure.types import Batch, Task


class Unread:
    """Images that nobody may look at."""

    labels = torch.zeros(4, dtype=torch.int64)

    def __len__(self) -> int:
        return 4

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        raise AssertionError(positions)


def look_ahead(lab: Any, method: str, backbone: Any = None, **more: Any) -> None:
    stream = lab.stream()
    unread = replace(stream, tasks=tuple(replace(task, train=Unread(), test=Unread()) for task in stream))
    dry_run(lab.config(method, **more), backbone or lab.backbone(), unread)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


LEAVING = ["finetune", "gpm", "l2p", "coda_prompt", "dualprompt", "prefix", "fm_lora(rank=4)", "adapter(parallel=True)"]


@pytest.mark.parametrize("method", [*LEAVING, "inflora(rank=2) + cosine", "prompt + lora(rank=2) + icarl(size=3)"])
def test_the_backbone_is_as_it_was(method: str, lab: Any) -> None:
    backbone, before = lab.backbone(), lab.backbone().state_dict()
    try:
        look_ahead(lab, method, backbone)
    except ValueError:
        assert "icarl" in method
    assert hooks(backbone) == 0
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    fresh, again = (
        lab.teach(Core(each, lab.learner("probe").objective, make_method("lora(rank=2)")), lab.stream().tasks[:2])
        for each in (lab.backbone(), backbone)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.learnt_state().values(), again.learnt_state().values(), strict=True)
    )


DESCRIBED = (
    "lora(rank=2, tasks=1) + ncm | lora(rank=2, tasks=2, per_task=True) | adapter(rank=3, tasks=1) | "
    "fm_lora(rank=4) + lwf | lora(rank=2) + derpp(size=12) | dualprompt"
)


@pytest.mark.parametrize("method", DESCRIBED.split(" | "))
def test_descriptions_alone_say_what_each_task_trains(method: str, lab: Any) -> None:
    learner, ahead = lab.learner(method), lab.learner(method)
    for task in lab.stream():
        learner.grow(task)
        ahead.grow(Task.described(task.describe()))
        assert ahead.trainable().keys() == learner.trainable().keys()
        fit_task(learner, task, lab.train_config(epochs=1))
