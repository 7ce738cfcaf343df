"""Early stopping: a task ends once the loss on held-out training images falls no more.

What was learnt up to there stays: methods that add up what happens along a task (`si`, `derpp`) could not go back to
the weights of an earlier epoch alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from perdure.core.checkpoint import Checkpoint
from perdure.core.learner import Core
from perdure.core.method import parts_of
from perdure.streams import ImageSet
from perdure.training.config import EARLY_SHARE, TrainConfig
from perdure.types import Batch, Row

IMAGES = "held_out_images"
_LOSS = "held_out_loss"


def check_trains(learner: Core, config: TrainConfig) -> None:
    """Refuse to stop early what does not train, or counts what it trains on.

    Raises:
        ValueError: with the method's name.
    """
    if config.early_stop and not learner.trainable():
        raise ValueError(
            f"early_stop={config.early_stop} has no effect on {learner.method.spec or learner.method.name}, which "
            "trains nothing: leave it out"
        )
    for part in parts_of(learner.method):
        if config.early_stop and part.encodes_once:
            raise ValueError(
                f"early_stop={config.early_stop}: {part.spec or part.name} counts what is encoded in the steps of a "
                "task, and in which epoch; held-out images are none of it, and no epoch is known to be the last. Leave "
                "early_stop out"
            )


class EarlyStop:
    """Watches one task; see `TrainConfig.early_stop`.

    Args:
        learner: who learns.
        held: images that are not trained on.
        patience: epochs without a lower loss after which the task ends.
        rows: what was measured since the task before; rows of the epochs gone by are read there, and new ones added. A
            snapshot holds them, so that a run which goes on knows what it knew.
    """

    def __init__(self, learner: Core, held: ImageSet, patience: int, rows: list[Row] | None = None) -> None:
        self.learner, self.held, self.patience = learner, held, patience
        self.rows = [] if rows is None else rows
        self.index = learner.task.index
        self.losses = losses_of(self.rows, self.index)
        if not any(row.metric == IMAGES and row.after == self.index for row in self.rows):
            self.rows.append(Row(self.index, None, IMAGES, float(len(held))))

    def over(self) -> bool:
        """Whether the lowest loss lies `patience` epochs back."""
        best = min(range(len(self.losses)), key=self.losses.__getitem__, default=0)
        return len(self.losses) - 1 - best >= self.patience

    def epoch(self) -> bool:
        """An epoch ended: measure; returns `over()`."""
        learner = self.learner

        def loss(batch: Batch) -> Tensor:
            return learner.plain_loss(learner.cache.complete(batch)) * len(batch["label"])

        with learner.inference():
            if any(part.learns_aside for part in parts_of(learner.method)):
                learner.training = True  # of itself and of the method alone; `inference` puts it back
                learner.method.train()
            total = sum(float(each) for each in learner.each_batch(self.held, loss))
        value = total / len(self.held)
        self.losses.append(value if math.isfinite(value) else math.inf)
        if math.isfinite(value):  # what diverges is refused by name when the task ends
            self.rows.append(Row(self.index, None, f"{_LOSS}/{len(self.losses)}", value))
        return learner.processes.any(self.over())


def watching(
    learner: Core, held: ImageSet | None, config: TrainConfig, rows: list[Row] | None = None
) -> EarlyStop | None:
    """What watches a task of which `held` was set apart; None where nothing was."""
    return None if held is None else EarlyStop(learner, held, config.early_stop, rows)


def shares_of(done: Sequence[Checkpoint], share: float, tasks: int) -> list[float]:
    """Of each of so many tasks the share of training images that is held out.

    Of a task in `done` what was held out then, whatever is asked for now: memories refer to its other images by their
    position. Of the others, and where a version did not write it down, `share`.
    """
    found = [share] * tasks
    for each in done[:tasks]:  # a run's learner may have been taught more than its stream has
        held = any(row["metric"] == IMAGES for row in each.manifest.get("rows", ()))
        found[each.learnt - 1] = each.manifest.get("held_out_share", share) if held else 0.0
    return found


def losses_of(rows: Sequence[Row], task: int) -> list[float]:
    """Held-out loss after each epoch of the task with this index, as far as it was measured."""
    found = {
        int(row.metric.partition("/")[2]): row.value
        for row in rows
        if row.after == task and row.metric.startswith(f"{_LOSS}/")
    }
    return [found.get(epoch, math.inf) for epoch in range(1, max(found, default=0) + 1)]


def facts_of_stops(config: Mapping[str, Any], rows: Sequence[Row], tasks: int) -> dict[str, Any]:
    """What a summary says of early stopping; nothing where it was not asked for."""
    if not config.get("early_stop"):
        return {}
    losses = [losses_of(rows, task) for task in range(tasks)]
    images = {row.after: int(row.value) for row in rows if row.metric == IMAGES}
    share = config.get("early_stop_share")
    return {
        "early_stop": {
            "patience": config["early_stop"],
            "share": EARLY_SHARE if share is None else share,
            "images": [images.get(task) for task in range(tasks)],
            "epochs": [len(each) for each in losses],
            "losses": [[None if math.isinf(value) else value for value in each] for each in losses],
        }
    }
