"""Data sets with what was computed of their examples where that is too much for one tensor, or stands in for images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perdure.backbones.dialogue import Tokens
from perdure.core.feature_store import FeatureStore
from perdure.streams.conversations import Conversation
from perdure.types import Batch, Data, take


class InPieces:
    """Data with a tensor of each example that lies in pieces, which may be mapped from files.

    Args:
        name: of the tensor in a batch.
        pieces: each (size, ...), the last one perhaps shorter.
        data: the examples, in the same order.
    """

    def __init__(self, name: str, pieces: Sequence[Tensor], data: Data) -> None:
        self.name, self.pieces, self.data, self.labels = name, pieces, data, data.labels

    def __deepcopy__(self, memo: dict[int, object]) -> "InPieces":
        return self  # it never changes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The examples, and under `name` (B, ...)."""
        size = len(self.pieces[0])
        rows = torch.stack([self.pieces[i // size][i % size] for i in torch.as_tensor(positions).tolist()])
        return {self.name: rows} | self.data.__getitems__(positions)


class Seen:
    """Conversations with their tokens and what is seen of their images; neither is decoded or tokenised again.

    Args:
        kept: a batch of all examples; its `tokens` hold no images of which it is known what is seen.
        labels: (n,).
        keys: of what is seen in each of them; "" where that is not known, or there is no image.
        seen: by key, in memory; empty where it lies in `store`.
        store: where it lies otherwise.
        again: tokens of one example with its images, where the store has lost what is seen.
    """

    def __init__(
        self,
        kept: Batch,
        labels: Tensor,
        keys: Sequence[str],
        seen: Mapping[str, Tensor],
        store: FeatureStore | None,
        again: Callable[[int], Tokens],
    ) -> None:
        self.kept, self.labels, self.keys, self.seen, self.store, self.again = kept, labels, keys, seen, store, again
        tokens: list[Tokens] = kept["tokens"]
        self.nbytes = sum(each.nbytes for each in tokens) + sum(each.nbytes for each in seen.values())
        """In memory."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Seen":
        return self  # it never changes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """What is kept, and labels."""
        at = torch.as_tensor(positions, dtype=torch.int64)
        batch = take(self.kept | {"label": self.labels}, at)
        found: dict[str, Tensor | None] = {key: self._seen(key) for key in {self.keys[i] for i in at.tolist()} - {""}}
        tokens = zip(at.tolist(), batch["tokens"], strict=True)
        return batch | {"tokens": [self._whole(i, each, found.get(self.keys[i])) for i, each in tokens]}

    def _seen(self, key: str) -> Tensor | None:
        return self.seen[key] if self.store is None else self.store.get(key)

    def _whole(self, position: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None and self.keys[position]:
            return self.again(position)
        return replace(tokens, seen=seen)


def blind(conversation: Any) -> Any:
    """A conversation without its images, of which it still says how many there were."""
    images = [None] * len(conversation.get("images") or ())
    if isinstance(conversation, Conversation):
        return replace(conversation, images=images)
    return {**conversation, "images": images} if images else conversation
