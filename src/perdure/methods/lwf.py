"""Learning without forgetting (Li & Hoiem, ECCV 2016, arXiv:1606.09282): new images must still look to old heads alike.

Before a task the scores that its images get for old classes are recorded (the paper's y_o), in training they are kept:
loss + strength · T² · KL(softmax(z_old^teacher / T) ‖ softmax(z_old^student / T)). Old heads go on learning under it
with the rest. Where the task is told at test time, there is one such term for each former task, as in the paper.

Differs: times T², so that `strength` means the same at any temperature; where all classes compete at test time, one
distribution over all old classes, as most later codes have it; no warm-up of the new head alone. The direction from
texts to images is ours, after the two directions of ZSCL (Zheng et al., ICCV 2023, arXiv:2303.06628).
"""

from typing import Literal

import torch
from torch import Tensor

from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.distillation import Teacher, distillation, trains_encoder
from perdure.objectives.retrieve import Retrieve
from perdure.options.ranges import Factor, Strength
from perdure.types import Batch, Task

_FEATURES, _CAPTIONS = "lwf_features", "lwf_captions"  # what is recorded of images with captions
_SCORES = "lwf"  # what is recorded: the teacher's scores of all seen classes


class LwF(Method, name="lwf"):
    """Keeps what new images score for old classes near what they scored when the task began.

    The teacher is a snapshot of what the task trains, dropped when it ends. Where images are not augmented it is asked
    once for a training set, else in every step.

    Args:
        strength: weight of the distillation (the paper's λ_o); 0 is plain training.
        temperature: T of an image's distribution over old classes.
        heads: `learn` trains old heads under the distillation, as in the paper; `frozen` leaves the keeping to the
            encoder alone.
        schedule: `share` multiplies `strength` by the share of old classes among all that are seen.
        text_temperature: with objectives that read class names, also keep the distribution of each old name over the
            batch's images, softened by this; None leaves that direction alone. Between images and captions both
            directions are always kept, and None is `temperature`.
    """

    protects = "encoder"
    records: tuple[str, ...] = (_SCORES,)

    def __init__(
        self,
        strength: Strength = 1.0,
        temperature: Factor = 2.0,
        heads: Literal["learn", "frozen"] = "learn",
        schedule: Literal["constant", "share"] = "constant",
        text_temperature: Factor | None = None,
    ) -> None:
        super().__init__()
        self.strength, self.temperature = strength, temperature
        self.heads, self.schedule, self.text_temperature = heads, schedule, text_temperature
        self.teacher = Teacher()
        self._groups: list[list[int]] = []  # columns of old classes that answer together

    def grow(self, learner: Core, task: Task) -> None:
        """Old heads learn on, unless they shall not; refuse what this objective has no use for."""
        if self.text_temperature is not None and not learner.objective.open_vocabulary:
            raise ValueError(
                f"text_temperature={self.text_temperature} has no effect without texts: use --objective zeroshot, or "
                "leave it out"
            )
        self._groups = _groups(learner)
        if isinstance(learner.objective, Retrieve):
            if self.heads == "frozen":
                raise ValueError("heads='frozen' has no effect where there are no heads: leave it out")
            self.records = (_FEATURES, _CAPTIONS)
        if self.strength and self._groups and self.heads == "learn":
            learner.objective.requires_grad_(True)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Take the learner as teacher; there is nothing to keep in the first task."""
        self.check(learner, task)
        if self.strength and self._groups:
            self.teacher.remember(learner)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what nothing would come of."""
        if not self.strength or not self._groups:
            return
        if not trains_encoder(learner):
            raise ValueError(
                f"task {task.index}: lwf has no effect where no part trains the encoder any more: take one that does "
                "in every task, as in 'lora + lwf', or leave lwf out"
            )
        if self.heads == "frozen" and all(p.requires_grad for p in learner.objective.parameters()):
            raise ValueError(
                "heads='frozen' has no effect where no old head stands apart, or another part trains all: leave it out"
            )

    def record(self, learner: Core, batch: Batch) -> Batch:
        """The teacher's scores (B, seen classes); of images with captions its embeddings of both."""
        if not self.teacher.kept or not learner.training:
            return {}
        if isinstance(learner.objective, Retrieve):
            return dict(zip(self.records, self.teacher.pairs(learner, batch), strict=True))
        return {_SCORES: self.teacher(learner, batch)[1]}

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · T² · KL of the teacher's and the student's distribution over old classes."""
        if not self.teacher.kept:
            return 0.0
        every = sorted({column for old in self._groups for column in old})
        share = len(every) / len(learner.objective.classes) if self.schedule == "share" else 1.0
        if isinstance(learner.objective, Retrieve):
            return self.strength * share * self._retrieved(learner, learner.objective, batch, features)
        wanted = batch[_SCORES] if _SCORES in batch else self.teacher(learner, batch)[1]
        given = learner.objective.scores(features)
        terms = [distillation(wanted[:, old], given[:, old], self.temperature) for old in self._groups]
        if self.text_temperature is not None:
            terms.append(distillation(wanted[:, every].T, given[:, every].T, self.text_temperature))
        return self.strength * share * torch.stack(terms).sum()

    def _retrieved(self, learner: Core, objective: Retrieve, batch: Batch, features: Tensor) -> Tensor:
        """Each image's distribution over the batch's captions, and each caption's over its images."""
        rows, places = objective.chosen(batch)
        images, captions = (
            (batch[_FEATURES], batch[_CAPTIONS]) if _FEATURES in batch else self.teacher.pairs(learner, batch)
        )
        wanted = objective.similarity(images, captions[rows, places])
        given = objective.similarity(features, objective.shown(batch)[0])
        over_texts = distillation(wanted, given, self.temperature)
        return over_texts + distillation(wanted.T, given.T, self.text_temperature or self.temperature)

    def end_task(self, learner: Core, task: Task) -> None:
        """Let the teacher go."""
        self.teacher.forget()


def _groups(learner: Core) -> list[list[int]]:
    """Columns of former tasks' classes: those of each task apart where the task is told, else all together."""
    columns = {c: column for column, c in enumerate(learner.objective.classes)}
    former = {tuple(sorted(columns[c] for c in task.classes)) for task in learner.tasks[:-1]}
    if learner.scenario != "task" and former:
        former = {tuple(sorted({column for each in former for column in each}))}
    return [list(each) for each in sorted(former)]
