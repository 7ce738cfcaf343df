"""What may be computed once: the only file that decides it.

Features replace images where nothing that makes them is trained or adapted; else the output of the vision blocks below
the lowest adapted one is kept, up to a gigabyte; of a language model whose vision tower and projector are neither, what
these make of each conversation's images (`backbones.image_features`); and beside any of them what a method or the
objective wants to know of each example (`precompute`). For a task's training set that holds while the task lasts, and
only while no augmentation changes images in every step; of a test set what is kept for good is what never changes.

A learner's `store` keeps the same on disk, for other runs and for what does not fit into memory. What stands there was
computed together with what it is computed with otherwise, so it changes no bit of a result.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from perdure.backbones import image_features
from perdure.backbones.dialogue import Tokens
from perdure.backbones.language import Language
from perdure.core.cached_data import InPieces, Seen, blind
from perdure.core.feature_store import key_of
from perdure.core.method import Method, parts_of
from perdure.core.objective import Objective
from perdure.streams.augment import AUGMENTS
from perdure.types import AnyLearner, Batch, Data, Encoded, Told, Union, join

FEATURES, LOWER_BLOCKS = "features", "lower_blocks"
READ = frozenset({"image", "label", "pair", "text", "conversation", "tokens", "task"})
"""What stands in a batch as it was read, by streams and by `Backbone.prepare`; all else was computed."""
_MOST_KEPT = 2**30
"""Bytes in memory of lower blocks, and of what is seen, for one task; and of the latter for all test sets together."""
_TOGETHER, _ASKED = 256, 64
"""Images that are encoded, and conversations that are read, at once."""


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
        if passes == 1 and learner.store is None:
            return data
        return self.precomputed(self.lower_blocks(self.seen(data)))

    def test(self, data: Data) -> Data:
        """A test set with what never changes, remembered (4 · dim bytes an image): it is asked for after each task."""
        if isinstance(data, Told):
            return Told(self.test(data.data), data.index)
        if not len(data) or (isinstance(data, Encoded) and data.images is None):
            return data
        kept = self.learner.kept
        if id(data) not in kept:
            constant = self.learner.constant_encoder and self.learner.objective.one_row
            room = _MOST_KEPT - sum(each.nbytes for _, each in kept.values() if isinstance(each, Seen))
            kept[id(data)] = data, self.features([data])[0] if constant else self.precomputed(self.seen(data, room))
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
            constant = learner.constant_encoder
            features = self._stored(FEATURES, batch, learner.encode) if constant else learner.encode(batch)
            found = {FEATURES: features.to(learner.device)} | learner.objective.precompute(learner, batch) | batch
            return {name: found[name] for name in found.keys() - {"image", "label"}}

        with learner.inference():
            found = join(learner.each_batch(Union(sets), kept))
        # tensors made under inference_mode may not take part in training
        found = {name: _cloned(value) for name, value in found.items()}
        whole = Encoded(found, torch.cat([data.labels for data in sets]).to(learner.device))
        return [whole.part(end - len(data), end) for data, end in zip(sets, accumulate(map(len, sets)), strict=True)]

    def lower_blocks(self, data: Data) -> Data:
        """`data` with what the constant blocks at the bottom make of each image.

        `data` itself when there are none, or when their output would take more than a gigabyte and than a store.
        """
        learner = self.learner
        entry = learner.constant_blocks
        if not entry or learner.constant_encoder or not len(data):
            return data
        with torch.no_grad(), learner.computing():
            below = partial(learner.backbone.before, entry)
            size = below(next(learner.batches(data, 1))).nbytes * len(data)
            if size > max(_MOST_KEPT, learner.store.most if learner.store else 0):
                return data
            pieces = [
                self._stored(f"{LOWER_BLOCKS} {entry}", batch, lambda batch: learner.shared_out(batch, below))
                for batch in learner.batches(data, _TOGETHER)
            ]
        if size > _MOST_KEPT:
            return InPieces(LOWER_BLOCKS, pieces, data)
        return Encoded({LOWER_BLOCKS: torch.cat(pieces).to(learner.device)}, data.labels, data)

    def seen(self, data: Data, room: int | None = None) -> Data:
        """Conversations with their tokens, and with what a constant vision tower and projector see of their images.

        `data` itself where it would take more than `room` bytes of memory, a gigabyte when None; what is seen takes
        none where there is a store.
        """
        learner, backbone, store = self.learner, self.learner.backbone, self.learner.store
        if not isinstance(backbone, Language) or not len(data):
            return data
        room = _MOST_KEPT if room is None else room
        found: list[Batch] = []
        keys: list[str] = []
        known: dict[str, Tensor] = {}  # in memory, by what is shown: several questions may be about the same images
        sizes: dict[str, int] = {}
        with torch.no_grad(), learner.computing():
            constant = learner.constant_sight and backbone.sees_once()
            for batch in learner.batches(data, _ASKED):
                tokens: list[Tokens] = batch.get("tokens", [])
                if not tokens or any(each.seen is not None for each in tokens):  # known already
                    return data
                own = [
                    self._key("seen", *image_features.pixels(each))
                    if constant and image_features.has_images(each)
                    else ""
                    for each in tokens
                ]
                for key, each in zip(own, tokens, strict=True):
                    if key and key not in sizes:
                        value = self._kept(key, partial(self._sight, each))
                        sizes[key] = value.nbytes
                        known |= {} if store else {key: value}
                bare = [image_features.instead(each, None) for each in tokens] if constant else tokens
                kept = {"tokens": bare, "conversation": list(map(blind, batch["conversation"]))}
                found.append({name: value for name, value in batch.items() if name != "label"} | kept)
                keys += own
                room -= sum(each.nbytes for each in bare)
                taken = sum(sizes.values())
                if (room < 0 or taken > store.most) if store else taken > room:
                    return data

        def again(position: int) -> Tokens:
            whole: list[Tokens] = backbone.prepare(data.__getitems__([position]))["tokens"]
            return whole[0]

        return Seen(join(found), data.labels, keys, known, store, again)

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

    def _sight(self, example: Tokens) -> Tensor:
        found: Tensor | None = self.learner.backbone.see(example).seen
        assert found is not None  # it shows something
        return found

    def _stored(self, kind: str, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """What `compute` makes of the images of `batch`, of which nothing else may depend; see `_kept`."""
        if "image" not in batch or self.learner.store is None:
            return compute(batch)
        return self._kept(self._key(kind, batch["image"]), lambda: compute(batch), len(batch["image"]))

    def _kept(self, key: str, compute: Callable[[], Tensor], rows: int | None = None) -> Tensor:
        """What the store has under `key`, else what `compute` gives, which it has from now on."""
        store = self.learner.store
        found = store.get(key, rows) if store else None
        if found is None:
            found = compute()
            if store:
                store.put(key, found)
        return found

    def _key(self, kind: str, *shown: str | Tensor) -> str:
        """What stands for all that something is computed of, `shown` last."""
        learner = self.learner
        made = (learner.fingerprint, learner.backbone.spec, str(next(learner.backbone.parameters()).dtype))
        return key_of(kind, *made, learner.store.facts if learner.store else "", *shown)

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
