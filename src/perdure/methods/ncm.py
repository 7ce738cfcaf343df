"""Nearest class mean on the encoder's features (SimpleCIL; Zhou et al., IJCV 2024, arXiv:2303.07338)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.core.objective import Head
from perdure.mechanisms.references import BufferView, refer
from perdure.types import Batch, Data, Task


class NCM(Method, name="ncm"):
    """Answers by the cosine to each class's mean feature. By itself it trains nothing.

    In a composition (`lora + ncm`) a class's mean is taken at the end of its task, with the encoder of that moment.
    """

    needs = ("classes",)
    unlabelled = "untaught"
    borderless = True
    trains = False

    def __init__(self) -> None:
        super().__init__()
        self.sums = BufferDict()  # class id -> sum of features (dim,)
        self.counts = BufferDict()  # class id -> number of images

    def grow(self, learner: Core, task: Task) -> None:
        """Alone, freeze the heads: they would be trained in vain."""
        if learner.method is self:
            learner.objective.requires_grad_(False)

    def after_step(self, learner: Core, batch: Batch) -> None:
        """Without borders, add the features of the step's new examples."""
        if learner.online:
            self._add(learner, BufferView(learner.tasks, refer(learner.task, torch.tensor(learner.newest))))

    def end_task(self, learner: Core, task: Task) -> None:
        """Add the task's features to its classes' means."""
        if not (learner.online or task.pretext):
            # The task's own images: those that `joint` adds were counted when they came.
            self._add(learner, task.train)

    def _add(self, learner: Core, data: Data) -> None:
        features, labels = learner.features(data)
        for c in torch.unique(labels).tolist():
            mine = features[labels == c]
            self.sums[str(c)] = mine.sum(0) + self.sums.get(str(c), 0)
            self.counts[str(c)] = torch.tensor(len(mine)) + self.counts.get(str(c), 0)

    def forget(self, left: Forgotten) -> None:
        """Let go of classes' means."""
        for c in left.classes:
            self.sums.pop(str(c), None)
            self.counts.pop(str(c), None)

    def predict(self, learner: Core, batch: Batch) -> Tensor:
        """Cosines (B, seen classes) to the class means; -1 for a class of which nothing came yet."""
        cosines = F.normalize(learner.encode(batch), dim=1) @ self._means(learner).T
        missing = [i for i, c in enumerate(learner.objective.classes) if str(c) not in self.sums]
        cosines[:, missing] = -1.0
        return cosines

    def head(self, learner: Core) -> Head:
        """The class means."""
        what = "cosine to the classes' mean features (rows of `weight`, of unit length)"
        scores = 'torch.nn.functional.normalize(features) @ head["weight"].T'
        return Head(what, scores, {"weight": self._means(learner)})

    def _means(self, learner: Core) -> Tensor:
        """Unit-length class means, (seen classes, dim); zeros for a class of which nothing came yet."""
        nothing = torch.zeros(learner.backbone.dim, dtype=torch.float32, device=learner.device)
        means = torch.stack(
            [self.sums[k] / self.counts[k] if k in self.sums else nothing for k in map(str, learner.objective.classes)]
        )
        return F.normalize(means, dim=1)
