"""What may be computed once: the only file that decides it.

Features replace images where nothing that makes them is trained or adapted; else the output of the vision blocks below
the lowest adapted one is kept, up to a gigabyte; and beside either what a method or the objective wants to know of
each example (`precompute`). For a task's training set that holds while the task lasts, and only while no augmentation
changes images in every step; of a test set what is kept for good is what never changes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from perdure.core.method import Method, parts_of
from perdure.core.objective import Objective
from perdure.streams.augment import AUGMENTS
from perdure.types import AnyLearner, Batch, Data, Encoded, Told, Union, join

FEATURES, LOWER_BLOCKS = "features", "lower_blocks"
READ = frozenset({"image", "label", "pair", "text", "conversation", "tokens", "task"})
"""What stands in a batch as it was read, by streams and by `Backbone.prepare`; all else was computed."""
_MOST_KEPT = 2**30  # bytes of the lower blocks' output kept for one task


class Cache:
    """What `learner` has computed once, and may.

    A view, made anew for every question: what is kept stands in the learner's own `kept`, so a copy has its own.
    """

    def __init__(self, learner: AnyLearner) -> None:
        self.learner = learner

    def of(self, data: Data, passes: int = 1) -> Data:
        """The task's training `data` with all that `passes` passes over it need compute only once, if anything."""
        learner = self.learner
        if learner.augment is not AUGMENTS["none"] or not learner.trainable() or not len(data):
            return data
        if learner.constant_encoder:
            (data,) = self.features([data])
        return self.precomputed(self.lower_blocks(data)) if passes > 1 else data

    def test(self, data: Data) -> Data:
        """A test set with what never changes, remembered (4 · dim bytes an image): it is asked for after each task."""
        if isinstance(data, Told):
            return Told(self.test(data.data), data.index)
        if not len(data) or (isinstance(data, Encoded) and data.images is None):
            return data
        kept = self.learner.kept
        if id(data) not in kept:
            constant = self.learner.constant_encoder
            kept[id(data)] = data, self.features([data])[0] if constant else self.precomputed(data)
        known: Data = kept[id(data)][1]
        return known

    def tests(self, sets: Sequence[Data], moved: bool) -> list[Data]:
        """Test sets with features as they are now, for all who ask after a task.

        In one pass of full batches where features `moved` since the last task. Where they stay, each set by itself and
        only when it is new: so that a resumed run, which has them to encode again, gets the same bits.
        """
        sets, still = [self.test(data) for data in sets], self.learner.still
        if self.learner.constant_encoder:
            return sets
        if moved:
            still.clear()
            return self.features(sets)
        for data in sets:
            if id(data) not in still:
                still[id(data)] = data, self.features([data])[0]
        return [still[id(data)][1] for data in sets]

    def features(self, sets: Sequence[Data]) -> list[Data]:
        """Each of `sets` with features as they are now in place of images, and with everything else.

        In one pass of full batches: small sets alone cost as much as large ones. The sets themselves where an example
        is many rows.
        """
        learner = self.learner
        if not sets or not learner.objective.one_row:
            return list(sets)

        def kept(batch: Batch) -> Batch:
            found = {FEATURES: learner.encode(batch)} | learner.objective.precompute(learner, batch) | batch
            return {name: found[name] for name in found.keys() - {"image", "label"}}

        with learner.inference():
            found = join(learner.each_batch(Union(sets), kept))
        # tensors made under inference_mode may not take part in training
        found = {name: _cloned(value) for name, value in found.items()}
        whole = Encoded(found, torch.cat([data.labels for data in sets]).to(learner.device))
        return [whole.part(end - len(data), end) for data, end in zip(sets, accumulate(map(len, sets)), strict=True)]

    def lower_blocks(self, data: Data) -> Data:
        """`data` with what the constant blocks at the bottom make of each image.

        `data` itself when there are none, or when their output would take more than a gigabyte.
        """
        learner = self.learner
        entry = learner.constant_blocks
        if not entry or learner.constant_encoder or not len(data):
            return data
        with torch.no_grad(), learner.computing():
            below = partial(learner.backbone.before, entry)
            first = below(next(learner.batches(data, 1)))
            if first.nbytes * len(data) > _MOST_KEPT:
                return data
            pieces = [learner.shared_out(batch, below) for batch in learner.batches(data, 256)]
        return Encoded({LOWER_BLOCKS: torch.cat(pieces)}, data.labels, data)

    def precomputed(self, data: Data) -> Data:
        """`data` with what method and objective want to know of each example; `data` itself when that is nothing."""
        learner = self.learner
        if all(type(each).precompute in (Method.precompute, Objective.precompute) for each in self._asking()):
            return data  # and no image was read to find that out
        found: list[Batch] = []
        with torch.no_grad():
            for batch in learner.batches(data, 256):
                found.append(self._facts(batch) | learner.objective.precompute(learner, batch))
                if not found[0]:
                    return data
        return Encoded(join(found), data.labels, data)

    def complete(self, batch: Batch, like: Batch | None = None) -> Batch:
        """`batch` with what the method wants to know of it; or with all that the batch `like` holds, and no more."""
        learner = self.learner
        with torch.no_grad():
            if like is None:
                return batch | self._facts(batch)
            if FEATURES in like:
                batch = batch | {FEATURES: learner.encode(batch)}
            if LOWER_BLOCKS in like.keys() - batch.keys():
                below = partial(learner.backbone.before, learner.constant_blocks)
                batch = batch | {LOWER_BLOCKS: learner.shared_out(batch, below)}
            if not like.keys() <= batch.keys():
                batch = batch | self._facts(batch)
            if not like.keys() <= batch.keys():
                batch = batch | learner.objective.precompute(learner, batch)
        return {name: batch[name] for name in like}

    def _asking(self) -> Iterator[Method | Objective]:
        yield self.learner.objective
        yield from parts_of(self.learner.method)

    def _facts(self, batch: Batch) -> Batch:
        found: Batch = {}
        for part in parts_of(self.learner.method):
            found |= part.precompute(self.learner, batch)
        return found


def _cloned(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_cloned, value))
    return value.clone() if isinstance(value, Tensor) else value
