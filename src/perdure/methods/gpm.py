"""Gradient projection memory (Saha et al., ICLR 2021, arXiv:2103.09762): weights move where old inputs do not reach.

A linear layer's update ΔW changes nothing on inputs x with ΔW x = 0. `end_task` takes the leading directions M of each
layer's inputs (algorithm 1); `after_backward` keeps the gradient out of them, g - g M Mᵀ, and `after_step` the step:
what Adam's element-wise scaling puts back is taken out again, W ← W₀ + (W - W₀)(I - M Mᵀ) with W₀ the weight at the
task's start.

Differs: for pre-trained transformers: the weights of the chosen layers are trained, and biases, norms and embeddings
stay frozen, since they have no input space to protect; q, k and v, which read the same input, share M; the step is
projected, so that the protection does not depend on the optimizer; second moments and DualGPM's smaller basis instead
of an SVD of stacked inputs; `keep` rises linearly to 1 over a known number of tasks (the paper raises it by hand).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perdure.adapters.state import BufferDict
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.moments import check_sketch, second_moments
from perdure.mechanisms.subspace import SubspaceMemory, check_balance, keep_schedule
from perdure.options.ranges import Count, Factor, Rank, Share
from perdure.types import Batch, Site, Task


class GPM(Method, name="gpm"):
    """Trains the weights of linear layers in the directions that former tasks' inputs leave free.

    Args:
        at: which layers, see `Backbone.sites`.
        blocks: which blocks, all by default.
        tower: which encoder.
        backbone_lr: learning rate of the weights as a factor of the run's, as in `finetune`.
        keep: share of the old inputs' energy to protect (the paper's threshold), in (0, 1].
        power: of the second moments of which directions and energy are taken: 1 as in the paper, 2 as in InfLoRA's
            code, where the same `keep` takes far fewer directions.
        schedule: `linear` raises `keep` to 1 over a known number of tasks; `fixed`, and an open end, hold it.
        moments: number of training images that second moments are taken from.
        balance: share of a language model's image tokens in them, see `inflora`.
        sketch: directions kept of those of layers wider than 4,096, see `inflora`.
    """

    changes_encoder = True
    trains_shared = True
    sole_adapter = True

    def __init__(
        self,
        at: str = "qkvo,mlp",
        blocks: str | None = None,
        tower: Tower = "vision",
        backbone_lr: Factor = 0.1,
        keep: Share = 0.97,
        power: Literal[1, 2] = 1,
        schedule: Literal["linear", "fixed"] = "linear",
        moments: Count = 512,
        balance: Share | None = None,
        sketch: Rank | None = None,
    ) -> None:
        super().__init__()
        self.at, self.blocks, self.tower, self.backbone_lr = at, blocks, tower, backbone_lr
        self.keep, self.power, self.schedule, self.moments = keep, power, schedule, moments
        self.balance, self.sketch = balance, sketch
        self.subspaces = SubspaceMemory()  # of each input
        self.start = BufferDict()  # layer -> its weight before the task, where a step is not free
        self._inputs: dict[str, Site] = {}  # name of an input -> one of the sites that read it
        self._layers: dict[str, list[Site]] = {}  # layer -> the sites on it: rows of a fused one

    def grow(self, learner: Core, task: Task) -> None:
        """Thaw the chosen layers' weights."""
        check_balance(self.name, self.balance, self.tower)
        if not self._layers:
            for site in learner.backbone.sites(self.at, self.blocks, self.tower):
                self._inputs.setdefault(site.input, site)
                self._layers.setdefault(site.layer, []).append(site)
            check_sketch(self.sketch, self._inputs.values())
        for layer in self._layers:
            _weight(learner, layer).requires_grad_(True)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Remember where weights start that may not move freely."""
        for layer, sites in self._layers.items():
            weight = _weight(learner, layer)
            if self.subspaces or sum(site.fan_out for site in sites) < len(weight):
                self.start[layer] = weight

    @torch.no_grad()
    def after_backward(self, learner: Core) -> None:
        """Project the gradients on the free directions."""
        for layer in self._layers:
            gradient = _weight(learner, layer).grad
            if gradient is None and "conversations" in learner.objective.asks:
                continue  # those of this step show no image, and the layer reads images
            if gradient is None:
                raise ValueError(
                    f"gpm: {layer} gets no gradient, the loss does not depend on it. Is its tower part of the "
                    "objective? (classify uses the vision tower only)"
                )
            if layer in self.start:
                gradient.copy_(self._free(layer, gradient))

    @torch.no_grad()
    def after_step(self, learner: Core, batch: Batch) -> None:
        """Take out of the steps so far what the optimizer put back."""
        for layer in self._layers:
            if layer in self.start:
                weight, start = _weight(learner, layer), self.start[layer]
                weight.copy_(start + self._free(layer, weight - start))

    def end_task(self, learner: Core, task: Task) -> None:
        """Take the space of this task's inputs."""
        self.start.clear()
        keep = self.keep if self.schedule == "fixed" else keep_schedule(self.keep, task.index, task.total)
        layers = {key: learner.backbone.get_submodule(site.layer) for key, site in self._inputs.items()}
        views = learner.training_views(learner.method.data(learner, task), self.moments, "take")

        def groups(key: str) -> Sequence[Tensor] | None:
            return learner.backbone.token_groups(self._inputs[key].layer)

        reading = second_moments(learner.forward_towers, layers, views, groups, self.balance, self.sketch, learner)
        for key, moments in reading.items():
            space = self.subspaces.of(key, self._inputs[key].fan_in, moments.device)
            self.subspaces.keep(key, space.take(moments, keep, self.power))

    def measures(self, learner: Core) -> dict[str, float]:
        """Per input: free directions, and the share taken."""
        facts = {}
        for key, site in self._inputs.items():
            free = self.subspaces.of(key, site.fan_in).free
            facts[f"free_dimension/{key}"] = float(free)
            facts[f"occupied_share/{key}"] = 1 - free / site.fan_in
        return facts

    def param_groups(self, learner: Core) -> dict[str, float]:
        """A gentler learning rate for pre-trained weights."""
        return {f"backbone.{layer}.weight": self.backbone_lr for layer in self._layers}

    def _free(self, layer: str, step: Tensor) -> Tensor:
        """What a step (fan_out, fan_in) may do: on the chosen rows, in the free directions."""
        free = torch.zeros_like(step)
        for site in self._layers[layer]:
            rows = slice(*site.rows)
            free[rows] = self.subspaces.outside(site.input, step[rows])
        return free


def _weight(learner: Core, layer: str) -> Tensor:
    return learner.backbone.get_parameter(f"{layer}.weight")
