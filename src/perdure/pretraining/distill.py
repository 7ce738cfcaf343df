"""Distillation of features without labels: a frozen teacher says what features images should have.

Of another, stronger model: feature distillation (Wei et al., 2022, arXiv:2205.14141): smooth L1 distance (β = 2) of the
projected features to the teacher's, whitened by a layer norm without weights. Of the learner itself as it was when the
step began: the student sees images with hidden patches and gives what the teacher gives of whole ones, as in data2vec
(Baevski et al., ICML 2022, arXiv:2202.03555).

Differs: features are those of images, not of tokens; a teacher that reads other sizes gets the student's images
resampled; the learner's own teacher stays as it was, data2vec's follows the student.
"""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones import BACKBONES
from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.core.pretext import Pretext
from perdure.mechanisms.distillation import Teacher
from perdure.options.ranges import Range
from perdure.options.spec import build, parse_one
from perdure.pretraining.patches import grid_of, hidden_patches, without
from perdure.types import Batch, Task

_BETA = 2.0  # of the smooth L1 distance
_RATIO = 0.5


class Distill(Pretext, name="distill"):
    """Gives images the features that a frozen teacher gives them.

    Args:
        teacher: a backbone, as 'vision(path="facebook/dinov2-base")'; None is the learner itself as it was.
        ratio: share of an image's patches that the student does not see, drawn anew in every step; None is 0.5 for the
            learner's own teacher and 0 for another.
    """

    def __init__(
        self, teacher: str | None = None, ratio: Annotated[float, Range(0, 1, below=True)] | None = None
    ) -> None:
        super().__init__()
        if teacher is None and ratio == 0:
            raise ValueError(
                f"ratio={ratio}: the learner's own features of whole images leave nothing to learn: write more than 0, "
                "or name a teacher"
            )
        self.ratio = (_RATIO if teacher is None else 0.0) if ratio is None else ratio
        self.said = Teacher("distill", ("features",))
        self.other: list[Backbone] = []  # in a list: no part of what is learnt
        if teacher is not None:
            self.other.append(build(parse_one(teacher), BACKBONES, "backbone").requires_grad_(False).eval())
        self.grid = 0

    def grow(self, learner: Core, task: Task) -> None:
        """A fresh projection to another teacher's features."""
        with torch.no_grad():
            self.grid = grid_of(learner.backbone) if self.ratio else 0
        if self.other:
            self.other[0].to(learner.device)
            self.projection = nn.Linear(learner.backbone.dim, self.other[0].dim, dtype=torch.float32)

    def begin_task(self, learner: Core) -> None:
        """Take the learner as it is for a teacher, unless there is another."""
        if not self.other:
            self.said.snapshot(learner)

    def loss(self, learner: Core, batch: Batch) -> Tensor:
        """Smooth L1 distance of the whitened features."""
        image = batch["image"]
        with torch.no_grad():
            wanted = self._other(image) if self.other else self.said.ask(learner, batch)["features"]
        if self.ratio:
            hidden = hidden_patches(learner, len(image), self.grid, self.ratio)
            batch = batch | {"image": without(learner.backbone, image, hidden)}
        given = learner.encode(batch)
        given = self.projection(given) if self.other else F.layer_norm(given, given.shape[1:])
        return F.smooth_l1_loss(given, F.layer_norm(wanted, wanted.shape[1:]), beta=_BETA)

    def _other(self, image: Tensor) -> Tensor:
        """Features (B, dim) of another model, of images at the size that it reads."""
        (teacher,) = self.other
        if (side := teacher.preprocess.size) != image.shape[-1]:
            resampled = F.interpolate(image.float(), (side, side), mode="bicubic", antialias=True)
            image = resampled.round().clamp(0, 255).to(torch.uint8)
        return teacher({"image": image}).float()  # type: ignore[no-any-return]
