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

import torch
from torch import Tensor

from perdure.adapters.head_gates import HardConcrete, HeadGates
from perdure.backbones.base import OneTower
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.prompting import check_routes_once
from perdure.mechanisms.task_experts import ExpertTower, TaskExperts
from perdure.options.ranges import Factor, Strength
from perdure.types import Batch, Task


class SparseHeads(TaskExperts, name="head_gates"):
    """Gates of attention heads, a set a task, sparse and frozen afterwards; each example takes those of its task.

    Args:
        strength: weight of the share of heads that are open; more closes more.
        blocks: which blocks, all by default.
        tower: where; None is `language` in a language model, else `vision`.
        gates_lr: learning rate of the gates, as a factor of the run's: log α has to go a long way.
    """

    fallback = True

    def __init__(
        self,
        strength: Strength = 0.3,
        blocks: str | None = None,
        tower: ExpertTower | None = None,
        gates_lr: Factor = 50.0,
    ) -> None:
        super().__init__(TaskGaussians(), tower, blocks, at="o")
        self.strength, self.gates_lr = strength, gates_lr

    def grow(self, learner: Core, task: Task) -> None:
        """New gates."""
        check_routes_once(learner, self)
        super().grow(learner, task)

    def place(self, learner: Core, tower: OneTower) -> None:
        """One set of gates for all chosen blocks."""
        gates = HeadGates()
        gates.attach(learner.backbone, learner.backbone.sites(self.at, self.blocks, tower))
        self.experts.append(gates)

    @property
    def gates(self) -> HeadGates:
        """Those of all tasks."""
        found = self.experts[0]
        assert isinstance(found, HeadGates)
        return found

    def param_groups(self, learner: Core) -> dict[str, float]:
        """Faster gates."""
        mine = {id(p) for p in self.parameters()}
        return {name: self.gates_lr for name, p in learner.trainable().items() if id(p) in mine}

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · mean P(g ≠ 0)."""
        log_alpha = self.gates.log_alpha
        return 0.0 if log_alpha is None else self.strength * HardConcrete.open(log_alpha).mean()

    def applied(self, learner: Core, batch: Batch, tower: str) -> AbstractContextManager[None]:
        """Within, heads have gates: those in training drawn anew for each step, else by each example's task."""
        log_alpha = self.gates.log_alpha
        if not learner.training or log_alpha is None:
            return super().applied(learner, batch, tower)
        uniform = torch.rand(
            log_alpha.shape, generator=learner.generator("head_gates", learner.step), dtype=torch.float32
        ).clamp(1e-6, 1 - 1e-6)
        return self.gates.using(HardConcrete.draw(log_alpha, uniform.to(learner.device)).unsqueeze(1))

    def answering(self, learner: Core, batch: Batch) -> AbstractContextManager[None]:
        """Within, each example has the gates of its task."""
        return self.gates.using(self.gates.of_tasks(self.routes(learner, batch)))

    def measures(self, learner: Core) -> dict[str, float]:
        """Who finds its own gates; the share of heads that a task leaves open, as a mean, and that any task does."""
        every = torch.stack(list(self.gates.closed.values())) > 0
        opened = {"heads_open": float(every.float().mean()), "heads_open_of_any": float(every.any(0).float().mean())}
        return {**super().measures(learner), **opened}
