"""Images with captions as batches: the pixels of an image set, with each image's texts and identity beside them."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.preprocess import Preprocess
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.sources import Source
from perdure.types import Batch


class Captioned(ImageSet):
    """Images, each with all of its captions; implements `perdure.types.Data`.

    Args:
        source: where the images lie.
        rows: which rows of `source`, int64 (n,).
        labels: topics, int64 (n,).
        pairs: identity of each image, int64 (n,): the same wherever the same image occurs in a stream.
        texts: captions, uint8 (n, K, N) as `perdure.backbones.texts.pack` writes them; missing ones are zero.
        preprocess: what the backbone wants.
        budget: shared among sets; one of its own when None.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        labels: Tensor,
        pairs: Tensor,
        texts: Tensor,
        preprocess: Preprocess,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(source, rows, labels, preprocess, budget)
        self._describe(pairs, texts)

    @classmethod
    def around(cls, images: ImageSet, pairs: Tensor, texts: Tensor) -> "Captioned":
        """The images of `images`, with what is decoded of them, as captioned ones."""
        made = cls.__new__(cls)
        made.__dict__.update(images.__dict__)
        made._describe(pairs, texts)
        return made

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """`image` uint8 (B, 3, S, S), `label` int64 (B,), `pair` int64 (B,) and `text` uint8 (B, K, N).

        Raises:
            UnreadableImage: names file and row.
        """
        batch = super().__getitems__(positions)
        chosen = torch.as_tensor(positions, dtype=torch.int64).flatten()
        return batch | {"pair": self.pairs[chosen], "text": self.texts[chosen]}

    def subset(self, positions: Tensor) -> Self:
        """The images at `positions` (n,), in that order, with what is decoded of them."""
        part = super().subset(positions)
        part.pairs, part.texts = self.pairs[positions], self.texts[positions]
        return part

    def moved(self, pairs: int, most: int, longest: int) -> Self:
        """As a part of a longer stream: identities raised by `pairs`, texts of shape (n, `most`, `longest`)."""
        _, captions, size = self.texts.shape
        texts = F.pad(self.texts, (0, longest - size, 0, most - captions))
        return self._but(pairs=self.pairs + pairs, texts=texts)

    def _describe(self, pairs: Tensor, texts: Tensor) -> None:
        for name, values in (("pairs", pairs), ("texts", texts)):
            if len(values) != len(self.labels):
                raise ValueError(f"{name}: got {len(values)} for {len(self.labels)} images, expected one an image")
        if texts.dim() != 3 or texts.dtype != torch.uint8:
            raise ValueError(f"texts: got {texts.dtype} of shape {tuple(texts.shape)}, expected torch.uint8 (n, K, N)")
        self.pairs = pairs
        """Identity of each image, int64 (n,)."""
        self.texts = texts
        """Captions, uint8 (n, K, N)."""
