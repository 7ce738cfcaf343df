"""A sparse set of attention heads for each task, which nobody changes afterwards.

Ours, of published parts: a task's mask over a frozen network is Piggyback's (Mallya et al., ECCV 2018,
arXiv:1801.06519), gates of whole heads are Voita et al.'s (ACL 2019, arXiv:1905.09418), their distribution and the
penalty are Louizos et al.'s (ICLR 2018, arXiv:1712.01312).

Heads of block l are summed up as Σ_h g_lh · head_lh W_lh. `penalty` is strength · the mean over all heads of
P(g_lh ≠ 0); `applied` draws the gates in training. `end_task` settles and freezes them, and fits a Gaussian to what the
untouched model makes of the task's examples; then every example has the gates of the task that knows it best.

Differs: Piggyback is told the task and masks single weights, Voita et al. prune one model for one task. Here all gates
start open, so that a task begins with the pre-trained model.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from perdure.adapters.head_gates import HardConcrete, HeadGates
from perdure.adapters.state import BufferDict, ParameterStore
from perdure.core.learner import Core
from perdure.core.method import Method, parts_of
from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.prompting import QUERY, conversation_query, query
from perdure.options.ranges import Factor, Strength
from perdure.types import Batch, Task

_OPEN = 3.0  # log α of a gate that is 1 at test time, and in two steps of three
_GATES = "log_alpha"
_LOOK = 4096  # examples of a task that its Gaussian is fitted to
_DIRECTIONS, _KNOWN = 16, 0.99


class SparseHeads(Method, name="head_gates"):
    """Gates of attention heads, a set a task, sparse and frozen afterwards; each example takes those of its task.

    Args:
        strength: weight of the share of heads that are open; more closes more.
        blocks: which blocks, all by default.
        tower: where; None is `language` in a language model, else `vision`.
        gates_lr: learning rate of the gates, as a factor of the run's: log α has to go a long way.
    """

    changes_encoder, sole_adapter, follows_task = True, True, True

    def __init__(
        self,
        strength: Strength = 0.3,
        blocks: str | None = None,
        tower: Literal["language", "vision"] | None = None,
        gates_lr: Factor = 50.0,
    ) -> None:
        super().__init__()
        self.strength, self.blocks, self.tower, self.gates_lr = strength, blocks, tower, gates_lr
        self.treats = frozenset({tower} if tower else {"language", "vision"})
        self.gates = HeadGates()
        self.learnt, self.fixed = ParameterStore(), BufferDict()  # log α; by task the gates (blocks, heads)
        self.router = TaskGaussians(_DIRECTIONS, _KNOWN)
        self._shape: tuple[int, int] = (0, 0)  # blocks, heads

    def grow(self, learner: Core, task: Task) -> None:
        """New gates, all open."""
        talks = "conversations" in learner.objective.asks
        tower = self.tower or ("language" if talks else "vision")
        if talks != (tower == "language"):
            wanted = "language" if talks else "vision"
            raise ValueError(f"head_gates(tower={tower!r}): each example has gates in the {wanted} tower alone")
        self.treats = frozenset({tower})
        if not self._shape[0]:
            outs = learner.backbone.sites("o", self.blocks, tower)
            self._shape = len(outs), self.gates.attach(learner.backbone, outs)
        self.learnt.put(_GATES, torch.full(self._shape, _OPEN, dtype=torch.float32, device=learner.device))

    def check(self, learner: Core, task: Task) -> None:
        """Refuse parts that bring examples of old tasks, whose gates are frozen."""
        if others := [part.name for part in parts_of(learner.method) if part.rehearses]:
            raise ValueError(
                f"{others[0]} has no effect beside head_gates, whose gates learn from their own task: leave it out"
            )

    def precompute(self, learner: Core, batch: Batch) -> Batch:
        """What tells the task; nobody asks it in training."""
        return {} if learner.training else {QUERY: self._query(learner, batch)}

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Faster gates."""
        return {name: self.gates_lr for name in learner.trainable() if name.endswith(f"learnt.{_GATES}")}

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · mean P(g ≠ 0)."""
        if _GATES not in self.learnt:
            return 0.0
        return self.strength * HardConcrete.open(self.learnt[_GATES]).mean()

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, heads have gates: those in training drawn anew for each step, else by each example's task."""
        if learner.training and _GATES in self.learnt:
            draw = torch.rand(self._shape, generator=learner.generator("head_gates", learner.step), dtype=torch.float32)
            uniform = draw.clamp(1e-6, 1 - 1e-6).to(learner.device)
            return self.gates.using(HardConcrete.draw(self.learnt[_GATES], uniform).unsqueeze(1))
        return self.gates.using(self._table(learner.device)[:, self._places(learner, batch)])

    def end_task(self, learner: Core, task: Task) -> None:
        """Settle and freeze the gates, and learn to tell the task's examples."""
        data = learner.method.data(learner, task)
        order = torch.randperm(len(data), generator=learner.generator("head_gates"))[:_LOOK]
        with learner.inference():
            asked = torch.cat([self._query(learner, batch) for batch in learner.batches(data, 64, order)])
        labels = data.labels[order.to(data.labels.device)].to(asked.device)
        self.router.add(task.index, asked.clone(), labels, learner.generator("head_gates router"))
        value = self.learnt.take(_GATES)
        assert value is not None
        self.fixed[str(task.index)] = HardConcrete.settled(value)

    def measures(self, learner: Core) -> dict[str, float]:
        """Share of heads that a task leaves open, as a mean over tasks, and that any task does."""
        every = torch.stack(list(self.fixed.values())) > 0
        return {"heads_open": float(every.float().mean()), "heads_open_of_any": float(every.any(0).float().mean())}

    def _table(self, device: torch.device) -> Tensor:
        """Gates (blocks, tasks + 1, heads); the last row is of examples that no task knows."""
        rows = [self.fixed[str(task)] for task in self.router.tasks]
        return torch.stack([*rows, torch.ones(self._shape, dtype=torch.float32, device=device)], dim=1)

    def _places(self, learner: Core, batch: Batch) -> Tensor:
        """Row of each example in the table, int64 (B,); the task that is told under "task" goes first."""
        tasks = self.router.tasks
        if "task" in batch:
            return torch.searchsorted(torch.tensor(tasks, device=learner.device), batch["task"])
        route = self.router.route(self._query(learner, batch))
        return torch.where(route < 0, len(tasks), route)

    def _query(self, learner: Core, batch: Batch) -> Tensor:
        """Unit features of the untouched model (B, dim), or what it is given of conversations."""
        talks = "conversations" in learner.objective.asks
        return conversation_query(learner, batch) if talks else query(learner, batch)
