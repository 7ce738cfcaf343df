"""Experience replay (Chaudhry et al., 2019, arXiv:1902.10486): old examples are mixed into every batch."""

import torch

from perdure.learner import Core
from perdure.memory.examples import Examples, Selection
from perdure.method import Method
from perdure.types import Batch, Task


class Replay(Method, name="replay"):
    """Each batch is joined by old examples, and all seen classes compete in one cross-entropy.

    The memory holds references into the tasks' training sets, which must stay at hand.

    Args:
        size: number of examples remembered in all.
        selection: `reservoir` or `class_balanced`.
        ratio: old examples per new one in a batch.
    """

    def __init__(self, size: int = 2000, selection: Selection = "reservoir", ratio: float = 1.0) -> None:
        super().__init__()
        if ratio <= 0:
            raise ValueError(f"ratio={ratio}: expected a positive number of old examples per new one")
        self.memory, self.ratio = Examples(size, selection), ratio

    def grow(self, learner: Core, task: Task) -> None:
        """All heads learn: old classes are in the batch."""
        if task.index > 0:
            learner.objective.requires_grad_(True)

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Append old examples."""
        if not len(self.memory):
            return batch
        n = max(1, round(self.ratio * len(batch["label"])))
        old = self.memory.draw(learner.tasks, n, learner.generator("replay", learner.step))
        old = learner.completed({key: value.to(learner.device) for key, value in old.items()}, batch)
        return {key: torch.cat([value, old[key]]) for key, value in batch.items()}

    def end_task(self, learner: Core, task: Task) -> None:
        """Offer the task's examples to the memory."""
        self.memory.add(task, learner.generator("memory"))

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of the images that the memory refers to, at the size the model sees."""
        side = learner.backbone.preprocess.size
        return {"referenced_bytes": float(len(self.memory) * 3 * side * side)}
