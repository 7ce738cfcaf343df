"""What is learnt of images without labels: a step of pre-training is a task without classes of the same learner."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from perdure.core.method import METHODS, parts_of
from perdure.options.ranges import checked
from perdure.options.spec import build, parse_one
from perdure.types import AnyLearner, Batch, Task

PRETEXTS: dict[str, type[Pretext]] = {}
"""Every pretext by name; a class registers itself by `class Mine(Pretext, name="mine")`."""


class Pretext(nn.Module):
    """An objective of pre-training: a loss that reads no labels. It lasts as long as its task.

    What it trains besides the method, such as a decoder, is its own and is dropped when the task ends.
    """

    name: ClassVar[str]
    """As it is written."""
    towers: ClassVar[frozenset[str]] = frozenset({"vision"})
    """Whose output it reads."""
    captions: ClassVar[bool] = False
    """Whether it reads captions beside images."""

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name, PRETEXTS[name] = name, cls
            if "__init__" in vars(cls):
                cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def grow(self, learner: AnyLearner, task: Task) -> None:
        """Make what it trains; depends on the task's description only. Refuse what cannot be, in one line."""

    def begin_task(self, learner: AnyLearner) -> None:
        """Prepare, before the first step."""

    def loss(self, learner: AnyLearner, batch: Batch) -> Tensor:
        """The loss of `batch`, a scalar."""
        raise NotImplementedError


def make_pretext(text: str) -> Pretext:
    """A pretext from its spec: `masked(ratio=0.6)`.

    Raises:
        ValueError: for a name or an option that does not exist.
    """
    made: Pretext = build(parse_one(text), PRETEXTS, "pretext")
    return made


def begin_pretext(learner: AnyLearner, task: Task) -> Pretext:
    """The pretext of a `task` without labels that the learner has grown for; heads are frozen.

    Raises:
        ValueError: when the backbone reads conversations, a part of the method takes no part, or nothing that makes
            features is trained.
    """
    if "language" in learner.backbone.towers():
        raise ValueError(
            f"pre-training is for encoders of images, and {learner.backbone.spec} is a language model: teach it "
            "captions or questions with 'perdure learn'"
        )
    pretext = make_pretext(task.pretext)
    taught = any(not each.pretext for each in learner.tasks[:-1])
    for part in parts_of(learner.method):
        if not part.unlabelled:
            able = ", ".join(sorted(name for name, each in METHODS.items() if each.unlabelled == "any"))
            how = " with these options" if type(part).unlabelled else ""
            raise ValueError(
                f"{part.name}{how} takes no part in a step without labels: pre-train with parts that do ({able}), or "
                "leave pretrain out"
            )
        if part.unlabelled == "untaught" and taught:
            raise ValueError(
                f"{part.name} keeps statistics of the features of classes that were taught, which pre-training would "
                "make stale: pre-train before the first 'perdure learn', with a new learner"
            )
        if part.rehearses and pretext.captions:
            raise ValueError(
                f"{part.name} remembers images of classes, which have no captions for {pretext.name}: take masked(), "
                "or feature_distill in its place"
            )
    learner.objective.requires_grad_(False)
    if not learner.trainable():
        raise ValueError(
            f"pre-training would have no effect: {learner.method.spec!r} trains nothing that makes features (any "
            "more): take one that does in every task, such as lora or finetune"
        )
    pretext.grow(learner, task)
    return pretext
