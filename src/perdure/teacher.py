"""A teacher: the learner as it was, kept as a snapshot of what is trained; no second backbone."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perdure.learner import Core
from perdure.memory.tensors import Tensors
from perdure.types import Batch


class Teacher(nn.Module):
    """What the learner gave when `remember` was called, although it has been trained since.

    Only parameters in training are kept, while the task lasts; everything else does not change in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = Tensors()  # name of a parameter of the learner -> its value

    def remember(self, learner: Core) -> None:
        """Take the learner as it is."""
        self.forget()
        for name, parameter in learner.trainable().items():
            self.kept[name] = parameter.contiguous()

    def forget(self) -> None:
        """Drop the snapshot."""
        self.kept.clear()

    @torch.no_grad()
    def forward(self, learner: Core, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and scores (B, seen classes) by the learner of the snapshot, without gradients."""
        values = {f"learner.{name}": self.kept[name] for name in sorted(self.kept)}
        found: tuple[Tensor, Tensor] = functional_call(_Ask(learner), values, (batch,))
        return found


class _Ask(nn.Module):
    """Features and scores as a module, for `functional_call`."""

    def __init__(self, learner: Core) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = self.learner.encode(batch)
        return features, self.learner.objective.scores(features)
