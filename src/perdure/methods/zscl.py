"""ZSCL (Zheng et al., ICCV 2023, arXiv:2303.06628): what a CLIP knew before it was taught stays, by distillation.

On reference images and reference texts, which need no labels and belong to no task,
loss + strength_image · T² · KL(p^teacher ‖ p^student), p the distribution of an image over texts, and the same with
`strength_text` for each text over images; + anchor · ‖θ - θ_{t-1}‖² (the paper's WC). The teacher is always the
pre-trained model, not the previous one. The paper's averaging of weights (WE) is `weight_average`.

Differs: the gradient reaches the text tower, as the paper has it; the published code compares the student's images with
the teacher's texts, which `text_gradient=False` reproduces. The reference is sampled once, and what the teacher makes
of it computed once; texts of a step are drawn anew, where the published code takes them all. By default there is no
reference set, but the task's own images and texts stand in for it: not as published, and better than nothing. No label
smoothing.
"""

from collections.abc import Sequence
from copy import copy, deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.injection import detach
from perdure.adapters.state import BufferDict
from perdure.backbones.base import Backbone
from perdure.core.learner import Core, derived_seed
from perdure.core.method import Method
from perdure.core.shared_copy import Constant
from perdure.mechanisms.distillation import check_moves, distillation
from perdure.mechanisms.references import read_references
from perdure.objectives.retrieve import picked
from perdure.options.ranges import Count, Factor, Strength, without_effect
from perdure.options.spec import parse_one
from perdure.streams import build_stream
from perdure.types import Batch, Task

_IMAGES, _CAPTIONS = "zscl/features", "zscl/captions"  # what the teacher says
_SIZE = 2000


