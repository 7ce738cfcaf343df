"""What a task's training is asked to do, as plain values: apart from the loop, so that asking waits for no torch."""

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "eager", "sdpa"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How each task is trained."""

    epochs: int = 5
    """Passes over each task's training set."""
    batch_size: int = 64
    """New examples per step."""
    lr: float = 1e-3
    """Learning rate at the start of each task."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Made anew for every task; sgd has momentum 0.9."""
    weight_decay: float = 0.0
    """Of the optimizer; above 0 it also shrinks what old tasks learnt and share."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over a task's steps."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            words = get_args(hint) if get_origin(hint) is Literal else ()
            if words and (value := getattr(self, name)) not in words:
                near = difflib.get_close_matches(str(value), words, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}={value!r}: expected {' or '.join(words)}{meant}")
        for name, least in (("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {least} or more")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr}: expected a positive number, such as 1e-3")
