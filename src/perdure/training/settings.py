"""What a task's training is asked to do, as plain values: apart from the loop, so that asking waits for no torch."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from perdure.options.ranges import BatchSize, Epochs, Factor, Range, Rate, check_fields, without_effect

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "eager", "sdpa"]
_DECAY = 0.1
_BRACKETS = str.maketrans("", "", "()[] ")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How each task is trained."""

    epochs: Epochs = 5
    """Passes over each task's training set."""
    batch_size: BatchSize = 64
    """New examples per step."""
    lr: Rate = 1e-3
    """Learning rate at the start of each task."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Made anew for every task; sgd has momentum 0.9."""
    weight_decay: Annotated[float, Range(0, 1e4)] = 0.0
    """Of the optimizer; above 0 it also shrinks what old tasks learnt and share."""
    schedule: Literal["cosine", "cosine-epoch", "step", "constant"] = "cosine"
    """Learning rate in a task: half a cosine, a step at a time; a quarter, an epoch at a time; a fall at milestones."""
    milestones: str = ""
    """With step: the epochs after which the rate is multiplied by decay, as 4,6,8."""
    decay: Factor | None = None
    """With step: by how much at each of the milestones; 0.1 unless given."""

    def __post_init__(self) -> None:
        # a list or tuple of numbers too, as Python's users write it
        object.__setattr__(self, "milestones", str(self.milestones).translate(_BRACKETS).rstrip(","))
        check_fields(self)
        if self.schedule != "step":
            why = f"with schedule={self.schedule!r}, but with 'step'"
            without_effect(why, milestones=self.milestones or None, decay=self.decay)
            if self.schedule == "cosine-epoch" and self.epochs == 1:
                raise ValueError("schedule='cosine-epoch' has no effect in 1 epoch: give more, or 'cosine'")
            return
        if not self._milestones() or sorted({0, *self._milestones()}) != [0, *self._milestones()]:
            raise ValueError(f"milestones={self.milestones!r}: expected numbers of epochs, rising, such as 4,6,8")
        if self._milestones()[-1] >= self.epochs:
            raise ValueError(
                f"milestones={self.milestones!r}: the last has no effect within epochs={self.epochs}: leave it out, or "
                "give more epochs"
            )
        if self.decay == 1:
            raise ValueError(f"decay={self.decay}: expected a factor other than 1, such as 0.1")

    def _milestones(self) -> list[int]:
        words = self.milestones.split(",")
        return [int(word) for word in words] if all(word.isascii() and word.isdecimal() for word in words) else []

    def but(self, **changes: Any) -> Self:
        """The same with changes; another schedule leaves the milestones of this one behind."""
        if changes.get("schedule", self.schedule) != self.schedule:
            changes = {"milestones": "", "decay": None} | changes
        return replace(self, **changes)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a task's step number `step` (from 0) of `steps`."""
        epoch = step * self.epochs // steps
        if self.schedule == "cosine":
            return self.lr * (0.5 * (1 + math.cos(math.pi * (step / steps))))
        if self.schedule == "cosine-epoch":
            return self.lr * math.cos(99 * math.pi * epoch / (200 * (self.epochs - 1)))
        fallen = sum(epoch >= milestone for milestone in self._milestones()) if self.schedule == "step" else 0
        return self.lr * (_DECAY if self.decay is None else self.decay) ** fallen
