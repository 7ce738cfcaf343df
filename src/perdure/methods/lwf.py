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
from perdure.mechanisms.distillation import Distillation, distillation, held_to
from perdure.options.ranges import Count, Factor, Strength, without_effect
from perdure.types import Batch, Task


class LwF(Distillation, name="lwf"):
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
        top: of answers in words, how many of the likeliest tokens are held at each place, the rest counting as one:
            what the teacher says is kept for a whole training set, and is not a vocabulary for each token. None is 64.
    """

    def __init__(
        self,
        strength: Strength = 1.0,
        temperature: Factor = 2.0,
        heads: Literal["learn", "frozen"] = "learn",
        schedule: Literal["constant", "share"] = "constant",
        text_temperature: Factor | None = None,
        top: Count | None = None,
    ) -> None:
        super().__init__()
        self.top = top
        self.strength, self.temperature = strength, temperature
        self.heads, self.schedule, self.text_temperature = heads, schedule, text_temperature

    def grow(self, learner: Core, task: Task) -> None:
        """Old heads learn on, unless they shall not; refuse what this objective has no use for."""
        objective = learner.objective
        if self.text_temperature is not None and "text" not in objective.towers:
            raise ValueError(
                f"text_temperature={self.text_temperature} has no effect without texts: use --objective zeroshot, or "
                "leave it out"
            )
        if self.heads == "frozen" and "classes" not in objective.asks:
            raise ValueError("heads='frozen' has no effect where there are no heads: leave it out")
        if "conversations" not in objective.asks:
            without_effect("where answers are no tokens", top=self.top)
        self.ask_for(objective.outputs)
        if self.holds(task) and self.heads == "learn":
            objective.requires_grad_(True)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what nothing would come of."""
        super().check(learner, task)
        if self.holds(task) and self.heads == "frozen" and all(p.requires_grad for p in learner.objective.parameters()):
            raise ValueError(
                "heads='frozen' has no effect where no old head stands apart, or another part trains all: leave it out"
            )

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the teacher says of each example; of answers in words their likeliest tokens."""
        if "conversations" not in learner.objective.asks:
            return super().precompute(learner, batch)
        return self.teacher.precompute_tokens(learner, batch, self.top, self.temperature)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · T² · KL of the teacher's and the student's distribution over old classes."""
        if not self.teacher.weights:
            return 0.0
        objective = learner.objective
        if "conversations" in objective.asks:
            said = self.teacher.tokens(learner, batch, self.top, self.temperature)
            return self.strength * held_to(said, objective.distributions(features, batch)[0], self.temperature)
        old = self.teacher.distributions(learner, batch, old=True)
        new = objective.distributions(features, batch, old=True)
        temperatures: list[float | None] = [self.temperature] * len(new)
        if "text" in objective.towers:
            always = self.temperature if "captions" in objective.asks else None
            temperatures[-1] = self.text_temperature or always
        held = zip(old, new, temperatures, strict=True)
        terms = [distillation(was, now, temperature) for was, now, temperature in held if temperature is not None]
        share = 1.0
        if self.schedule == "share":
            share = len({column for each in objective.former for column in each}) / len(objective.classes)
        return self.strength * share * torch.stack(terms).sum()
