"""What prompt methods share: choosing by a query, the pre-trained encoder's features, and placing prefixes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.prefix import Prefix
from perdure.backbones.base import Backbone, OneTower
from perdure.learner import Core
from perdure.types import Batch

_UNFIT = (RuntimeError, IndexError, TypeError, KeyError)
"""What a model raises whose blocks do not take more tokens than an input has."""
QUERY = "query"
"""Name under which a method records queries; they never change, so a set of images needs them once."""


def query(learner: Core, batch: Batch) -> Tensor:
    """Unit features (B, dim) of the pre-trained encoder, in float32; those recorded, or computed here.

    Prompts must be off while it is asked: they are when nothing has been given to them.
    """
    if QUERY in batch:
        return batch[QUERY]
    with torch.no_grad():
        features: Tensor = learner.backbone(batch)
    return F.normalize(features.float(), dim=1)


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
        with prefix.giving([like.new_zeros(1, 2 * site.fan_out) for site in keys]):
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


def first_blocks(backbone: Backbone, start: int, count: int) -> str:
    """The `count` vision blocks from number `start` on, as many of them as there are, in `Backbone.sites`' notation."""
    return f"{start}-{min(start + count, len(backbone.blocks())) - 1}"


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


_INPUT = {"vision": "an image", "text": "a text"}


@torch.no_grad()
def output_of(learner: Core, tower: OneTower = "vision") -> Tensor:
    """What `tower`, as it is now, gives of a black image, (1, dim), or of two texts of unlike length, (2, dim)."""
    learner.to(learner.device)  # what has just been made is not there yet
    if tower == "text":
        return learner.backbone.encode_text(["a", "a photo of a cat"])
    side = learner.backbone.preprocess.size
    features: Tensor = learner.backbone(
        {"image": torch.zeros(1, 3, side, side, dtype=torch.uint8, device=learner.device)}
    )
    return features
