"""Classification by class names: the text tower's embeddings are the classifier (CLIP; Radford et al., ICML 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.objective import COSINES, TEMPLATE, Head, Objective, task_accuracies
from perdure.options.ranges import checked
from perdure.types import Batch, Task


class ZeroShot(Objective, name="zeroshot"):
    """Cosine to the class names' text embeddings, times the model's frozen logit scale.

    A class's embedding is the normalised mean over templates of normalised embeddings. While the text tower is neither
    trained nor adapted they are computed once per task.

    Args:
        templates: one or several sentences with `{}` for the class name.
    """

    towers = frozenset({"vision", "text"})
    open_vocabulary = True

    @checked
    def __init__(self, templates: str | Sequence[str] = TEMPLATE) -> None:
        super().__init__()
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no {{}} for the class name; write 'a photo of a {{}}.'")
        self._known: Tensor | None = None

    def grow(self, learner: Core, task: Task) -> None:
        """Remember the class names."""
        super().grow(learner, task)
        self._known = None

    def forget(self, left: Forgotten) -> dict[str, tuple[str, Tensor]]:
        """See `Objective.forget`."""
        self._known = None
        return super().forget(left)

    def refresh(self) -> None:
        """Forget the class embeddings when the text tower may have changed."""
        if self._learner and not self._learner[0].constant_texts:
            self._known = None

    def embed(self, names: Sequence[str], classes: Sequence[int] | None = None) -> Tensor:
        """Unit-length embeddings (n, dim) of class names; `classes` says which they are, where that is known."""
        return class_texts(self._learner[0], names, self.templates, classes)

    def scores(self, features: Tensor) -> Tensor:
        """Scaled cosines (R, seen classes)."""
        return self.similarity(features, self._classes())

    def task_scores(self, features: Tensor) -> Tensor:
        """Scaled cosines (R, classes of the current task); a text tower that learns reads no other names."""
        if self._learner[0].constant_texts or torch.is_inference_mode_enabled():
            return super().task_scores(features)
        names, classes = zip(*((self.names[i], self.classes[i]) for i in self.task_columns), strict=True)
        return self.similarity(features, self.embed(names, classes))

    def similarity(self, features: Tensor, classes: Tensor) -> Tensor:
        """Scaled cosines (R, n) of image features to `classes` (n, dim)."""
        scale: Tensor = self._learner[0].backbone.logit_scale
        return scale * F.normalize(features, dim=1) @ classes.T

    def distributions(self, features: Tensor | None, batch: Batch, old: bool = False) -> list[Tensor]:
        """See `Objective.distributions`; the last one is of each class name over the batch's images."""
        scores = batch["scores"] if features is None else self.scores(features)
        every = sorted({column for each in self.former for column in each})
        over_images = scores[:, every].T if old else scores.T
        return [*super().distributions(None, {"scores": scores}, old), over_images]

    def head(self, learner: Core) -> Head:
        """The embeddings of the class names."""
        what = "cosine to the class names' text embeddings (rows of `weight`, of unit length), times `logit_scale`"
        return Head(what, COSINES, {"weight": self.embed(self.names), "logit_scale": learner.backbone.logit_scale})

    def texts(self, learner: Core, batch: Batch) -> tuple[list[str], Tensor]:
        """The class names of the task, in all templates."""
        task, templates = learner.task, self.templates
        texts = [template.format(name) for template in templates for name in task.names]
        return texts, torch.tensor(task.classes, device=learner.device).repeat(len(templates))

    def evaluate(self, learner: Core, tasks: Sequence[Task], size: int = 256) -> list[dict[str, float]]:
        """See `Objective.evaluate`; a task not learnt yet is named by itself, beside what was learnt."""
        learnt = [task for task in tasks if set(task.classes) <= set(self.classes)]
        found = iter(super().evaluate(learner, learnt, size) if learnt else ())
        return [next(found) if task in learnt else self._unlearnt(learner, task, size) for task in tasks]

    def _unlearnt(self, learner: Core, task: Task, size: int) -> dict[str, float]:
        fresh = [(c, n) for c, n in zip(task.classes, task.names, strict=True) if c not in self.classes]
        classes, names = (*self.classes, *(c for c, _ in fresh)), (*self.names, *(n for _, n in fresh))
        if learner.scenario == "task":
            classes, names = task.classes, task.names
        with learner.inference():
            features, _ = learner.features(learner.cache.test(task.test), size)
            scores = self.similarity(features, self.embed(names)).cpu()
        first = {**dict.fromkeys(task.classes, task.index), **learner.stream.first_task()}
        return task_accuracies(learner, task, scores, set(classes), classes, first)

    def _classes(self) -> Tensor:
        if self._known is not None and (self._learner[0].constant_texts or torch.is_inference_mode_enabled()):
            return self._known
        if self._learner[0].constant_texts:
            with torch.no_grad(), torch.inference_mode(False):
                self._known = self.embed(self.names)
            return self._known
        fresh = self.embed(self.names, self.classes)
        self._known = fresh if torch.is_inference_mode_enabled() else None
        return fresh


def class_texts(
    learner: Core,
    names: Sequence[str],
    templates: Sequence[str],
    classes: Sequence[int] | None = None,
    task: Task | None = None,
) -> Tensor:
    """Unit-length embeddings (n, dim): the normalised mean over templates of normalised embeddings.

    Args:
        learner: who reads.
        names: of classes.
        templates: sentences with `{}` for a name.
        classes: which those names are of, where that is known.
        task: which they belong to, where that is known.
    """
    labels = None if classes is None else torch.tensor(classes, device=learner.device)
    per_template = []
    for template in templates:
        text = learner.embed_texts([template.format(name) for name in names], labels, task)
        per_template.append(F.normalize(text, dim=1))
    return F.normalize(torch.stack(per_template).mean(0), dim=1)
