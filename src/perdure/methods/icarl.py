"""iCaRL: classifier and representation learning (Rebuffi et al., CVPR 2017, arXiv:1611.07725).

Exemplars are chosen by herding; a task trains on its own images and all exemplars; old classes are distilled from the
model before the task; an image is answered by the nearest mean of exemplars.

Differs: cross-entropy in place of a sigmoid for each class, as in PyCIL and PILOT, and distillation as T² · KL on
softened probabilities of the old classes (PyCIL has no T², which is `strength=1/T²` here). Means of exemplars are not
averaged with those of mirrored images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.distillation import Teacher, distillation
from perdure.mechanisms.references import BufferView, refer
from perdure.mechanisms.replay import ExemplarBuffer
from perdure.options.ranges import Bytes, Count, Factor, Strength, without_effect
from perdure.types import Batch, Data, Task

_TEMPERATURE = 2.0


class ICaRL(Method, name="icarl"):
    """Learns with exemplars of all classes, keeps what old classes looked like, and answers by their nearest mean.

    Args:
        size: number of exemplars in all, equally many a class; None is 2000, or what `bytes` allow.
        strength: weight of the distillation; 0 leaves it out.
        temperature: that softens the probabilities which are distilled; None is 2.
        bytes: of images, as a number or a text such as "50MB", in place of `size`.
    """

    needs = ("classes",)
    rehearses = "some"

    def __init__(
        self,
        size: Count | None = None,
        strength: Strength = 1.0,
        temperature: Factor | None = None,
        bytes: Bytes | str | None = None,
    ) -> None:
        super().__init__()
        if strength == 0:
            without_effect("with strength=0", temperature=temperature)
        self.strength, self.temperature = strength, _TEMPERATURE if temperature is None else temperature
        self.memory = ExemplarBuffer(size, bytes, "herding")
        self.teacher = Teacher("icarl", ["scores"])
        self.means = BufferDict()  # exemplars: (classes seen, dim), unit rows in the order of the objective's columns

    def grow(self, learner: Core, task: Task) -> None:
        """All heads learn, and all seen classes compete: there are examples of each.

        Raises:
            ValueError: when there are more classes than exemplars.
        """
        self.memory.grow(learner)
        learner.objective.unmask()
        if (seen := len(learner.objective.classes)) > self.memory.size:
            memory = self.memory
            size = f"size={memory.size}" if memory.budget is None else f"bytes={memory.budget}, room for {memory.size}"
            raise ValueError(f"{size}: icarl answers by exemplars, expected one or more for each of {seen} classes")

    def data(self, learner: Core, task: Task) -> Data:
        """The task's training set and the exemplars of the tasks before."""
        old = self.memory.refs.cpu()
        old = old[old[:, 0] < task.index]
        return BufferView(learner.tasks, torch.cat([refer(task), old])) if len(old) else task.train

    def begin_task(self, learner: Core, task: Task) -> None:
        """Remember the model as it is."""
        self.memory.begin(learner)
        if self._old(learner) and self.strength:
            self.teacher.snapshot(learner)

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """Logits (B, seen classes) of the model before the task."""
        return self.teacher.precompute(learner, batch)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · T² · KL(teacher, model) over the old classes."""
        if not self.teacher.weights:
            return 0.0
        scores = (self.teacher(learner, batch)["scores"], learner.objective.scores(features))
        wanted, given = (each[:, : self._old(learner)] for each in scores)
        return self.strength * distillation(wanted, given, self.temperature)

    def end_task(self, learner: Core, task: Task) -> None:
        """Choose the task's exemplars; take all classes' means with the encoder of this moment."""
        self.teacher.clear()
        self.memory.remember(learner, task)
        features, labels = learner.features(BufferView(learner.tasks, self.memory.refs))
        columns = learner.objective.columns(labels)
        sums = features.new_zeros(len(learner.objective.classes), features.shape[1])
        # one class at a time: what a parallel sum adds up first may differ from run to run
        for column in range(len(sums)):
            sums[column] = F.normalize(features[columns == column], dim=1).sum(0)
        self.means["exemplars"] = F.normalize(sums, dim=1)

    def forget(self, left: Forgotten) -> None:
        """Let go of classes' means; the memory does of their exemplars."""
        if (means := self.means.get("exemplars")) is not None:
            self.means["exemplars"] = means[left.columns[left.columns < len(means)].to(means.device)]

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of the images that the memory refers to, at the size the model sees."""
        return self.memory.measures(learner)

    def predict(self, learner: Core, batch: Batch) -> Tensor:
        """Cosines (B, seen classes) to the means of exemplars; -inf for classes that are still to be learnt."""
        features = F.normalize(learner.encode(batch), dim=1)
        means = self.means.get("exemplars", features[:0])
        missing = len(learner.objective.classes) - len(means)
        return F.pad(features @ means.T, (0, missing), value=-torch.inf)

    @staticmethod
    def _old(learner: Core) -> int:
        """Number of classes of the tasks before, which come first among the columns."""
        return len({c for task in learner.tasks[:-1] for c in task.classes})
