"""Streams: where tasks come from, by name for the option syntax and as functions for Python."""

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from perdure.backbones.preprocess import Preprocess
from perdure.options.spec import Spec, build, parse_one
from perdure.streams.benchmarks import cifar100, cub200, domainnet, easy_vqa, imagenet_r
from perdure.streams.captions import captions
from perdure.streams.conversation_benchmarks import coin, daquar, easy_vqa_questions, mllm_acl, mllm_dcl, ucit
from perdure.streams.conversation_stream import as_questions, conversations, in_turn
from perdure.streams.conversations import ConversationSet
from perdure.streams.evaluation_sets import EVALUATION_SETS
from perdure.streams.few_shot import fewshot
from perdure.streams.folders import images
from perdure.streams.hub import hub
from perdure.streams.image_set import Budget, Captioned, ImageSet
from perdure.streams.karpathy import coco, flickr30k
from perdure.streams.options import REGISTRY, Options, StreamPlan, redrawn
from perdure.streams.sequence import sequence
from perdure.streams.single_task import (
    captioned_task,
    conversation_task,
    folder_task,
    given_captions,
    given_conversations,
    given_task,
)
from perdure.streams.synthetic import captions_synthetic, synthetic
from perdure.streams.tables import csv, parquet
from perdure.types import Stream

__all__ = [
    "STREAMS",
    "Budget",
    "Captioned",
    "ConversationSet",
    "ImageSet",
    "Options",
    "StreamPlan",
    "build_stream",
    "captioned_task",
    "conversation_task",
    "folder_task",
    "given_captions",
    "given_conversations",
    "given_task",
]

STREAMS: dict[str, Callable[..., StreamPlan]] = {
    "images": images,
    "parquet": parquet,
    "csv": csv,
    "hub": hub,
    "cifar100": cifar100,
    "imagenet_r": imagenet_r,
    "cub200": cub200,
    "domainnet": domainnet,
    "easy_vqa": easy_vqa,
    "captions": captions,
    "flickr30k": flickr30k,
    "coco": coco,
    "sequence": sequence,
    "fewshot": fewshot,
    "conversations": conversations,
    "as_questions": as_questions,
    "in_turn": in_turn,
    "coin": coin,
    "ucit": ucit,
    "mllm_dcl": mllm_dcl,
    "mllm_acl": mllm_acl,
    "daquar": daquar,
    "easy_vqa_questions": easy_vqa_questions,
    "synthetic": synthetic,
    "captions_synthetic": captions_synthetic,
}
"""Name -> factory; its named parameters are the options a user may write."""
REGISTRY.update(STREAMS)


def build_stream(
    what: str | Spec, preprocess: Preprocess, seed: int, measured: bool = False, draw: int | None = None, **more: Any
) -> Stream:
    """The stream that `what` describes: `'cifar100(tasks=10)'`, or a name with the options in `more`.

    Args:
        what: text of the option syntax, or its parsed form.
        preprocess: what the backbone wants.
        seed: the run's; orders the classes or domains where the description does not.
        measured: nothing is learnt from it: of data without a test part all images are tested, in one task unless it is
            divided, and a test part may stand alone.
        draw: a seed of the train images that are drawn, wherever in the description that is; None leaves it there.
        more: further options; they win over those in `what`.

    Raises:
        ValueError: when the description or the data is not as expected; one line that says what to do.
    """
    spec = parse_one(what) if isinstance(what, str) else what
    if spec.name in EVALUATION_SETS:
        raise ValueError(
            f"{spec.name} is an evaluation set, which is asked and never taught: name it under retain, with "
            "the objective generate()"
        )
    described = replace(spec, kwargs=tuple({**dict(spec.kwargs), **more}.items()))
    if draw is not None:
        described = redrawn(described, draw)
    plan: StreamPlan = build(described, STREAMS, "stream")
    try:
        return plan(preprocess, seed, measured)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(f"{str(described)[:80]}: no file has so long a name: give a path that is there") from error
