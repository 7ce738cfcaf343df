"""Retrieval: images find their captions and captions their images (CLIP's loss; Radford et al., ICML 2021).

Differs: captions of one image are no negatives of each other. Where an image stands in a batch more than once, or
shows more than one caption, all pairs of one `pair` are positives, and the target is spread over them evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.objective import Competitors, Head, Objective
from perdure.metrics import recalls
from perdure.options.ranges import Count, checked
from perdure.types import Batch, Data, Task, Union

_CAPTIONS = "captions"


class Retrieve(Objective, name="retrieve"):
    """Symmetric contrastive loss between images and captions, with the model's frozen logit scale.

    Args:
        captions: how many of an image's captions a step shows, drawn anew in every step; None shows all.
    """

    asks = frozenset({"captions"})
    towers = frozenset({"vision", "text"})
    outputs = ("features", _CAPTIONS)
    open_vocabulary = True
    vectorised = False  # captions are read one by one, and vmap cannot look into them

    @checked
    def __init__(self, captions: Count | None = 1) -> None:
        super().__init__()
        self.captions = captions

    def scores(self, features: Tensor) -> Tensor:
        """There are no classes to score.

        Raises:
            ValueError: always.
        """
        raise ValueError("retrieve ranks images and captions and scores no classes: use 'perdure search'")

    def only_task_classes(self, batch: Batch) -> bool:
        """Never: all pairs of a batch compete."""
        return False

    def losses(self, features: Tensor, batch: Batch, only_task: bool | None = None) -> Tensor:
        """Contrastive loss of each image, (B,): the mean of image to text and text to image.

        Args:
            features: (B, dim).
            batch: with `pair` and `text` (or the captions' embeddings).
            only_task: has no meaning here.

        Raises:
            ValueError: when the batch has no captions.
        """
        texts, image_of = self.shown(batch)
        return self.contrast(self.similarity(features, texts), batch["pair"], image_of)

    def chance_loss(self, batch: Batch, only_task: bool) -> float:
        """Log of the number of pairs that compete."""
        return math.log(max(2, len(batch["pair"])))

    def similarity(self, features: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines (B, n) of image features to embeddings of texts."""
        scale: Tensor = self._learner[0].backbone.logit_scale
        return scale * F.normalize(features, dim=1) @ F.normalize(texts, dim=1).T

    def output(self, learner: Core, batch: Batch, name: str) -> Tensor | list[Tensor]:
        """See `Objective.output`; of captions a list, (captions, dim) an image."""
        return embedded(learner, batch["text"]) if name == _CAPTIONS else super().output(learner, batch, name)

    def distributions(self, features: Tensor | None, batch: Batch, old: bool = False) -> list[Tensor]:
        """Scaled cosines of images to the captions that a step shows, (R, n), and of captions to images, (n, R)."""
        if features is None:
            features, texts = batch["features"], picked(batch[_CAPTIONS], self.chosen(batch))
        else:
            texts, _ = self.shown(batch)
        scores = self.similarity(features, texts)
        return [scores, scores.T]

    def shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Objective.shown`."""
        if "texts" in batch:
            return batch["texts"], batch["image_of"]
        chosen = self.chosen(batch)
        image_of = chosen[0].to(batch["label"].device)
        if _CAPTIONS in batch:
            return picked(batch[_CAPTIONS], chosen), image_of
        return self._learner[0].embed_texts(*self._said(batch, chosen)), image_of

    def embed_texts(self, learner: Core, batch: Batch) -> Batch:
        """With the shown captions' embeddings `texts` (n, dim), and the row of each one's image, `image_of` (n,)."""
        texts, image_of = self.shown(batch)
        return batch | {"texts": texts, "image_of": image_of}

    def chosen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Objective.chosen`; drawn anew in every step."""
        if "text" not in batch:
            raise ValueError("retrieve learns from captions, which this stream has not: use captions(path=...)")
        counts = torch.tensor(list(map(len, batch["text"])))
        there = torch.arange(int(counts.max())) < counts[:, None]
        if self.captions is None:
            rows, places = there.nonzero(as_tuple=True)
            return rows, places
        learner = self._learner[0]
        draw = torch.rand(there.shape, dtype=torch.float32, generator=learner.generator("caption", learner.step))
        order = (draw + 2 * ~there).argsort(1)[:, : self.captions]
        rows, column = there.gather(1, order).nonzero(as_tuple=True)
        return rows, order[rows, column]

    @staticmethod
    def contrast(scores: Tensor, pair: Tensor, image_of: Tensor) -> Tensor:
        """Loss of each image, (B,), from scaled similarities.

        Args:
            scores: images to texts (B, n).
            pair: identity of each image, (B,).
            image_of: row of each text's image, (n,).
        """
        positive = (pair[:, None] == pair[image_of][None]).to(scores.dtype)
        to_text = -(positive * F.log_softmax(scores, dim=1)).sum(1) / positive.sum(1)
        to_image = -(positive * F.log_softmax(scores, dim=0)).sum(0) / positive.sum(0)
        # of each image the mean over its texts
        shares = F.one_hot(image_of, len(pair)).to(scores.dtype)
        back = (to_image @ shares) / shares.sum(0).clamp_min(1)
        return (to_text + back) / 2

    def example(self, batch: Batch, index: int) -> Batch:
        """See `Objective.example`."""
        rows, places = self.chosen(batch)
        own = places[rows == index].tolist()
        shown = {"text": [[batch["text"][index][place] for place in own]]}
        if _CAPTIONS in batch:
            shown[_CAPTIONS] = [batch[_CAPTIONS][index][own]]
        return super().example(batch, index) | shown

    def competitors(self, learner: Core, batch: Batch) -> Batch:
        """The pairs of `batch` as they are now, which others are compared with."""
        texts, image_of = self.shown(batch)
        return {"features": learner.encode(batch), "pair": batch["pair"], "texts": texts, "image_of": image_of}

    def example_loss(self, features: Tensor, batch: Batch, rivals: Competitors) -> Tensor:
        """See `Objective.example_loss`: among other images and texts, which get no gradient."""
        texts, image_of = self.shown(batch)
        images, others = self._others(batch, rivals)
        known = rivals.others
        rows = images.cumsum(0)[known["image_of"][others]]  # counted from 1, for the one image comes first
        scores = self.similarity(
            torch.cat([features, known["features"][images]]), torch.cat([texts, known["texts"][others]])
        )
        pair = torch.cat([batch["pair"], known["pair"][images]])
        return self.contrast(scores, pair, torch.cat([image_of, rows]))[0]

    def example_scores(self, features: Tensor, batch: Batch, rivals: Competitors) -> Tensor:
        """Scaled cosines of the image to other texts, and of its texts to other images."""
        images, others = self._others(batch, rivals)
        forth = self.similarity(features, rivals.others["texts"][others])
        back = self.similarity(self.shown(batch)[0], rivals.others["features"][images])
        return torch.cat([forth.flatten(), back.flatten()])

    @staticmethod
    def _others(batch: Batch, rivals: Competitors) -> tuple[Tensor, Tensor]:
        """Which images, and which texts, are not of the one pair of `batch`."""
        images = rivals.others["pair"] != batch["pair"]
        return images, images[rivals.others["image_of"]]

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """Embeddings of all captions, (captions, dim) an image, where the text tower can never change."""
        if _CAPTIONS in batch or "text" not in batch or not learner.constant_texts:
            return {}
        return {_CAPTIONS: embedded(learner, batch["text"])}

    def head(self, learner: Core) -> Head:
        """The scale: captions to compare with are anybody's."""
        cosines = "torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(texts).T"
        what = "cosine to the embeddings of any sentences, times `logit_scale`"
        return Head(what, f'head["logit_scale"] * {cosines}', {"logit_scale": learner.backbone.logit_scale})

    def texts(self, learner: Core, batch: Batch) -> tuple[list[str], Tensor]:
        """The captions of a step."""
        return self._said(batch, self.chosen(batch))

    @staticmethod
    def _said(batch: Batch, chosen: tuple[Tensor, Tensor]) -> tuple[list[str], Tensor]:
        """The captions that are chosen, and the topic of each."""
        pairs = zip(*(each.tolist() for each in chosen), strict=True)
        return [batch["text"][row][place] for row, place in pairs], batch["label"][chosen[0]]

    def evaluate(self, learner: Core, tasks: Sequence[Task], size: int = 256) -> list[dict[str, float]]:
        """Recall at 1, 5 and 10 both ways: on the gallery of each task, and on that of all of `tasks` (harder).

        `recall` is the mean of the six on the union (`rsum` / 6), `recall_own_gallery` that on the task's own; queries
        and right answers are the task's in both: of an image that another task shows in another language, the captions
        there are neither right nor wrong.
        """
        with learner.inference():
            galleries = self._galleries(learner, [learner.cache.test(task.test) for task in tasks], size)
        union = _joined(galleries)
        task_of = torch.cat([torch.full((len(own.texts),), i) for i, own in enumerate(galleries)])
        found = []
        for i, own in enumerate(galleries):
            near, far = recalls(*own.parts, own.parts), recalls(*own.parts, union.parts, task_of == i)
            found.append(
                {"recall": sum(far.values()) / len(far), "recall_own_gallery": sum(near.values()) / len(near)}
                | {f"own/{k}": v for k, v in near.items()}
                | {f"union/{k}": v for k, v in far.items()}
            )
        return found

    def _galleries(self, learner: Core, tests: Sequence[Data], size: int) -> list[_Gallery]:
        """Of each of `tests`, read in one pass."""
        images, pairs, texts, owners, counts = [], [], [], [], []
        for batch in learner.batches(Union(tests), size):
            if "text" not in batch:
                raise ValueError("retrieve is measured on captions, which this stream has not: use captions(path=...)")
            many = torch.tensor(list(map(len, batch["text"])))
            every = batch[_CAPTIONS] if _CAPTIONS in batch else embedded(learner, batch["text"])
            images.append(F.normalize(learner.encode(batch), dim=1).cpu())
            texts.append(F.normalize(torch.cat(every), dim=1).cpu())
            pairs.append(batch["pair"].cpu())
            owners.append(batch["pair"].cpu().repeat_interleave(many))
            counts.append(many)
        sizes = list(map(len, tests))
        lines = [int(count.sum()) for count in torch.split(torch.cat(counts), sizes)]
        of_images = [torch.split(torch.cat(each), sizes) for each in (images, pairs)]
        of_texts = [torch.split(torch.cat(each), lines) for each in (texts, owners)]
        return [_Gallery(*each) for each in zip(*of_images, *of_texts, strict=True)]


@dataclass(frozen=True)
class _Gallery:
    images: Tensor
    pair: Tensor
    texts: Tensor
    pair_of_text: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.pair, self.texts, self.pair_of_text


def _joined(galleries: Sequence[_Gallery]) -> _Gallery:
    """All together; an image that several have (with captions in other languages) stands there once."""
    images, pair, texts, owners = (torch.cat(each) for each in zip(*(g.parts for g in galleries), strict=True))
    first = torch.tensor(list(dict(zip(reversed(pair.tolist()), reversed(range(len(pair))), strict=True)).values()))
    first = first.sort().values
    return _Gallery(images[first], pair[first], texts, owners)


def embedded(learner: Core, texts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Embeddings of the texts of each image, (texts, dim)."""
    found = learner.embed_texts([text for each in texts for text in each])
    return list(torch.split(found, list(map(len, texts))))


def picked(values: Sequence[Tensor], chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Of `values`, (texts, dim) an image, those at (rows, places), (n, dim)."""
    return torch.stack([values[row][place] for row, place in zip(*(each.tolist() for each in chosen), strict=True)])
