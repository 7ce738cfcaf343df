"""DualPrompt: a general prompt for all tasks, an expert prompt for each (Wang et al., ECCV 2022, arXiv:2204.04799).

Both are prefixes: keys and values that join those of an image in self-attention. G-prompts stand in the lowest blocks
and are trained by all tasks. E-prompts stand above them; each task has its own, with a key k_t. In training an image
takes its own task's, with loss - strength · cos(q, k_t), q being the pre-trained encoder's features; at test time it
takes the one whose key is nearest to its q. E-prompts and keys of former tasks are frozen.

Differs: every image chooses for itself at test time; published settings let the test batch vote, which
`batchwise=True` reproduces. Key and E-prompt of a task start from those of the last one (the official code has both as
options, and copies the prompt), so that a new task changes no answer yet; the first ones start from a normal
distribution of deviation 0.02 (published: uniform). Where a class is in several tasks, its images count as the latest
one's. Gradients are not clipped. Prompts of a text tower, chosen by what a text is, are ours: in training a text takes
its own task's where its class is known.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.prefix import Prefix, starting_prefix
from perdure.adapters.state import BufferDict
from perdure.backbones.base import OneTower, Tower, named_towers
from perdure.core.learner import Core
from perdure.mechanisms.prompting import PromptPool, QueriedPrompts, attach_prefix, first_blocks, nearest
from perdure.options.ranges import Factor, Length, Range, without_effect
from perdure.types import Batch, Task

_GENERAL, _EXPERT, _LENGTH = 2, 3, 5


class Prompts(PromptPool):
    """G-prompts of one tower, and the E-prompts and keys of all tasks.

    Args:
        shared: G-prompts (blocks, general_length, 2 · width); None for none.
        prompt: first E-prompt (blocks, length, 2 · width).
        dim: of a key.
        batchwise: at test time all inputs take the same E-prompt.
    """

    def __init__(self, shared: Tensor | None, prompt: Tensor, dim: int, batchwise: bool) -> None:
        super().__init__()
        self.general, self.expert, self.batchwise = Prefix(), Prefix(), batchwise
        self.shared = None if shared is None else nn.Parameter(shared)
        self.prompt = nn.Parameter(prompt)  # of the current task
        self.key = nn.Parameter(torch.empty(dim, dtype=torch.float32).normal_(std=0.02))  # of the current task
        self.past = BufferDict()  # "keys" (tasks, dim) and "prompts" (tasks, blocks, length, 2 · width) of former tasks
        self.register_buffer("owner", torch.empty(0, dtype=torch.int64), persistent=False)  # class -> task
        self.register_buffer("idle", torch.empty(0, dtype=torch.bool), persistent=False)  # tasks without inputs
        self.owner: Tensor
        self.idle: Tensor

    def put_away(self) -> None:
        """Keep key and E-prompt as those of a former task; their values go on."""
        for name, value in (("keys", self.key), ("prompts", self.prompt)):
            self.past.append(name, value[None])

    def know(self, owner: Mapping[int, int], tasks: int, names: bool) -> None:
        """Which of so many tasks each class belongs to, and whether the inputs are but the names of these classes."""
        self.owner = torch.tensor([owner.get(c, 0) for c in range(max(owner, default=-1) + 1)], dtype=torch.int64)
        self.idle = torch.tensor([names and task not in owner.values() for task in range(tasks)])

    @contextmanager
    def joining(self, asked: Tensor, labels: Tensor | None) -> Iterator[None]:
        """Within, inputs have the E-prompt of their own task where that is known, else the nearest."""
        chosen = (
            self.owner[labels]
            if labels is not None
            else nearest(self._cosines(asked).masked_fill(self.idle, -torch.inf), 1, self.batchwise)[:, 0]
        )
        prompts = self.prompt[None]
        if "prompts" in self.past:
            prompts = torch.cat([self.past["prompts"], prompts])
        general = () if self.shared is None else self.shared.unbind()
        with self.general.using(general), self.expert.using(prompts[chosen].unbind(1)):
            yield

    def nearness(self, asked: Tensor, labels: Tensor) -> Tensor:
        """Mean of cos(q, k) over inputs, k being the key of each one's own task."""
        return self._cosines(asked).gather(1, self.owner[labels, None]).mean()

    def _cosines(self, asked: Tensor) -> Tensor:
        """Of queries and the keys of all tasks, (B, tasks)."""
        keys = self.key[None]
        if "keys" in self.past:
            keys = torch.cat([self.past["keys"], keys])
        return asked @ F.normalize(keys, dim=1).T


