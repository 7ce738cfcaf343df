"""A teacher: the learner as it was, kept as a snapshot of what is trained; no second backbone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.objectives.retrieve import embedded
from perdure.types import Batch


class Teacher(nn.Module):
    """What the learner answered when `remember` was called, although it has been trained since.

    Only parameters in training are kept, while the task lasts; everything else does not change in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = BufferDict()  # name of a parameter of the learner -> its value

    def remember(self, learner: Core) -> None:
        """Take the learner as it is."""
        self.forget()
        for name, parameter in learner.trainable().items():
            self.kept[name] = parameter.contiguous()

    def forget(self) -> None:
        """Drop the snapshot."""
        self.kept.clear()

    @contextmanager
    def swapped_in(self, learner: Core) -> Iterator[None]:
        """Within, `learner` answers as it did: in evaluation mode, without gradients; then it is what it has become."""
        # by pointer, not by torch.func: some parts hold parameters of others, which a call with other values misses
        swapped = [(learner.get_parameter(name), self.kept[name]) for name in sorted(self.kept)]
        present, training = [parameter.data for parameter, _ in swapped], learner.training
        try:
            for parameter, value in swapped:
                parameter.data = value
            learner.eval()
            with torch.no_grad():
                yield
        finally:
            learner.train(training)
            for (parameter, _), value in zip(swapped, present, strict=True):
                parameter.data = value

    def pairs(self, learner: Core, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and the captions' embeddings (B, K, dim), zero where there is none, without gradients."""
        with self.swapped_in(learner):
            return learner.encode(batch), embedded(learner, batch["text"])

    def forward(self, learner: Core, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and scores (B, seen classes) by the learner of the snapshot, without gradients."""
        with self.swapped_in(learner):
            features = learner.encode(batch)
            return features, learner.objective.scores(features)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows (Hinton et al., 2015, arXiv:1503.02531).

    The factor T² keeps gradients of about the same size at any temperature.

    Args:
        teacher: scores (n, k).
        student: scores (n, k), which get the gradient.
        temperature: T, positive; a higher one counts small scores more.
    """
    wanted, given = (F.log_softmax(scores / temperature, dim=1) for scores in (teacher, student))
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def trains_encoder(learner: Core) -> bool:
    """Whether the current task trains more than heads: if not, what a teacher says of features is what they are."""
    heads = {id(p) for p in learner.objective.parameters()}
    return any(id(p) not in heads for p in learner.trainable().values())
