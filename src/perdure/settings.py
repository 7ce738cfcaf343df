"""What a task's training is asked to do, as plain values: apart from the loop, so that asking waits for no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from perdure.ranges import BatchSize, Epochs, Range, Rate, check_fields

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "eager", "sdpa"]


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
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over a task's steps."""

    def __post_init__(self) -> None:
        check_fields(self)
