"""Distillation of features: the encoder keeps giving new images the features that it gave them when the task began.

Less forgetting by the features' direction is LUCIR's (Hou et al., CVPR 2019): loss + strength · mean(1 - cos(f^teacher,
f^student)), on the new task's images. With a text tower that is trained too, the same for the embeddings of old class
names, as ZSCL (Zheng et al., ICCV 2023, arXiv:2303.06628) keeps both towers of a CLIP.

Differs: LUCIR's strength grows with √(old / new classes), here it is constant. The text side has the old class names in
place of ZSCL's sentences from elsewhere. `form="mse"` is relative to the length of the teacher's features, so that it
means the same for every model.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.injection import adapted
from perdure.adapters.state import BufferDict
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import check_tower, treated
from perdure.mechanisms.distillation import Distillation
from perdure.objectives.retrieve import picked
from perdure.objectives.zeroshot import class_texts
from perdure.options.ranges import Strength, without_effect
from perdure.types import Batch, Task


class FeatureDistill(Distillation, name="feature_distill"):
    """Keeps features of new images, or embeddings of old class names, near what they were when the task began.

    The teacher is a snapshot of what the task trains, dropped when it ends. Where images are not augmented it is asked
    once for a training set, else in every step; for class names once.

    Args:
        strength: weight of the distance; 0 is plain training.
        tower: whose output is held: `vision`, `text` (class names or captions, with a part that trains the text
            tower), or `both`, whose distances add up; in a language model `language`: what tokens of answers are read
            from.
        form: `cosine` is 1 - cos; `mse` the squared distance in units of the teacher's squared length, which holds
            lengths too.
    """

    unlabelled = "any"

    def __init__(
        self, strength: Strength = 1.0, tower: Tower = "vision", form: Literal["cosine", "mse"] = "cosine"
    ) -> None:
        super().__init__()
        if not strength:
            held, apart = None if tower == "vision" else tower, None if form == "cosine" else form
            without_effect("with strength=0", tower=held, form=apart)
        self.strength, self.tower, self.form = strength, tower, form
        self.name_embeddings = BufferDict()  # "old": the teacher's embeddings of the former tasks' class names

    def grow(self, learner: Core, task: Task) -> None:
        """Nothing to make room for; refuse texts where there are none."""
        check_tower(learner, self, self.tower)
        if "conversations" in learner.objective.asks:
            if self.tower != "language":
                raise ValueError(
                    f"feature_distill(tower={self.tower!r}): what is said is read from the language tower, whichever "
                    "is trained: write tower='language'"
                )
            return
        captioned = "captions" in learner.objective.asks
        held = {"vision": "features", "text": "captions"} if captioned else {"vision": "features"}
        self.ask_for([held[tower] for tower in self._towers("vision", "text") if tower in held])

    def begin_task(self, learner: Core, task: Task) -> None:
        """Take the learner as teacher, and what it makes of old class names."""
        super().begin_task(learner, task)
        named = self._towers("text") and any(each.classes for each in learner.tasks[:-1])
        if self.holds(task) and named and "classes" in learner.objective.asks:
            with self.teacher.swapped_in(learner):  # as it answers, without what methods do in training only
                self.name_embeddings["old"] = self._embed(learner)
        if not self.teacher.outputs and self.tower != "language":
            self.teacher.clear()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse a tower, or a task, in which nothing moves; known when all parts have grown."""
        for tower in self._towers("vision", "text"):
            if not _moves(learner, tower):
                raise ValueError(
                    f"feature_distill(tower={self.tower!r}) has no effect on the {tower} tower, which no part trains: "
                    f"write tower={'text' if tower == 'vision' else 'vision'!r}, or a part with tower='both'"
                )
        super().check(learner, task)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · distance of the student's output to the teacher's, for each tower."""
        total: Tensor | float = 0.0
        if self.teacher.weights and self.tower == "language":
            with self.teacher.swapped_in(learner):  # not kept beside examples, of which each has many rows
                held = learner.encode(batch)
            return self.strength * self._distance(held, features)
        if self.teacher.weights:
            wanted, objective = self.teacher(learner, batch), learner.objective
            if "features" in wanted:
                total = total + self.strength * self._distance(wanted["features"], features)
            if "captions" in wanted:
                shown = picked(wanted["captions"], objective.chosen(batch))
                total = total + self.strength * self._distance(shown, objective.shown(batch)[0])
        if self.name_embeddings:
            total = total + self.strength * self._distance(self.name_embeddings["old"], self._embed(learner))
        return total

    def end_task(self, learner: Core, task: Task) -> None:
        """Let the teacher, and the old names, go."""
        super().end_task(learner, task)
        self.name_embeddings.clear()

    def _towers(self, *wanted: Tower) -> list[Tower]:
        return [tower for tower in wanted if self.tower in (tower, "both")]

    def _distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.form == "cosine":
            return (1 - F.cosine_similarity(teacher, student, dim=1)).mean()
        squares = (student - teacher).square().sum(1)
        return (squares / teacher.square().sum(1)).mean()

    @staticmethod
    def _embed(learner: Core) -> Tensor:
        """Unit embeddings of the former tasks' class names."""
        objective = learner.objective
        former = {c for task in learner.tasks[:-1] for c in task.classes}
        old = [(c, n) for c, n in zip(objective.classes, objective.names, strict=True) if c in former]
        return class_texts(learner, [name for _, name in old], objective.templates, [c for c, _ in old])


def _moves(learner: Core, tower: str) -> bool:
    """Whether any part can change what `tower` gives."""
    inside = learner.backbone.get_submodule(learner.backbone.towers()[tower])
    return adapted(inside) or tower in treated(learner.method) or any(p.requires_grad for p in inside.parameters())
