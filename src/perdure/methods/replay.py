"""Experience replay (Chaudhry et al., 2019, arXiv:1902.10486): old examples are mixed into the batches.

Which are kept: herding of iCaRL (Rebuffi et al., CVPR 2017, arXiv:1611.07725), the nearest to k-means' centroids, EL2N
and GraNd (Paul et al., NeurIPS 2021, arXiv:2107.07075), influence of TracIn (Pruthi et al., NeurIPS 2020,
arXiv:2002.08484).

Differs: the memory is filled at the end of a task, from all of its images. EL2N, GraNd and influence are those of the
model at that moment, not means over several trainings stopped early or over checkpoints: runs of a pre-trained encoder
start alike, and a few epochs are an early stage. GraNd and influence are those of the last layer. `mid` and `offset`
are not Paul et al.'s, who keep the highest scores to prune a training set; few examples should not be the mislabelled
ones.
"""

from typing import Annotated, Literal

from perdure.core.learner import Core
from perdure.mechanisms.replay import ExemplarBuffer, Rehearsal, Selection
from perdure.mechanisms.selection_scores import Position
from perdure.options.ranges import Bytes, Count, Range, Ratio, without_effect
from perdure.streams.augment import AUGMENTS, check_views
from perdure.types import Batch, Task, join

_EVERY = 10


class Replay(Rehearsal, name="replay"):
    """Old examples join the batches, and all seen classes compete in one cross-entropy.

    The memory holds references into the tasks' training sets, which must stay at hand.

    Args:
        size: number of examples remembered in all; None is 2000, or what `bytes` allow.
        selection: which are kept, see `ExemplarBuffer`.
        position: which scores are kept with `el2n`, `grand` and `influence`, see `ExemplarBuffer`.
        schedule: `interleaved` adds old examples to every batch; `periodic` puts a batch of old examples in the place
            of the first one of a task and of every `every`-th from there.
        every: number of steps from one batch of old examples to the next, with `periodic`; None is 10.
        augment: how old images are changed, before what the run does to all; None leaves them as they are.
        bytes: of images, as a number or a text such as "50MB", in place of `size`.
        ratio: old examples per new one in a batch, or in place of one.
    """

    rehearses = "some"
    borderless = True
    unlabelled = "any"

    def __init__(
        self,
        size: Count | None = None,
        selection: Selection = "reservoir",
        position: Position | None = None,
        schedule: Literal["interleaved", "periodic"] = "interleaved",
        every: Annotated[int, Range(2, 10**6)] | None = None,
        augment: Literal["flip", "crop", "zoom"] | None = None,
        bytes: Bytes | str | None = None,
        ratio: Ratio = 1.0,
    ) -> None:
        if schedule == "interleaved":
            without_effect("with schedule='interleaved'", every=every)
        super().__init__(ExemplarBuffer(size, bytes, selection, position))
        self.ratio = ratio
        self.every = (every or _EVERY) if schedule == "periodic" else None
        self.augment = augment

    def grow(self, learner: Core, task: Task) -> None:
        """All heads learn: old classes are in the batch."""
        super().grow(learner, task)
        if task.index > 0 and self.every:  # old classes are in every few batches: new ones may not compete alone
            learner.objective.unmask()
        elif task.index > 0:
            learner.objective.requires_grad_(True)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        check_views(self.augment, learner.objective.asks)
        super().check(learner, task)

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Append old examples; with `periodic`, replace the batch when it is time."""
        if not len(self.memory) or (self.every and learner.step % self.every):
            return batch
        n = max(1, round(self.ratio * len(batch["label"])))
        rows = self.memory.pick(n, learner.generator("replay", learner.step))
        view = None if self.augment is None else AUGMENTS[self.augment]
        old = self.memory.recall(learner, rows, batch, view)
        return old if self.every else join([batch, old])
