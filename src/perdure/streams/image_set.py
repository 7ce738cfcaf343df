"""Labelled or captioned images as batches of uint8 tensors, decoded once when memory allows, else at every access."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from perdure.backbones.preprocess import Preprocess, UnreadableImage, begins_like_an_image
from perdure.streams.sources import InMemory, Picture, Source, head, spare_memory
from perdure.types import Batch

_CHUNK = 256
_PROBE = 4
_WORTH_A_THREAD = 0.002
"""Seconds."""
_COUNTING = 5.0
"""Seconds in which the unreadable images of a set are counted before one of them is refused."""


class Budget:
    """Bytes that decoded images may take, shared by the sets of a stream.

    Args:
        size: in bytes; None: a quarter of the machine's memory, or half of what is free when that is less.
    """

    def __init__(self, size: int | None = None) -> None:
        self.left = spare_memory() if size is None else size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve `size` bytes, all or nothing."""
        with self._lock:
            if size > self.left:
                return False
            self.left -= size
            return True


class ImageSet:
    """Images of known labels; implements `perdure.types.Data`.

    Decoded images are kept in memory when the whole set fits the budget, each from its first use on. The workers of a
    `DataLoader` and pickled copies decode at every access, so that memory does not multiply; a loader needs
    `collate_fn=lambda batch: batch`, for `__getitems__` returns whole batches.

    Args:
        source: where the images lie.
        rows: which rows of `source`, int64 (n,).
        labels: global class ids, int64 (n,).
        preprocess: what the backbone wants.
        budget: shared among sets; one of its own when None.
    """

    def __init__(
        self, source: Source, rows: Tensor, labels: Tensor, preprocess: Preprocess, budget: Budget | None = None
    ) -> None:
        if len(rows) != len(labels):
            raise ValueError(f"labels: got {len(labels)} for {len(rows)} images, expected one label an image")
        self.source = source
        self.rows = rows
        self.labels = labels
        self.preprocess = preprocess
        self.skipped: tuple[str, ...] = ()
        """File and row of the images that `readable` left out."""
        self._budget = budget or Budget()
        self._pixels: Tensor | None = None
        self._done = torch.zeros(0, dtype=torch.bool)
        self._asked = False
        self._slow: bool | None = None  # whether an image is worth a thread; None: not known yet

    @classmethod
    def of(
        cls, images: Sequence[Picture] | Tensor, labels: Sequence[int] | Tensor, preprocess: Preprocess
    ) -> "ImageSet":
        """Images given in Python: Pillow images, uint8 arrays (H, W, 3), paths, or one uint8 tensor (n, 3, H, W).

        Raises:
            ValueError: when an image has another form, labels are not integers, or their numbers differ.
        """
        ids = _integers(labels)
        source = InMemory(images)
        made = cls(source, torch.arange(len(source)), ids, preprocess)
        side = preprocess.size
        if isinstance(images, Tensor) and images.shape[2:] == (side, side) and preprocess.resize == side:
            made._pixels, made._done, made._asked = images, torch.ones(len(images), dtype=torch.bool), True
        return made

    @classmethod
    def queries(cls, images: Sequence[Picture] | Tensor, preprocess: Preprocess) -> "ImageSet":
        """The same of images that are asked about: their labels, all 0, mean nothing."""
        return cls.of(images, [0] * len(images), preprocess)

    def identities(self) -> set[str]:
        """What tells the images apart, by the place where they lie; see `Source.identity`."""
        return {self.source.identity(row) for row in self.rows.tolist()} - {""}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """`image` uint8 (B, 3, S, S) and `label` int64 (B,).

        Raises:
            UnreadableImage: names file and row, and counts the unreadable images of the set.
        """
        chosen = torch.as_tensor(positions, dtype=torch.int64).flatten()
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise IndexError(f"positions {int(chosen.min())}..{int(chosen.max())} of a set of {len(self)} images")
        try:
            with torch.inference_mode(False):  # threads that decode are in no such mode, and may not write what is
                return {"image": self._images(chosen), "label": self.labels[chosen]}
        except UnreadableImage as error:
            if len(self) == 1:
                raise
            bad, tried = self._unreadable(_COUNTING)
            # This one is bad, whether or not there was the time to come to it.
            found = "1 is" if len(bad) < 2 else f"{len(bad)} are"
            raise UnreadableImage(f"of {tried} images {found} unreadable: {error}") from error

    @property
    def cached(self) -> bool:
        """Whether decoded images stay in memory: then a loader's workers cost more than they bring."""
        self._reserve()
        return self._pixels is not None

    def where(self, position: int) -> str:
        """File and row of an image, for people."""
        return self.source.where(int(self.rows[position]))

    def subset(self, positions: Tensor) -> Self:
        """The images at `positions` (n,), in that order, with what is decoded of them."""
        part = self._but(rows=self.rows[positions], labels=self.labels[positions], _pixels=None, _asked=False)
        if self._pixels is not None:
            part._pixels, part._done, part._asked = self._pixels[positions], self._done[positions], True
        return part

    def relabelled(self, labels: Tensor, budget: Budget | None = None) -> Self:
        """The same images under other labels, int64 (n,); decoded images are shared when they are `cached`.

        Args:
            labels: of the images, in their order.
            budget: shared with the sets of another stream; the present one when None.
        """
        if len(labels) != len(self):
            raise ValueError(f"labels: got {len(labels)} for {len(self)} images, expected one label an image")
        return self._but(labels=labels, _budget=budget or self._budget)

    def readable(self) -> Self:
        """The images that can be decoded; decodes all, and lists the others as `skipped`."""
        bad, _ = self._unreadable()
        good = self
        if bad:
            good = self.subset(torch.tensor([p for p in range(len(self)) if p not in bad], dtype=torch.int64))
        good.skipped = (*self.skipped, *(bad[p] for p in sorted(bad)))
        return good

    def _unreadable(self, seconds: float = math.inf) -> tuple[dict[int, str], int]:
        """File and row of the images that cannot be decoded, by position, and how many were tried in that time."""
        bad: dict[int, str] = {}
        tried: list[int] = []
        until = time.monotonic() + seconds

        def attempt(position: int) -> None:
            if time.monotonic() > until:
                return
            tried.append(position)
            try:
                # What does not even begin like an image is told by a few bytes: that costs a tenth of an attempt.
                begin = head(self.source, int(self.rows[position]))
                if begin is not None and not begins_like_an_image(begin):
                    bad[position] = self.where(position)
                else:
                    self._images(torch.tensor([position]))
            except UnreadableImage:
                bad[position] = self.where(position)

        self._reserve()
        _threaded(attempt, len(self))
        return bad, len(tried)

    def hashes(self) -> Tensor:
        """A number for each image that says what it shows, int64 (n,): from its file's content, whatever its name.

        Zero for an image that is gone.
        """
        return content_hashes([(self.source, row) for row in self.rows.tolist()])

    def shows(self, hashes: Tensor) -> Tensor:
        """Which images are among those of `hashes`, bool (n,)."""
        return torch.isin(self.hashes(), hashes)

    def _but(self, **changes: Any) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)
        return made

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_pixels", "_done", "_budget")}
        return {**kept, "_asked": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._budget = Budget(0)
        self._pixels, self._done = None, torch.zeros(0, dtype=torch.bool)

    def _reserve(self) -> None:
        if self._asked or get_worker_info() is not None:
            return
        self._asked = True
        side = self.preprocess.size
        if self._budget.take(len(self) * 3 * side * side):
            self._done = torch.zeros(len(self), dtype=torch.bool)
            self._pixels = torch.empty(len(self), 3, side, side, dtype=torch.uint8)

    def _images(self, chosen: Tensor) -> Tensor:
        self._reserve()
        if self._pixels is None:
            return self._decode(chosen)
        missing = torch.unique(chosen[~self._done[chosen]])
        if len(missing) and get_worker_info() is not None:
            return self._decode(chosen)
        for part in missing.split(_CHUNK) if len(missing) else ():  # what was given decoded is never written to
            self._pixels[part] = self._decode(part)
            self._done[part] = True
        return self._pixels[chosen]

    def _decode(self, chosen: Tensor) -> Tensor:
        side = self.preprocess.size
        decoded = torch.empty(len(chosen), 3, side, side, dtype=torch.uint8)
        rows = self.rows[chosen].tolist()

        def fill(i: int) -> None:
            decoded[i] = self.preprocess(self.source.read(rows[i]))

        self._slow = _threaded(fill, len(rows), self._slow)
        return decoded


class Captioned(ImageSet):
    """Images, each with all of its captions; implements `perdure.types.Data`.

    Args:
        images: labelled with their topics; what is decoded of them is kept.
        pairs: identity of each image, int64 (n,): the same wherever the same image occurs in a stream.
        texts: the captions of each image.
    """

    def __init__(self, images: ImageSet, pairs: Tensor, texts: Sequence[Sequence[str]]) -> None:
        self.__dict__.update(images.__dict__)
        for name, values in (("pairs", pairs), ("texts", texts)):
            if len(values) != len(images):
                raise ValueError(f"{name}: got {len(values)} for {len(images)} images, expected one an image")
        self.pairs = pairs
        self.texts = [tuple(each) for each in texts]

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """`image` uint8 (B, 3, S, S), `label` int64 (B,), `pair` int64 (B,), and `text`, a list with a tuple an image.

        Raises:
            UnreadableImage: names file and row.
        """
        batch = super().__getitems__(positions)
        chosen = torch.as_tensor(positions, dtype=torch.int64).flatten()
        return batch | {"pair": self.pairs[chosen], "text": [self.texts[i] for i in chosen.tolist()]}

    def subset(self, positions: Tensor) -> Self:
        """The images at `positions` (n,), in that order, with what is decoded of them."""
        part = super().subset(positions)
        part.pairs, part.texts = self.pairs[positions], [self.texts[i] for i in positions.tolist()]
        return part

    def moved(self, pairs: int) -> Self:
        """As a part of a longer stream: identities raised by `pairs`."""
        return self._but(pairs=self.pairs + pairs)


def content_hashes(places: Sequence[tuple[Source, int]]) -> Tensor:
    """Of images in sources, see `ImageSet.hashes`: int64 (n,)."""
    found = torch.zeros(len(places), dtype=torch.int64)

    def fill(position: int) -> None:
        source, row = places[position]
        try:
            encoded = source.encoded(row)
            content = encoded.read_bytes() if isinstance(encoded, Path) else encoded
        except (UnreadableImage, OSError):
            return
        digest = hashlib.blake2b(content, digest_size=8).digest()
        found[position] = int.from_bytes(digest, "big", signed=True)

    _threaded(fill, len(places))
    return found


def _threaded(work: Callable[[int], None], count: int, slow: bool | None = None) -> bool | None:
    """Do `work` for each number below `count`; whether one is `slow` enough for threads, where that is known."""
    # Pillow lets other threads run while it decodes, but of small images most of the time is Python's: there threads
    # were measured to lose a third. They live for one call only, for they would not survive a fork.
    threads = 1 if get_worker_info() is not None else min(8, torch.get_num_threads())
    began, done = time.perf_counter(), 0
    while done < count and (threads < 2 or not slow) and (done < _PROBE or threads < 2 or slow is False):
        work(done)
        done += 1
    if slow is None and done == _PROBE and threads > 1:
        slow = time.perf_counter() - began >= _PROBE * _WORTH_A_THREAD
    if not slow:
        for item in range(done, count):
            work(item)
    elif done < count:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, range(done, count)):
                pass
    return slow


def _integers(labels: Sequence[int] | Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        for row, label in enumerate(labels):
            if isinstance(label, bool) or not isinstance(label, SupportsIndex):
                raise ValueError(f"labels, row {row}: got {label!r}, expected an integer")
    ids = labels if isinstance(labels, Tensor) else torch.tensor([int(label) for label in labels], dtype=torch.int64)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"labels: got {ids.dtype} of shape {tuple(ids.shape)}, expected integers (n,)")
    return ids.to(torch.int64).cpu()
