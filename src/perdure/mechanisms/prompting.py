"""What prompt methods share: choosing by a query, the pre-trained encoder's features, and placing prefixes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.prefix import Prefix
from perdure.backbones.base import Backbone, OneTower, Tower, named_towers
from perdure.backbones.language import Language
from perdure.core.learner import Core
from perdure.core.method import Method, check_tower
from perdure.types import Batch, Task

_UNFIT = (RuntimeError, IndexError, TypeError, KeyError)
"""What a model raises whose blocks do not take more tokens than an input has."""
QUERY = "query"
"""Name of queries, which never change, so a set of images needs them once."""


def query(learner: Core, batch: Batch) -> Tensor:
    """Unit features (B, dim) of the pre-trained encoder, in float32; those known, or computed here.

    Prompts must be off while it is asked: they are when nothing has been given to them.
    """
    if QUERY in batch:
        known: Tensor = batch[QUERY]
        return known
    with torch.no_grad():
        features = learner.shared_out(batch, learner.backbone)
    return F.normalize(features.float(), dim=1)


def conversation_query(learner: Core, batch: Batch) -> Tensor:
    """What the untouched model is given of each conversation: unit means of its images' tokens beside those of words.

    (B, 2 · dim), see `Language.pooled`; adapters in vision tower and projector must be off, as in `query`.
    """
    if QUERY in batch:
        known: Tensor = batch[QUERY]
        return known
    backbone = learner.backbone
    assert isinstance(backbone, Language)
    with learner.computing():
        return learner.shared_out(batch, lambda part: torch.cat(backbone.pooled(part), dim=1))


def check_routes_once(learner: Core, part: Method) -> None:
    """Raise `ValueError` where blocks are computed again in backward, when what `part` chose is gone."""
    if getattr(learner.backbone, "checkpointing", False):
        raise ValueError(f"{part.name} cannot route again what is computed again: leave checkpointing out of mllm()")


def text_query(learner: Core, tokens: Batch) -> Tensor:
    """Unit embeddings (n, dim) of texts by the pre-trained encoder, in float32; prompts must be off, as in `query`.

    Args:
        learner: whose encoder.
        tokens: what the backbone's `tokenise` gave; a `label` or `task` beside it is not read.
    """
    read = {name: value for name, value in tokens.items() if name not in ("label", "task")}
    with torch.no_grad(), learner.computing():
        return F.normalize(learner.shared_out(read, learner.backbone.encode_tokens).float(), dim=1)


P = TypeVar("P", bound=nn.Module)


class PerTower(Method, Generic[P]):
    """Base of methods that treat an image, or text, by what the pre-trained encoder makes of it; a part for each tower.

    Args:
        tower: which encoder.
    """

    changes_encoder, sole_adapter = True, True

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.towers = nn.ModuleDict()  # of P
        self.treats = frozenset(named_towers(tower))

    def of(self, tower: str) -> P:
        """The part of `tower`, which has been made."""
        found: P = self.towers[tower]  # type: ignore[assignment]
        return found

    def placed(self) -> Iterator[P]:
        """Those of all towers."""
        return (self.of(tower) for tower in named_towers(self.tower))

    def check(self, learner: Core, task: Task) -> None:
        """Refuse a tower that nobody reads with, or whose inputs are no examples."""
        check_tower(learner, self, self.tower)
        if "conversations" in learner.objective.asks and self.treats != {"language"}:
            raise ValueError(
                f"{self.name}(tower={self.tower!r}): in a language model a conversation is asked about: its images are "
                "many or none: write tower='language'"
            )

    @staticmethod
    def asked_of(learner: Core, batch: Batch, tower: str) -> Tensor:
        """Queries (n, dim) of images, texts or conversations, in the batch that `applied` is given."""
        if tower == "language":
            return conversation_query(learner, batch)
        return query(learner, batch) if tower == "vision" else text_query(learner, batch)


class PromptPool(nn.Module):
    """Prompts of one tower that queries choose or mix; a method that asks says how."""

    def joining(self, asked: Tensor, labels: Tensor | None) -> AbstractContextManager[None]:
        """Within, the tower encodes inputs with the prompts of their queries.

        Args:
            asked: queries (n, dim), in the order of the inputs.
            labels: classes (n,) in training, where they are known.
        """
        raise NotImplementedError


C = TypeVar("C", bound=PromptPool)


class QueriedPrompts(PerTower[C]):
    """Base of methods whose prompts depend on the query; every image and text is asked about by itself."""

    needs = ("classes", "captions")

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """The query of each image."""
        return {QUERY: query(learner, batch)} if "vision" in self.treats else {}

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, each image or text has its prompts; of images queries that are known are not computed again."""
        labels = batch.get("label") if self.training else None
        return self.of(tower).joining(self.asked_of(learner, batch, tower), labels)

    def measures(self, learner: Core) -> dict[str, float]:
        """`batchwise` where the batch votes: such scores are not comparable."""
        return {"batchwise": 1.0} if self.batchwise else {}

    def asked(self, learner: Core, batch: Batch) -> Iterator[tuple[C, Tensor, Tensor]]:
        """What a step reads: prompts of a tower, its queries (n, dim), and classes (n,) of what they are of."""
        for tower in named_towers(self.tower):
            if tower == "vision":
                yield self.of(tower), query(learner, batch), batch["label"]
            else:
                texts, labels = learner.objective.texts(learner, batch)
                yield self.of(tower), text_query(learner, learner.backbone.tokenised(texts)), labels


