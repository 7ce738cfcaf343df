"""Expert distillation: a specialist learns each task by itself, then one learner of constant size takes over.

Deep Model Consolidation (Zhang et al., WACV 2020, arXiv:1903.07864): a model of the new classes and the former model
become one by double distillation on unlabelled images; an expert of the new task beside the former model is also Hou et
al.'s (ECCV 2018, "Lifelong learning via progressive distillation and retrospection"). `begin_task` trains the
specialist and asks both teachers, `penalty` is DMC's equation 3, or its softened form.

Differs: no second network; the specialist is what the task trains, trained plainly from where the learner stands, then
put back. Labels of the new task count beside the teachers. DMC has unlabelled images only (`reference`); without one
the task's own are used, with `replay` in the sum old ones too. `kl` softens as Hinton et al. (2015, arXiv:1503.02531).
Answers in words have one vocabulary in place of classes of each teacher's own: both are asked for every token (ours).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core, derived_seed
from perdure.core.shared_copy import Constant
from perdure.mechanisms.distillation import (
    EXPERTS,
    EXPERTS_OF,
    Distillation,
    Teacher,
    distillation,
    held_to,
    specialised,
)
from perdure.mechanisms.references import read_references
from perdure.options.ranges import BatchSize, Count, Epochs, Factor, Rate, Strength, without_effect
from perdure.streams import build_stream
from perdure.types import Batch, Task

_SIZE = 2000
_EPOCHS = 3
_LR = 1e-3
_BATCH = 32


class ExpertDistillation(Distillation, name="expert_distillation"):
    """Keeps scores near a specialist's for the new classes, and near the former learner's for the old ones.

    Of answers in words the 64 likeliest tokens of both are kept at each place, the rest counting as one.

    Where a training set brings what finished specialists say of each image, as `perdure combine --distil` does, these
    are the teachers, also in the first task.

    Args:
        strength: weight of the distillation; 0 is plain training.
        temperature: T of both distributions; None is 2.
        form: `kl` of softened distributions, or `logits`: squared differences to the teachers' scores less their mean,
            as in DMC, so that old and new classes stand on one level.
        epochs: passes in which the specialist learns its task.
        lr: its learning rate (Adam).
        batch_size: its images a step.
        reference: a stream whose training images, without labels, are distilled on in place of those that are learnt.
        size: how many of them are taken; None is 2000.
    """

    needs = ("classes", "conversations")
    derived = ("_material",)

    def __init__(
        self,
        strength: Strength = 1.0,
        temperature: Factor | None = None,
        form: Literal["kl", "logits"] = "kl",
        epochs: Epochs = _EPOCHS,
        lr: Rate = _LR,
        batch_size: BatchSize = _BATCH,
        reference: str | None = None,
        size: Count | None = None,
    ) -> None:
        super().__init__(("scores",))
        if form == "logits":
            without_effect("with form='logits'", temperature=temperature)
        if reference is None:
            without_effect("without a reference", size=size)
        if not strength:
            plain = {"form": "kl", "epochs": _EPOCHS, "lr": _LR, "batch_size": _BATCH}
            given = {"form": form, "epochs": epochs, "lr": lr, "batch_size": batch_size}
            changed = {name: None if value == plain[name] else value for name, value in given.items()}
            without_effect("with strength=0", temperature=temperature, reference=reference, **changed)
        self.strength, self.temperature, self.form = strength, temperature or 2.0, form
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size
        self.reference, self.size = reference, size or _SIZE
        self.expert = Teacher("expert_distillation/expert", ("scores",))
        self.said = BufferDict()  # teacher -> scores (n, classes) of the reference, while the task lasts
        self._material: Constant[tuple[list[Task], Tensor]] = Constant()  # in a list: it is no part of any state

    def grow(self, learner: Core, task: Task) -> None:
        """Old heads learn on; of words no logits can stand on one level, and images alone have no answers."""
        if "conversations" in learner.objective.asks:
            if self.form == "logits" or self.reference is not None:
                raise ValueError("expert_distillation of answers in words: leave out form and reference")
            self.ask_for(())
            self.expert.outputs = ()
        if self.strength and task.index:
            learner.objective.requires_grad_(True)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Train the specialist, take what it became and the learner as teachers, and put the learner back."""
        super().begin_task(learner, task)
        if not self.holds(task):
            return
        with specialised(learner, task, self.epochs, self.lr, self.batch_size):
            self.expert.snapshot(learner)
        if self.reference is not None:
            tasks, places = self._read(learner)
            for rows in torch.split(places, 256):
                batch = {"image": read_references(tasks, rows)["image"].to(learner.device)}
                for name, teacher in (("new", self.expert), ("old", self.teacher)):
                    self.said.append(name, teacher.ask(learner, batch)["scores"])

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What both teachers say of each example that is learnt."""
        if self.reference is not None:
            return {}
        if "conversations" in learner.objective.asks:
            mine = [each.precompute_tokens(learner, batch, None, self.temperature) for each in self._teachers]
            return mine[0] | mine[1]
        return super().precompute(learner, batch) | self.expert.precompute(learner, batch)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · what parts the learner from the specialist on new classes, and from the former one on old ones."""
        objective = learner.objective
        if EXPERTS in batch:
            given, owners = objective.scores(features), batch[EXPERTS_OF][0]
            groups = [(owners == each).nonzero().flatten() for each in torch.unique(owners).tolist()]
            return self.strength * self._apart([(batch[EXPERTS][:, own], given[:, own]) for own in groups])
        if not self.expert.weights:
            return 0.0
        if "conversations" in objective.asks:
            scores = objective.distributions(features, batch)[0]
            said = [each.tokens(learner, batch, None, self.temperature) for each in self._teachers]
            return self.strength * torch.stack([held_to(each, scores, self.temperature) for each in said]).sum()
        if self.reference is None:
            new, old = self.expert(learner, batch)["scores"], self.teacher(learner, batch)["scores"]
            given = objective.scores(features)
        else:
            tasks, places = self._read(learner)
            generator = learner.generator("expert_distillation", learner.step)
            rows = torch.randperm(len(places), generator=generator)[: len(batch["label"])]
            new, old = (self.said[name][rows.to(learner.device)] for name in ("new", "old"))
            shown = {"image": read_references(tasks, places[rows])["image"].to(learner.device)}
            given = objective.scores(learner.encode(shown))
        own = list(objective.task_columns)
        held = [(old[:, list(each)], given[:, list(each)]) for each in objective.former]
        return self.strength * self._apart([(new[:, own], given[:, own]), *held])

    def end_task(self, learner: Core, task: Task) -> None:
        """Let both teachers go."""
        super().end_task(learner, task)
        self.expert.clear()
        self.said.clear()

    @property
    def _teachers(self) -> tuple[Teacher, Teacher]:
        return self.expert, self.teacher

    def _apart(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """How far what teachers say and what is given (n, k) are apart, a pair a teacher."""
        if self.form == "kl":
            return torch.stack([distillation(wanted, given, self.temperature) for wanted, given in pairs]).sum()
        ways = [given - (wanted - wanted.mean(1, keepdim=True)) for wanted, given in pairs]
        return torch.cat(ways, dim=1).square().mean()

    def _read(self, learner: Core) -> tuple[list[Task], Tensor]:
        """The tasks of the reference, and the places (n, 2) of the images that are taken."""
        if not self._material:
            assert self.reference is not None
            tasks = list(build_stream(self.reference, learner.backbone.preprocess, 0, False))
            places = torch.tensor([(t.index, i) for t in tasks for i in range(len(t.train))], dtype=torch.int64)
            if not len(places):
                raise ValueError(f"reference={self.reference!r} has no training images: give another")
            generator = torch.Generator().manual_seed(derived_seed(learner.seed, 0, "expert reference"))
            self._material.append((tasks, places[torch.randperm(len(places), generator=generator)[: self.size]]))
        return self._material[0]
