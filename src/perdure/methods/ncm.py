"""Nearest class mean on the encoder's features (SimpleCIL; Zhou et al., IJCV 2024, arXiv:2303.07338)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.core.objective import Head
from perdure.types import Batch, Task


class NCM(Method, name="ncm"):
    """Answers by the cosine to each class's mean feature. By itself it trains nothing.

    In a composition (`lora + ncm`) a class's mean is taken at the end of its task, with the encoder of that moment.
    """

    needs = ("classes",)

    def __init__(self) -> None:
        super().__init__()
        self.sums = BufferDict()  # class id -> sum of features (dim,)
        self.counts = BufferDict()  # class id -> number of images

    def grow(self, learner: Core, task: Task) -> None:
        """Alone, freeze the heads: they would be trained in vain."""
        if learner.method is self:
            learner.objective.requires_grad_(False)

    def end_task(self, learner: Core, task: Task) -> None:
        """Add the task's features to its classes' means."""
        features, labels = learner.features(learner.method.data(learner, task))
        for c in task.classes:
            mine = features[labels == c]
            self.sums[str(c)] = mine.sum(0) + self.sums.get(str(c), 0)
            self.counts[str(c)] = torch.tensor(len(mine)) + self.counts.get(str(c), 0)

    def predict(self, learner: Core, batch: Batch) -> Tensor:
        """Cosines (B, seen classes) to the class means."""
        return F.normalize(learner.encode(batch), dim=1) @ self._means(learner).T

    def head(self, learner: Core) -> Head:
        """The class means."""
        what = "cosine to the classes' mean features (rows of `weight`, of unit length)"
        scores = 'torch.nn.functional.normalize(features) @ head["weight"].T'
        return Head(what, scores, {"weight": self._means(learner)})

    def _means(self, learner: Core) -> Tensor:
        """Unit-length class means, (seen classes, dim)."""
        means = torch.stack([self.sums[str(c)] / self.counts[str(c)] for c in learner.objective.classes])
        return F.normalize(means, dim=1)