def nearest(cosines: Tensor, count: int, batchwise: bool = False) -> Tensor:
    """The `count` best entries for each example, (B, count), from `cosines` (B, entries).

    Args:
        cosines: of queries and keys.
        count: entries wanted.
        batchwise: all examples take the entries that most of them chose, as the published codes do. In a test set
            sorted by task this tells the task, and an answer depends on who else is asked about.
    """
    best = cosines.topk(count, dim=1).indices
    if not batchwise or len(best) == 1:
        return best
    votes = torch.bincount(best.flatten(), minlength=cosines.shape[1])
    return votes.topk(count).indices.expand(len(best), -1)


def attach_prefix(learner: Core, prefix: Prefix, blocks: str | None, tower: OneTower = "vision") -> None:
    """Put `prefix` into the attention of `blocks` of `tower`, see `Backbone.sites`.

    Raises:
        ValueError: when the attention of a block cannot take more keys than it has tokens.
    """
    backbone = learner.backbone
    keys, values, outs = (backbone.sites(letter, blocks, tower) for letter in "kvo")
    layers, reason = prefix.attach(backbone, keys, values, outs), "they do not come from the layers of that name"
    # One small input: an attention that goes round its layers, or knows how many tokens there are, is found out here.
    like, before = next(backbone.parameters()), prefix.joined
    try:
        with prefix.using([like.new_zeros(1, 2 * site.fan_out) for site in keys]):
            output_of(learner, tower)
    except torch.OutOfMemoryError:
        raise
    except _UNFIT as error:
        before, reason = -1, " ".join(str(error).split())[:120]
    if prefix.joined != before + layers:
        raise ValueError(
            f"{backbone.spec}: nothing can join the keys and values of its attention ({reason}); use another backbone, "
            "or a method without prefixes, such as lora"
        )


def first_blocks(backbone: Backbone, start: int, count: int, tower: OneTower = "vision") -> str:
    """The `count` blocks of `tower` from number `start` on, as many as there are, in `Backbone.sites`' notation."""
    return f"{start}-{min(start + count, len(backbone.blocks(tower))) - 1}"


def check_tokens(learner: Core, tower: OneTower = "vision") -> None:
    """Let `tower`, whose blocks take prompt tokens now, encode something small.

    Raises:
        ValueError: when its attention cannot do with more tokens than an image or text has.
    """
    try:
        output_of(learner, tower)
    except torch.OutOfMemoryError:
        raise
    except _UNFIT as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{learner.backbone.spec}: no token can join those of {_INPUT[tower]} ({reason}); use another backbone, or "
            "a method without prompt tokens, such as lora"
        ) from error


_INPUT = {"vision": "an image", "text": "a text", "language": "a conversation", "projector": "an image"}


@torch.no_grad()
def output_of(learner: Core, tower: OneTower = "vision") -> Tensor:
    """What `tower`, as it is now, gives of something small, or of two texts of unlike length, (2, dim)."""
    learner.to(learner.device)  # what has just been made is not there yet
    if tower == "text":
        return learner.backbone.encode_text(["a", "a photo of a cat"])
    features: Tensor = learner.backbone(learner.backbone.sample())
    return features
