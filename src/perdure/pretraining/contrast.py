"""Contrast of images and captions without labels: CLIP's loss (Radford et al., ICML 2021), as `retrieve` has it."""

from torch import Tensor

from perdure.core.learner import Core
from perdure.core.objective import OBJECTIVES
from perdure.core.pretext import Pretext
from perdure.types import Batch, Task


class Contrast(Pretext, name="contrast"):
    """Images find their captions and captions their images, in a batch; for backbones with a text tower."""

    towers = frozenset({"vision", "text"})
    captions = True

    def __init__(self) -> None:
        super().__init__()
        self.pairs = OBJECTIVES["retrieve"]()

    def grow(self, learner: Core, task: Task) -> None:
        """Nothing is made; refuse a backbone that reads no texts, and a learner that learns captions anyway."""
        if "text" not in learner.backbone.towers():
            raise ValueError(
                f"contrast needs a text tower, which {learner.backbone.spec} lacks: use clip(path=...) or pocket(), or "
                "--pretext masked()"
            )
        if "captions" in learner.objective.asks:
            raise ValueError("this learner learns captions by this very loss: teach it with 'perdure learn'")

    def loss(self, learner: Core, batch: Batch) -> Tensor:
        """Mean of image to text and text to image."""
        self.pairs.bind(learner)
        return self.pairs.loss(learner.encode(batch), self.pairs.embed_texts(learner, batch))