class DualPrompt(QueriedPrompts[Prompts], name="dualprompt"):
    """General and expert prefixes, the latter chosen by the pre-trained encoder; the encoder stays as it is.

    Args:
        length: keys, and as many values, that an E-prompt has in each of its blocks.
        blocks: which blocks have E-prompts; None is the paper's "2-4", in a model of fewer blocks those above the
            G-prompts'.
        general_length: the same of the G-prompts; 0 for none; None is 5.
        general_blocks: which blocks have G-prompts; None is the paper's "0-1", in a model of fewer than 4 blocks "0".
        strength: weight of the pull of a task's key to its images' queries, positive.
        batchwise: at test time all images of a batch take the E-prompt that most of them chose, as in the published
            settings. Answers then depend on who else is asked about, and on test batches sorted by task it tells the
            task: for reproduction only, and of the vision tower only.
        tower: which encoder; each has prompts and keys of its own.
    """

    def __init__(
        self,
        length: Length = 5,
        blocks: str | None = None,
        general_length: Annotated[int, Range(0, 256)] | None = None,
        general_blocks: str | None = None,
        strength: Factor = 1.0,
        batchwise: bool = False,
        tower: Tower = "vision",
    ) -> None:
        super().__init__(tower)
        self.general_length = _LENGTH if general_length is None else general_length
        if not self.general_length:
            without_effect("with general_length=0", general_blocks=general_blocks)
        if tower == "text":
            without_effect("with tower='text'", batchwise=batchwise or None)
        self.length, self.blocks, self.general_blocks = length, blocks, general_blocks
        self.strength, self.batchwise = strength, batchwise
        self.trains_shared = self.general_length > 0

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The G-prompts."""
        return [own.shared for own in self.placed() if own.shared is not None] if self.towers else ()

    def grow(self, learner: Core, task: Task) -> None:
        """Prompts at the first task; then the last task's key and E-prompt are put away, and their values go on."""
        latest = {c: t.index for t in learner.tasks for c in t.classes}
        for tower in named_towers(self.tower):
            if tower in self.towers:
                self.of(tower).put_away()
            else:
                self.towers[tower] = self._place(learner, tower)
            # a name that several tasks have was last trained by the latest: the others' prompts have no texts left
            names = tower == "text" and "classes" in learner.objective.asks
            self.of(tower).know(latest, len(learner.tasks), names)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """-strength · mean of cos(q, k) over inputs, k being the key of each one's own task, added over towers."""
        return -self.strength * sum(own.nearness(asked, labels) for own, asked, labels in self.asked(learner, batch))

    def _place(self, learner: Core, tower: OneTower) -> Prompts:
        backbone = learner.backbone
        depth = len(backbone.blocks(tower))
        low = min(_GENERAL, depth // 2) if self.general_length else 0
        if not low and self.general_length:
            raise ValueError(f"{backbone.spec} has one block, G- and E-prompts need two: write general_length=0")
        general = self.general_blocks or first_blocks(backbone, 0, low or 1, tower)
        expert = self.blocks or first_blocks(backbone, min(_GENERAL, depth // 2), _EXPERT, tower)
        width, shared = 2 * backbone.sites("k", "0", tower)[0].fan_out, None
        if self.general_length:
            sites = backbone.sites("k", general, tower)
            if twice := {site.key for site in sites} & {site.key for site in backbone.sites("k", expert, tower)}:
                raise ValueError(
                    f"blocks={expert!r} and general_blocks={general!r} share {min(twice).rpartition(':')[0]}: E- and "
                    "G-prompts stand in different blocks; name others"
                )
            shared = starting_prefix(len(sites), self.general_length, width)
        prompt = starting_prefix(len(backbone.sites("k", expert, tower)), self.length, width)
        own = Prompts(shared, prompt, backbone.dim, self.batchwise and tower == "vision")
        if shared is not None:
            attach_prefix(learner, own.general, general, tower)
        attach_prefix(learner, own.expert, expert, tower)
        return own
