"""The classifier of an export: how scores are made of features, in words, in Python and as tensors."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.method import Method, parts_of
from perdure.objectives import Classify, Retrieve, ZeroShot


@dataclasses.dataclass(frozen=True)
class Classifier:
    """How `head` and `features` give scores: in words, and in Python."""

    what: str
    scores: str


_LINEAR = Classifier("a linear layer on the features", 'features @ head["weight"].T + head["bias"]')
_TEXTS = Classifier(
    "cosine to the class names' text embeddings (rows of `weight`, of unit length), times `logit_scale`",
    'head["logit_scale"] * torch.nn.functional.normalize(features) @ head["weight"].T',
)
PAIRS = Classifier(
    "cosine to the embeddings of any sentences, times `logit_scale`",
    'head["logit_scale"] * torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(texts).T',
)
_COSINES = dataclasses.replace(_TEXTS, what="cosine to rows of `weight` (of unit length), times `logit_scale`")
_MEANS = Classifier(
    "cosine to the classes' mean features (rows of `weight`, of unit length)",
    'torch.nn.functional.normalize(features) @ head["weight"].T',
)


def classifier_of(learner: Core) -> Classifier:
    """How the learner answers, when a plain head can.

    Raises:
        ValueError: when it cannot.
    """
    from perdure.methods.ncm import NCM  # here, because it loads the methods of other packages too

    owner, objective = _predicts(learner.method), learner.objective
    if owner is not None:
        if type(owner).predict is NCM.predict:
            return _MEANS
        raise ValueError(f"{owner.name} predicts in a way that a plain head cannot; keep this learner with save")
    if isinstance(objective, Classify) and objective.cosine is not None:
        return _COSINES
    for known, classifier in ((Classify, _LINEAR), (ZeroShot, _TEXTS), (Retrieve, PAIRS)):
        if type(objective).scores is known.scores:
            return classifier
    name = type(objective).__name__
    raise ValueError(f"{name}: only classify(), zeroshot() and retrieve() can be exported; keep this learner with save")


def _predicts(method: Method) -> Any:
    return next((part for part in parts_of(method) if type(part).predict is not Method.predict), None)


def head_of(learner: Core) -> dict[str, Tensor]:
    """The tensors of the head, by the names that `Classifier.scores` uses."""
    objective: Any = learner.objective
    classifier = classifier_of(learner)
    if classifier is _MEANS:
        owner = _predicts(learner.method)
        means = torch.stack([owner.sums[str(c)] / owner.counts[str(c)] for c in objective.classes])
        return {"weight": F.normalize(means, dim=1)}
    if classifier is PAIRS:
        return {"logit_scale": learner.backbone.logit_scale}
    if classifier is _TEXTS:
        return {"weight": objective.embed(objective.names), "logit_scale": learner.backbone.logit_scale}
    if classifier is _COSINES:
        rows = torch.cat([head.weight for head in objective.heads])
        return {"weight": F.normalize(rows, dim=1), "logit_scale": torch.tensor(objective.cosine, dtype=torch.float32)}
    return {name: torch.cat([getattr(head, name) for head in objective.heads]) for name in ("weight", "bias")}
