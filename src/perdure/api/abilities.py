"""What a learner can be asked for, and how it presents itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.training.config import RunConfig
from perdure.types import Data


class Abilities(Core):
    """A core that refuses what it cannot do, in one line."""

    config: RunConfig

    @property
    def known(self) -> dict[str, int]:
        """Name -> id of all classes learnt so far; of captions and conversations, of all tasks."""
        tasks = self.tasks  # once: a lesson in another thread may end here
        return {name: c for task in tasks for name, c in zip(task.names, task.classes, strict=True)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes learnt so far, in the order of the columns of `predict_proba`."""
        return tuple(self.objective.names)

    def __repr__(self) -> str:
        """One line, where a module would show its hundred layers."""
        tasks = f"{self.learnt} task{'' if self.learnt == 1 else 's'}"
        if "classes" in self.objective.asks:
            tasks += f", {len({c for task in self.tasks[: self.learnt] for c in task.classes})} classes"
        return f"{type(self).__name__}({self.config.backbone}, {self.config.method}; {tasks})"

    def __dir__(self) -> list[str]:
        """What is its own: a module has sixty names more, which stay in reach."""
        own = {name for kind in type(self).__mro__ if issubclass(kind, Core) for name in vars(kind)}
        return sorted(name for name in own | {"backbone", "method", "objective"} if name not in _OF_MODULES)

    def check_speaks(self) -> None:
        """Raise a ValueError unless it answers in words."""
        if "conversations" not in self.objective.asks:
            asks = " and ".join(self.objective.asks)
            raise ValueError(
                f"this learner learns {asks} and does not answer in words: use predict or search, or make one with "
                "mllm(path=...) and generate()"
            )

    def check_sees(self, call: str) -> None:
        """Raise a ValueError where `call` is none of what it can be asked, for it answers in words."""
        if "conversations" in self.objective.asks:
            raise ValueError(
                f"this learner answers in words, which {call} does not give: use ask, as "
                "'perdure ask LEARNER cat.jpg \"What is this?\"'"
            )

    def check_calibrated(self, classes: Sequence[str] | None) -> None:
        """Raise a ValueError unless its scores of what was learnt can be calibrated."""
        if classes is not None:
            raise ValueError(
                "calibrated scores are those of what was learnt, and say nothing of other names: leave out calibrated "
                "(--calibrated), or classes (--classes)"
            )
        if not self.temperature:
            raise ValueError(
                "this learner has no temperature, for no images were set apart when it learnt: teach a new one with "
                "calibrate=0.1 (--calibrate 0.1)"
            )

    def check_learnt(self) -> None:
        """Raise a ValueError before the first task."""
        if not self.learnt:
            raise ValueError("this learner has learnt nothing yet: call learn(images, labels) first")

    def towards(self, data: Data, texts: Tensor, size: int) -> Tensor:
        """Cosines (n, m) of images to unit-length embeddings of texts (m, dim)."""
        features = torch.cat([self.encode(batch) for batch in self.batches(data, size)])
        if features.shape[1] != texts.shape[1]:
            raise ValueError(
                f"the {features.shape[1]} features of {self.method.spec!r} are not in the space of the "
                f"{texts.shape[1]}-dimensional texts: this learner cannot be asked by text"
            )
        return F.normalize(features, dim=1) @ texts.T


_OF_MODULES = {name for name in vars(nn.Module) if not name.startswith("__")}