class ZSCL(Method, name="zscl"):
    """Keeps scores of reference images and texts near what the pre-trained model gave them.

    The teacher is a second copy of the pre-trained model in memory, which is never saved.

    Args:
        reference: a stream, such as 'captions(path="...")', whose training images and captions (without captions:
            sentences with its class names) are the reference; None takes images and texts of the step itself.
        size: how many images of the reference are used, drawn at random; None is 2000.
        images: reference images in a step; None is as many as the batch has.
        texts: reference texts in a step; None is as many as there are images. With `text_gradient=False` always all.
        strength_image: weight of the distillation of images over texts.
        strength_text: weight of that of texts over images.
        temperature: T of both.
        anchor: weight of the squared distance of what tasks share to its values before the task; 0 leaves it out.
        text_gradient: False compares the student's images with the teacher's texts, as the published code does.
    """

    protects = "encoder"
    derived = ("_sentences",)

    def __init__(
        self,
        reference: str | None = None,
        size: Count | None = None,
        images: Count | None = None,
        texts: Count | None = None,
        strength_image: Strength = 1.0,
        strength_text: Strength = 1.0,
        temperature: Factor = 2.0,
        anchor: Strength = 1.0,
        text_gradient: bool = True,
    ) -> None:
        super().__init__()
        if not (strength_image or strength_text):
            without_effect(
                "with strength_image=0 and strength_text=0", reference=reference, text_gradient=text_gradient and None
            )
        if reference is None:
            without_effect("without a reference", size=size, images=images, texts=texts)
        if not text_gradient:
            without_effect("with text_gradient=False, which takes all texts", texts=texts)
        self.reference, self.size, self.images, self.texts = reference, size or _SIZE, images, texts
        self.strength_image, self.strength_text = strength_image, strength_text
        self.temperature, self.anchor, self.text_gradient = temperature, anchor, text_gradient
        self.anchors = BufferDict()  # name of a parameter of the learner -> its value before the task
        self._pretrained: Constant[Backbone] = Constant()  # in a list: it is no part of any state
        self._teacher: Constant[Core] = Constant()
        self._material: Constant[_Reference] = Constant()
        self._sentences: tuple[tuple[str, ...], list[str], Tensor] | None = None  # class names, in sentences, embedded

    @property
    def distils(self) -> bool:
        """Whether there is anything for a teacher to say."""
        return bool(self.strength_image or self.strength_text)

    def grow(self, learner: Core, task: Task) -> None:
        """Take a copy of the model before the first task: later it has been trained."""
        if "text" not in learner.objective.towers:
            raise ValueError(
                f"zscl keeps scores of images and texts, and {learner.objective.name} reads no texts: use --objective "
                "zeroshot or retrieve, or feature_distill"
            )
        if self.distils and learner.sharded:
            raise ValueError("zscl keeps a second copy of the encoder, which is not there with shard: leave one out")
        if self.distils and not self._pretrained:
            self._pretrained.append(deepcopy(learner.backbone))
            detach(self._pretrained[0])  # what other parts have put there

    def begin_task(self, learner: Core, task: Task) -> None:
        """Note what the anchor holds."""
        if self.anchor:
            for name, parameter in learner.shared().items():
                self.anchors[name] = parameter.contiguous()

    def check(self, learner: Core, task: Task) -> None:
        """Refuse what would have no effect; known when all parts have grown."""
        if self.distils or self.anchor:
            check_moves(learner, task, self)
        if not self.text_gradient and learner.constant_texts:
            raise ValueError(
                "text_gradient=False has no effect where no part trains the text tower: leave it out, or write "
                "tower='both' in the part that trains"
            )

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What the teacher makes of images, (B, dim), and of captions, (captions, dim) an image."""
        if not self.distils or self.reference is not None or not learner.training:
            return {}
        return self._said_of(learner, batch)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """Both distillations and the anchor."""
        total: Tensor | float = 0.0
        if self.distils:
            wanted, given = self._scores(learner, batch, features)
            if self.strength_image:
                total = total + self.strength_image * distillation(wanted, given, self.temperature)
            if self.strength_text:
                total = total + self.strength_text * distillation(wanted.T, given.T, self.temperature)
        if self.anchors:
            now = learner.trainable()
            ways = [now[name] - self.anchors[name] for name in sorted(self.anchors)]
            total = total + self.anchor * torch.stack([way.square().sum() for way in ways]).sum()
        return total

    def end_task(self, learner: Core, task: Task) -> None:
        """Let the old values go."""
        self.anchors.clear()

    def _scores(self, learner: Core, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of images and texts by teacher and student, each (images, texts)."""
        objective, labels = learner.objective, None
        if self.reference is not None:
            images, features, lines, texts = self._drawn(learner, len(batch["label"]))
        else:
            said = self._said_of(learner, batch)
            images = said[_IMAGES]
            if "captions" in objective.asks:
                lines, texts = [], picked(said[_CAPTIONS], objective.chosen(batch))
            else:
                lines, texts = self._names(learner)
                labels = torch.tensor(objective.classes, device=learner.device)
                labels = labels.repeat_interleave(len(lines) // len(labels))  # every template, name after name
        own = texts
        if self.text_gradient and not learner.constant_texts:
            if self.reference is None and "captions" in objective.asks:
                own = objective.shown(batch)[0]
            else:
                own = learner.embed_texts(lines, labels)
        return _similarity(learner, images, texts), _similarity(learner, features, own)

    def _drawn(self, learner: Core, count: int) -> tuple[Tensor, Tensor, list[str], Tensor]:
        """A step's reference: features by teacher and student, texts, and their embeddings by the teacher."""
        if not self._material:
            assert self.reference is not None
            self._material.append(_Reference(self.reference, self.size, learner, self._untaught(learner)))
        material, generator = self._material[0], learner.generator("zscl", learner.step)
        count = self.images or count
        rows = torch.randperm(len(material.features), generator=generator)[:count]
        features = learner.encode({"image": material.read(rows).to(learner.device)})
        lines, texts = material.lines, material.texts
        if self.text_gradient:
            chosen = torch.randperm(len(texts), generator=generator)[: self.texts or count]
            lines, texts = [lines[i] for i in chosen.tolist()], texts[chosen.to(learner.device)]
        return material.features[rows.to(learner.device)], features, lines, texts

    def _said_of(self, learner: Core, batch: Batch) -> Batch:
        """What the teacher makes of a step's own images and captions, see `precompute`."""
        if _IMAGES in batch:
            return {name: batch[name] for name in (_IMAGES, _CAPTIONS) if name in batch}
        teacher = self._untaught(learner)
        shown: Batch = {name: batch[name] for name in ("image", "features") if name in batch}
        with torch.no_grad():
            said: Batch = {_IMAGES: teacher.encode(shown)}
            if "captions" in learner.objective.asks:
                said[_CAPTIONS] = learner.objective.output(teacher, batch, "captions")
        return said

    def _names(self, learner: Core) -> tuple[list[str], Tensor]:
        """Sentences with the names of all classes seen, and what the teacher makes of them."""
        names = learner.objective.names
        if self._sentences is None or self._sentences[0] != names:
            lines = _sentences(names, learner)
            with torch.no_grad():
                self._sentences = names, lines, self._untaught(learner).embed_texts(lines)
        return self._sentences[1:]

    def _untaught(self, learner: Core) -> Core:
        """The teacher: the pre-trained model as a learner that was never taught."""
        if not self._teacher:
            objective = copy(learner.objective)
            teacher = Core(self._pretrained[0].to(learner.device), objective, Method(), seed=learner.seed)
            teacher.processes = learner.processes
            self._teacher.append(teacher)
        return self._teacher[0]


class _Reference:
    """A sample of a stream's training images and of their texts, and what `teacher` makes of them.

    Raises:
        ValueError: when the stream cannot be built, or is empty.
    """

    def __init__(self, text: str, size: int, learner: Core, teacher: Core) -> None:
        written = {name for name, _ in parse_one(text).kwargs}
        whole = {} if written & {"tasks", "increments", "scenario"} else {"tasks": 1}
        stream = build_stream(text, learner.backbone.preprocess, 0, False, **whole)
        self.tasks = list(stream.tasks)
        places = torch.tensor([(t.index, i) for t in self.tasks for i in range(len(t.train))], dtype=torch.int64)
        if not len(places):
            raise ValueError(f"reference={text!r} has no training images: give another")
        generator = torch.Generator().manual_seed(derived_seed(learner.seed, 0, "zscl reference"))
        self.places = places[torch.randperm(len(places), generator=generator)[:size].sort().values]
        images: list[Tensor] = []
        captions: list[str] = []
        with torch.no_grad():
            for some in torch.split(self.places, 64):
                batch = read_references(self.tasks, some)
                images.append(teacher.encode({"image": batch["image"].to(learner.device)}))
                if "text" in batch:
                    captions += [text for each in batch["text"] for text in each]
            names = list(dict.fromkeys(name for task in self.tasks for name in task.names))
            self.lines = captions or _sentences(names, learner)
            starts = range(0, len(self.lines), 256)
            self.texts = torch.cat([teacher.embed_texts(self.lines[start : start + 256]) for start in starts])
            self.features = torch.cat(images)

    def read(self, rows: Tensor) -> Tensor:
        """Images (n, 3, S, S) of `rows` (n,)."""
        images: Tensor = read_references(self.tasks, self.places[rows])["image"]
        return images


def _similarity(learner: Core, images: Tensor, texts: Tensor) -> Tensor:
    """Scaled cosines (images, texts)."""
    return learner.backbone.logit_scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def _sentences(names: Sequence[str], learner: Core) -> list[str]:
    """Every template with every name."""
    return [template.format(name) for name in names for template in learner.objective.templates]
