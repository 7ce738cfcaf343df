"""Prefix tuning: where prefixes stand, that tasks share them, and that single examples have gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.core.learner import Core
from perdure.types import Batch


class Loss(nn.Module):
    """A learner's loss as a module."""

    def __init__(self, learner: Core) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch) -> Tensor:
        return self.learner.objective.losses(self.learner.encode(batch), batch, True).mean()


def test_prefixes_stand_in_the_chosen_blocks_and_tasks_share_them(lab: Any) -> None:
    learner, stream = lab.learner("prefix(length=3, blocks='1')"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    (prefix,) = learner.method.prefixes
    assert prefix.values.shape == (1, 3, 2 * lab.dim)
    assert [n for n in learner.shared() if not n.startswith("objective")] == ["method.prefixes.0.values"]
    assert learner.constant_blocks == 1
    before = prefix.values.detach().clone()
    lab.teach(learner, stream.tasks[1:2])
    assert list(learner.method.prefixes) == [prefix]
    assert not torch.equal(prefix.values, before)


@pytest.mark.parametrize("spec", ["prefix(length=2)", "dualprompt", "coda_prompt(components=2)"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_single_examples_equal_a_loop(spec: str, fused: bool, lab: Any) -> None:
    bench = lab.but(fused=fused)
    learner, stream = bench.learner(spec), bench.stream()
    bench.teach(learner, stream.tasks[:1], epochs=1)
    learner.grow(stream.tasks[1])
    learner.train()
    params = {f"learner.{k}": p for k, p in learner.trainable().items()}
    batch = stream.tasks[1].train.__getitems__(range(4))
    loss = Loss(learner)

    def of_one(values: dict[str, Tensor], example: Batch) -> Tensor:
        return functional_call(loss, values, ({k: v.unsqueeze(0) for k, v in example.items()},))

    with sdpa_kernel(SDPBackend.MATH):
        together = vmap(grad(of_one), in_dims=(None, 0))({k: p.detach() for k, p in params.items()}, batch)
    seen = 0
    for i in range(4):
        learner.zero_grad()
        loss({k: v[i : i + 1] for k, v in batch.items()}).backward()
        for k, p in params.items():
            if p.grad is not None:  # a key learns from the penalty
                torch.testing.assert_close(together[k][i], p.grad, rtol=1e-4, atol=1e-6)
                seen += "method" in k
    assert seen >= 4
