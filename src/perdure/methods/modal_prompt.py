"""ModalPrompt: prompt tokens a task, of which an example takes those that its image and words are like.

Zeng et al., EMNLP 2025, arXiv:2410.05849. `grow` gives the task m prompt tokens and a small network (two layers with a
SiLU between) that takes them to where features of images and words are; the mean of what it gives is the prompt's
prototype. `penalty`: strength · Σ (1 − cos(feature, prototype)) over image and words. `end_task` keeps tokens and
prototype; the network has done its work. `applied`: in training the task's own tokens stand in front of an example,
else those of the task with the largest guide, the mean of the cosines of image and words to its prototype.

Differs: the published code makes the tokens words of a vocabulary that knows all tasks before the first. It keeps the
networks and computes prototypes anew for every question. Features are those the untouched model is given, not those
of a CLIP beside it; a conversation without an image is guided by its words. Prompts of former tasks are not joined to
those in training (the paper's fusion; its number of prompts that are taken is 1 in the code). In front of all tokens,
not behind the first. In the vision tower of a ViT or CLIP, guided by the image alone, it is ours.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import starting_rows
from perdure.adapters.prompt_tokens import RoutedPrompts
from perdure.adapters.state import BufferDict, ParameterStore
from perdure.backbones.base import OneTower
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskMeans
from perdure.mechanisms.prompting import QUERY, check_routes_once, check_tokens
from perdure.mechanisms.task_experts import ExpertTower, TaskExperts
from perdure.options.ranges import Length, Strength
from perdure.types import Batch, Task


class TaskPrompts(RoutedPrompts):
    """Prompt tokens a task, of which some are given for a while.

    Args:
        m: tokens of a task.
        width: of the tower.
        features: width of what prototypes are compared with.
    """

    def __init__(self, m: int, width: int, features: int) -> None:
        super().__init__()
        self.m, self.width, self.features = m, width, features
        self.open, self.closed = ParameterStore(), BufferDict()  # "tokens", ...; "3" of task 3

    def start(self, device: torch.device, former: int = 0) -> None:
        """Tokens for a new task and their network, in the place of those that may be open."""
        tokens = torch.empty(self.m, self.width, dtype=torch.float32).normal_(std=0.02)
        first, second = starting_rows(self.width, self.width), starting_rows(self.features, self.width)
        for name, value in zip(("tokens", "first", "second"), (tokens, first, second), strict=True):
            self.open.put(name, value.to(device))

    def prototype(self) -> Tensor:
        """Where the open tokens stand among features, (features,)."""
        hidden = F.silu(F.linear(self.open["tokens"], self.open["first"]))
        return F.linear(hidden, self.open["second"]).mean(0)

    def close(self, task: int) -> None:
        """Keep the open tokens as those of `task`."""
        tokens = self.open["tokens"].detach()
        for name in self.open.names:
            self.open.take(name)
        self.closed[str(task)] = tokens


class ModalPrompt(TaskExperts, name="modal_prompt"):
    """Prompt tokens for each task, trained by it alone, and a prototype by which an example finds its own.

    Args:
        tokens: of a task.
        tower: where prompts stand; None is `language` in a language model, else `vision`.
        strength: weight of the loss that draws a prototype to its task's images and words.
    """

    router: TaskMeans

    def __init__(self, tokens: Length = 10, tower: ExpertTower | None = None, strength: Strength = 1.0) -> None:
        super().__init__(TaskMeans(1.0), tower)
        self.tokens, self.strength = tokens, strength

    def place(self, learner: Core, tower: OneTower) -> None:
        """Prompts that pass through all blocks of `tower`."""
        backbone = learner.backbone
        self.router.kinds = 2 if tower == "language" else 1
        prompts = TaskPrompts(self.tokens, backbone.sites("q", "0", tower)[0].fan_in, backbone.dim)
        prompts.attach([backbone.get_submodule(name) for name in backbone.blocks(tower)], tower)
        self.experts.append(prompts)
        with prompts.using(torch.zeros(self.tokens, prompts.width, device=learner.device)):
            check_tokens(learner, tower)

    def grow(self, learner: Core, task: Task) -> None:
        """New tokens, and the network that says where they stand."""
        check_routes_once(learner, self)
        super().grow(learner, task)

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What prompts are compared with, in training too."""
        return {QUERY: self.query(learner, batch)}

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """How far the prototype is from the batch's images, and from its words."""
        if not self.strength:
            return 0.0
        prototype = F.normalize(self._prompts.prototype(), dim=0)
        kinds = self.query(learner, batch).chunk(self.router.kinds, dim=1)
        return self.strength * torch.stack([(1 - kind @ prototype).mean() for kind in kinds]).sum()

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, each example has its prompt; in training all have the one that learns."""
        if learner.training and "tokens" in self._prompts.open:
            return self._prompts.using(self._prompts.open["tokens"][:])  # a view: no parameter of a second name
        return super().applied(learner, batch, tower)

    def answering(self, learner: Core, batch: Batch) -> AbstractContextManager[None]:
        """Within, each example has the prompt of the task whose prototype it is most like."""
        closed = self._prompts.closed
        return self._prompts.using(torch.stack([closed[str(task)] for task in self.routes(learner, batch).tolist()]))

    def end_task(self, learner: Core, task: Task) -> None:
        """Keep the tokens, and the prototype beside those of other tasks."""
        prototype = self._prompts.prototype().detach().repeat(self.router.kinds)
        self.router.means[str(task.index)] = prototype
        for expert in self.experts:
            expert.close(task.index)

    @property
    def _prompts(self) -> TaskPrompts:
        prompts: nn.Module = self.experts[0]
        assert isinstance(prompts, TaskPrompts)
        return prompts
