"""Joint training on all data so far, which continual methods are measured against."""

from perdure.backbones.base import Tower
from perdure.core.forgetting import only_classes
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Factor, without_effect
from perdure.streams import ConversationSet
from perdure.types import Data, Task, Union

_RATE = 0.1


class Joint(Method, name="joint"):
    """Every task trains on the union of all training sets so far, and all seen classes compete.

    By itself it fine-tunes the whole encoder; in a composition (`lora + joint`) it only decides on the data.

    Args:
        backbone_lr: as in `finetune`, when it stands alone.
        tower: which encoder, when it stands alone.
    """

    rehearses = "all"

    def __init__(self, backbone_lr: Factor = _RATE, tower: Tower = "vision") -> None:
        super().__init__()
        self.backbone_lr, self.tower = backbone_lr, tower

    def grow(self, learner: Core, task: Task) -> None:
        """All heads learn; alone, the encoder too."""
        learner.objective.unmask()
        if learner.method is not self:
            rate = None if self.backbone_lr == _RATE else self.backbone_lr
            tower = None if self.tower == "vision" else self.tower
            without_effect("beside the part that trains the encoder", tower=tower, backbone_lr=rate)
        else:
            for p in learner.backbone.tower_parameters(self.tower).values():
                p.requires_grad_(True)

    def data(self, learner: Core, task: Task) -> Data:
        """All training sets up to this task.

        Raises:
            ValueError: when one is not at hand any more.
        """
        for each in learner.tasks:
            if each.classes and not len(each.train):
                raise ValueError(
                    f"joint trains on all data so far, and that of task {each.number} ({each.name}) is not at hand: "
                    "restore the folder it was learnt from; what was given in Python is not kept"
                )
        return Union(self._sets(learner))

    def param_groups(self, learner: Core) -> dict[str, float]:
        """As in `finetune`, when alone."""
        return {n: self.backbone_lr for n in learner.trainable() if n.startswith("backbone.")}

    def measures(self, learner: Core) -> dict[str, float]:
        """Bytes of all training images so far, at the size the model sees: they have to be kept.

        Of conversations those that a task shows, each once; one may show several, and many may show one.
        """
        counted = [data.images() if isinstance(data, ConversationSet) else len(data) for data in self._sets(learner)]
        return {"referenced_bytes": float(sum(counted) * learner.image_bytes)}

    def _sets(self, learner: Core) -> list[Data]:
        """All training sets, without classes that were forgotten since."""
        return [only_classes(task.train, task.classes) for task in learner.tasks]
