"""Feature drift: how far the encoder's answers to old test images have moved since their task was learnt.

It is evidence for whoever reads the results, no method's memory: the features that are compared with stand beside the
checkpoint of their task, outside of what the learner stores.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.core import checkpoint
from perdure.core.checkpoint import Checkpoint
from perdure.core.learner import Core, derived_seed
from perdure.types import Data, Row, Task

FEATURE_DRIFT = "feature_drift"
FEATURES = "features.safetensors"
# Test images of a task, an eighth of them: what is kept beside a checkpoint stays small.
_LEAST, _MOST = 32, 128


class Drift:
    """Features of some of each task's test images as they were right after it was learnt.

    An eighth of the images, but at least 32 and at most 128, the same ones every time.

    Args:
        done: the checkpoints of the tasks already learnt; those of learners that were not evaluated hold no features.

    Raises:
        DamagedCheckpoint: when features are cut, changed or missing.
    """

    def __init__(self, done: Sequence[Checkpoint]) -> None:
        kept = {each.learnt - 1: checkpoint.beside(each, FEATURES) for each in done}
        self._then = {index: tensors for index, tensors in kept.items() if tensors}

    def measure(self, learner: Core, task: Task, tests: Sequence[Task]) -> list[Row]:
        """Mean of ‖f_now(x) - f_then(x)‖ / ‖f_then(x)‖ on each task before `task`; notes the features of `task`.

        Args:
            learner: who has learnt `task`.
            task: the last one.
            tests: `task` and those before it that have test images, with features in place of these.

        A task without features of its time to compare with has no row, nor has one whose examples are several rows.
        """
        if not learner.objective.one_row:
            return []
        rows, constant = [], learner.constant_encoder
        for each in tests:
            then = self._then.get(each.index)
            if each.index == task.index:
                if not constant:
                    self._then[each.index] = _features(learner, each)
            elif then is not None:
                now = _features(learner, each)
                if _same_images(now, then):
                    rows.append(
                        Row(task.index, each.index, FEATURE_DRIFT, _distance(now["features"], then["features"]))
                    )
            elif constant:  # and was it then, or something would have been noted
                rows.append(Row(task.index, each.index, FEATURE_DRIFT, 0.0))
        return rows

    def files(self, task: Task) -> dict[str, dict[str, Tensor]]:
        """What to keep beside the checkpoint of `task`: see `checkpoint.save_task`."""
        return {FEATURES: self._then[task.index]} if task.index in self._then else {}


def final(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean drift of all tasks but the last, after the last; None when one was not measured."""
    old = matrix[-1][:-1] if matrix else []
    known = [value for value in old if value is not None]
    return statistics.fmean(known) if known and len(known) == len(old) else None


def _features(learner: Core, task: Task) -> dict[str, Tensor]:
    """Features (n, dim) in float32 and labels (n,) of the task's chosen test images."""
    chosen = _chosen(learner, task.index, task.test)
    batch = task.test.__getitems__(chosen.tolist())
    return {"features": batch["features"].cpu(), "labels": batch["label"].cpu()}


def _chosen(learner: Core, index: int, data: Data) -> Tensor:
    count = min(max(len(data) // 8, _LEAST), _MOST)
    if len(data) <= count:
        return torch.arange(len(data))
    generator = torch.Generator().manual_seed(derived_seed(learner.seed, index, "drift"))
    return torch.randperm(len(data), generator=generator)[:count].sort().values


def _same_images(now: dict[str, Tensor], then: dict[str, Tensor]) -> bool:
    """A folder may have lost test images since; a method may have made its features wider."""
    return now["features"].shape == then["features"].shape and torch.equal(now["labels"].cpu(), then["labels"].cpu())


def _distance(now: Tensor, then: Tensor) -> float:
    length = then.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((now - then).norm(dim=1) / length).mean())
