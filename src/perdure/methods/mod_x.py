"""Mod-X (Ni et al., ICML 2023, arXiv:2305.07437): how unpaired images and captions lie to each other stays.

In a batch, the cosines of all images to all captions form the contrastive matrix M. Contrastive
learning drives its diagonal; what stands beside it says how both modalities lie to each other, and is what a fine-tuned
CLIP loses. loss + strength · T² · mean of both directions of Σ_i KL(softmax(M^old_i / T) ‖ softmax(M_i / T)). A row in
which the old model does not find the true pair is replaced by the current one, which leaves nothing to be kept there.

Differs: where an image stands in a batch more than once, or shows several captions, finding any true pair counts. The
logit scale is frozen.
"""

from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.mechanisms.distillation import Distillation
from perdure.objectives.retrieve import picked
from perdure.options.ranges import Factor, Strength
from perdure.types import Batch, Task


class ModX(Distillation, name="mod_x"):
    """Keeps the distribution of an image over the batch's captions, and of a caption over its images.

    The teacher is a snapshot of what the task trains, dropped when it ends; in the first task it is the pre-trained
    model. Where images are not augmented it is asked once for a training set, else in every step.

    Args:
        strength: weight of the sum over the batch (the paper's alpha); 0 is plain training.
        temperature: T; with 1 a row of cosines is nearly even, a lower one counts large cosines more.
    """

    needs = ("captions",)

    def __init__(self, strength: Strength = 20.0, temperature: Factor = 1.0) -> None:
        super().__init__(["features", "captions"])
        self.strength, self.temperature = strength, temperature

    def holds(self, task: Task) -> bool:
        """In the first task too."""
        return bool(self.strength)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · T² · the mean of both directions' sum over the batch."""
        if not self.teacher.weights:
            return 0.0
        said, objective = self.teacher(learner, batch), learner.objective
        chosen, (texts, image_of) = objective.chosen(batch), objective.shown(batch)
        old, new = _cosines(said["features"], picked(said["captions"], chosen)), _cosines(features, texts)
        true = batch["pair"][:, None] == batch["pair"][image_of][None]
        return self.strength / 2 * (self._kept(old, new, true) + self._kept(old.T, new.T, true.T))

    def _kept(self, old: Tensor, new: Tensor, true: Tensor) -> Tensor:
        """T² · the sum, over rows in which `old` finds a true pair, of the divergence of `new` from it."""
        found = true.gather(1, old.argmax(1, keepdim=True))
        wanted, given = (F.log_softmax(scores / self.temperature, dim=1) for scores in (old, new))
        return self.temperature**2 * (F.kl_div(given, wanted, reduction="none", log_target=True) * found).sum()


def _cosines(images: Tensor, texts: Tensor) -> Tensor:
    return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
