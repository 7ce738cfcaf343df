"""Cosine heads, at random or from class names: LUCIR's classifier (Hou et al., CVPR 2019), WiSE-FT's initialisation.

Wortsman et al., CVPR 2022, arXiv:2109.01903: a head whose rows are the class names' text embeddings answers, before any
training, as CLIP does without examples.

Differs: the scale is fixed, not learnt (LUCIR learns it).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.objectives.classify import Classify
from perdure.options.ranges import Factor, without_effect
from perdure.types import Task

_SCALE, _TEMPLATE = 10.0, "a photo of a {}."


class Cosine(Method, name="cosine"):
    """Heads score by the scaled cosine of feature and row, without bias: no class wins by the length of its row.

    Args:
        init: rows at `random`, or `zeroshot`: the text embeddings of the class names, for CLIP-like backbones.
        scale: factor of the cosines; None is 10, with `zeroshot` the model's own logit scale.
        template: with `zeroshot`, a sentence with `{}` for the class name; None is "a photo of a {}.".
    """

    classifies = True

    def __init__(
        self,
        init: Literal["random", "zeroshot"] = "random",
        scale: Factor | None = None,
        template: str | None = None,
    ) -> None:
        super().__init__()
        if init == "random":
            without_effect("with init='random'", template=template)
        self.template = _TEMPLATE if template is None else template
        if "{}" not in self.template:
            raise ValueError(f"template={template!r} has no {{}} for the class name; write {_TEMPLATE!r}")
        self.init, self.scale = init, scale

    def grow(self, learner: Core, task: Task) -> None:
        """Take the new head's bias away and set its rows."""
        objective = learner.objective
        if not isinstance(objective, Classify):
            raise ValueError(
                "cosine changes the heads of classify, and this objective has none: use --objective classify, or "
                "leave cosine out"
            )
        if self.init == "zeroshot" and "text" not in learner.backbone.towers():
            raise ValueError(
                f"cosine(init='zeroshot') needs a text tower, which {learner.backbone.spec} lacks: use clip(path=...) "
                "or pocket(), or init='random'"
            )
        objective.cosine = self._scale(learner)
        head = objective.linears()[-1]
        if "bias" not in dict(head.named_parameters()):  # no class is new
            return
        head.register_parameter("bias", None)
        with torch.no_grad():
            names = objective.names[-head.out_features :]
            rows = torch.randn_like(head.weight) if self.init == "random" else self._embed(learner, names)
            head.weight.copy_(F.normalize(rows, dim=1))

    def _scale(self, learner: Core) -> float:
        if self.scale is not None:
            return self.scale
        return _SCALE if self.init == "random" else float(learner.backbone.logit_scale)

    def _embed(self, learner: Core, names: tuple[str, ...]) -> Tensor:
        with learner.computing():
            return learner.backbone.encode_text([self.template.format(name) for name in names]).float()
