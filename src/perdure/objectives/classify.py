"""Classification by a head per task: linear, or by cosines, as LUCIR's (Hou et al., CVPR 2019).

A cosine head may start from class names as in Wortsman et al., *Robust fine-tuning of zero-shot models* (WiSE-FT), CVPR
2022, arXiv:2109.01903: its rows are their text embeddings, so before any training it answers as CLIP does without
examples. Differs: the scale of the cosines is fixed, LUCIR learns it.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.objective import COSINES, TEMPLATE, Head, Objective
from perdure.options.ranges import Factor, checked, without_effect
from perdure.types import Task

_SCALE = 10.0


class Classify(Objective, name="classify"):
    """One linear layer with bias for the classes that a task brings; prediction concatenates them.

    A head is trained while its classes are part of the current task: in a domain-incremental stream the first task's
    head goes on learning.

    Args:
        cosine: score by the scaled cosine of feature and row, without bias: no class wins by the length of its row.
        init: rows of cosine heads at `random`, or `zeroshot`: the text embeddings of the class names, for CLIP-like
            backbones.
        scale: factor of the cosines; None is 10, with `zeroshot` the model's own logit scale.
        template: with `zeroshot`, a sentence with `{}` for the class name; None is "a photo of a {}.".
    """

    @checked
    def __init__(
        self,
        cosine: bool = False,
        init: Literal["random", "zeroshot"] = "random",
        scale: Factor | None = None,
        template: str | None = None,
    ) -> None:
        super().__init__()
        named = init == "zeroshot"
        if not cosine:
            without_effect("without cosine=True", init=init if named else None, scale=scale, template=template)
        if not named:
            without_effect("with init='random'", template=template)
        self.template = TEMPLATE if template is None else template
        if "{}" not in self.template:
            raise ValueError(f"template={template!r} has no {{}} for the class name; write {TEMPLATE!r}")
        self.cosine, self.named, self.scale = cosine, named, _SCALE if scale is None and not named else scale
        self.linear = not cosine
        self.heads = nn.ModuleList()

    def grow(self, learner: Core, task: Task) -> None:
        """A head for the classes that are new; the heads of the task's classes are trained, the others frozen."""
        if self.named and "text" not in learner.backbone.towers():
            raise ValueError(
                f"classify(init='zeroshot') needs a text tower, which {learner.backbone.spec} lacks: use "
                "clip(path=...) or pocket(), or init='random'"
            )
        before = len(self.classes)
        super().grow(learner, task)
        if len(self.classes) > before:
            self.heads.append(nn.Linear(learner.backbone.dim, len(self.classes) - before, dtype=torch.float32))
        owners = torch.repeat_interleave(torch.tensor([h.out_features for h in self.linears()], dtype=torch.int64))
        current = set(owners[list(self.task_columns)].tolist())
        for index, head in enumerate(self.heads):
            head.requires_grad_(index in current)

    def grown(self, learner: Core) -> None:
        """Take a new cosine head's bias away and set its rows, after all that the method draws at random."""
        if not self.cosine or not self.heads or (head := self.linears()[-1]).bias is None:  # no class is new
            return
        if self.scale is None:
            self.scale = float(learner.backbone.logit_scale)
        head.register_parameter("bias", None)
        with torch.no_grad():
            rows = torch.randn_like(head.weight)
            if self.named:
                texts = [self.template.format(name) for name in self.names[-head.out_features :]]
                with learner.computing():
                    rows = learner.backbone.encode_text(texts).float()
            head.weight.copy_(F.normalize(rows, dim=1))

    @torch.no_grad()
    def forget(self, left: Forgotten) -> dict[str, tuple[str, Tensor]]:
        """See `Objective.forget`; a head without a class is no head any more."""
        super().forget(left)
        renamed: dict[str, tuple[str, Tensor]] = {}
        heads, start = nn.ModuleList(), 0
        for number, head in enumerate(self.linears()):
            own = left.columns[(left.columns >= start) & (left.columns < start + head.out_features)] - start
            start += head.out_features
            for name, parameter in list(head.named_parameters()):
                renamed[f"objective.heads.{number}.{name}"] = f"objective.heads.{len(heads)}.{name}", own
                rows = parameter[own.to(parameter.device)].clone()
                setattr(head, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
            head.out_features = len(own)
            if len(own):
                heads.append(head)
        self.heads = heads
        return renamed

    def linears(self) -> list[nn.Linear]:
        """The heads, in the order of the columns."""
        return [head for head in self.heads if isinstance(head, nn.Linear)]

    def scores(self, features: Tensor) -> Tensor:
        """Logits (R, seen classes)."""
        return self._logits(features, self.linears())

    def task_scores(self, features: Tensor) -> Tensor:
        """Logits (R, classes of the current task); a step costs no more the more heads there are."""
        heads, columns, before, start = [], [], 0, 0
        for head in self.linears():
            mine = [before + c - start for c in self.task_columns if start <= c < start + head.out_features]
            start += head.out_features
            if mine:
                heads.append(head)
                columns += mine
                before += head.out_features
        logits = self._logits(features, heads)
        return logits if len(columns) == before else logits[:, columns]

    @torch.no_grad()
    def assign(self, columns: Tensor, weight: Tensor, bias: Tensor) -> None:
        """See `Objective.assign`."""
        row = {column: i for i, column in enumerate(columns.tolist())}
        places = [(head, own) for head in self.linears() for own in range(head.out_features)]
        for column, (head, own) in enumerate(places):
            if column in row:
                head.weight[own], head.bias[own] = weight[row[column]], bias[row[column]]

    def head(self, learner: Core) -> Head:
        """The rows of all tasks' heads."""
        rows = torch.cat([head.weight for head in self.linears()])
        if not self.cosine:
            bias = torch.cat([head.bias for head in self.linears()])
            scores = 'features @ head["weight"].T + head["bias"]'
            return Head("a linear layer on the features", scores, {"weight": rows, "bias": bias})
        scale = torch.tensor(self.scale, dtype=torch.float32)
        what = "cosine to rows of `weight` (of unit length), times `logit_scale`"
        return Head(what, COSINES, {"weight": F.normalize(rows, dim=1), "logit_scale": scale})

    def _logits(self, features: Tensor, heads: list[nn.Linear]) -> Tensor:
        if self.cosine:
            assert self.scale is not None
            rows = torch.cat([head.weight for head in heads])
            return self.scale * F.normalize(features, dim=1) @ F.normalize(rows, dim=1).T
        return torch.cat([head(features) for head in heads], dim=1)
