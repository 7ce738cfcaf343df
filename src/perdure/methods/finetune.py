"""Full fine-tuning in sequence: the lower bound of forgetting."""

from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method, check_mask
from perdure.options.ranges import Factor
from perdure.types import Task


class Finetune(Method, name="finetune"):
    """Trains all weights of the encoder.

    Args:
        mask: cross-entropy among the task's own classes; False lets all seen classes compete without old data, which
            makes the head collapse onto the last task (10 % instead of 50-60 % in published tables).
        backbone_lr: learning rate of the encoder as a factor of the run's; SLCA (Zhang et al., ICCV 2023) uses 0.01.
        tower: which encoder.
    """

    changes_encoder = True
    carrier = True
    trains_shared = True
    borderless = True
    unlabelled = "any"

    def __init__(self, mask: bool = True, backbone_lr: Factor = 0.1, tower: Tower = "vision") -> None:
        super().__init__()
        self.mask, self.backbone_lr, self.tower = mask, backbone_lr, tower

    def grow(self, learner: Core, task: Task) -> None:
        """Thaw the encoder; without the mask all heads too."""
        for p in learner.backbone.tower_parameters(self.tower).values():
            p.requires_grad_(True)
        if not self.mask:
            learner.objective.unmask()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        check_mask(learner, None if self.mask else False)

    def param_groups(self, learner: Core) -> dict[str, float]:
        """A gentler learning rate for pre-trained weights."""
        return {name: self.backbone_lr for name in learner.trainable() if name.startswith("backbone.")}
