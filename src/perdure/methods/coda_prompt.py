"""CODA-Prompt: prompts as weighted sums of components (Smith et al., CVPR 2023, arXiv:2211.13218).

Each component m has a prompt P_m, a key K_m and a vector A_m that says which features of the query matter to it:
p = Σ_m cos(q ∘ A_m, K_m) P_m, q being the pre-trained encoder's features. Half of p joins the keys of self-attention,
half the values. Every task adds components; those of former tasks are frozen but go on contributing. Nothing is
selected, so the choice itself learns from the cross-entropy.

The paper adds λ (‖K Kᵀ - I‖² + ‖A Aᵀ - I‖² + ‖P Pᵀ - I‖²) with λ = 0.1; later the official code set it to 0 and lets
new components start orthogonal to old ones instead (Gram-Schmidt). Both are here: `strength` and `start`.

Differs: the penalty is the mean over the entries of each matrix, summed over blocks, as in the official code; its part
between old components, which is constant, is left out. Orthogonal starts come from a QR decomposition against the
span of the old components; the official one projects on them one by one, which is only the same while they are
orthogonal. `start="random"` is a unit vector of random direction (the paper's code: uniform in [0, 1]).
"""

from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from perdure.adapters.prefix import Prefix
from perdure.adapters.state import BufferDict
from perdure.backbones.base import OneTower, Tower, named_towers
from perdure.core.learner import Core
from perdure.mechanisms.prompting import PromptPool, QueriedPrompts, attach_prefix, first_blocks
from perdure.options.ranges import Range, Strength
from perdure.types import Batch, Task

Start = Literal["orthogonal", "random"]
_BLOCKS = 5
_ALL, _EACH = 100, 10  # components of a stream of known length, and of each task where the end is open


class Components(PromptPool):
    """Keys, filters and prompts of one tower."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = Prefix()
        # of the current task: "key" and "filter" (A), (blocks, components, dim), and "prompt"
        # (blocks, components, length / 2, 2 · width), keys beside values
        self.new = nn.ParameterDict()
        self.past = BufferDict()  # the same of all former tasks together

    def grow(self, shapes: dict[str, tuple[int, ...]], start: Start) -> None:
        """Put the last task's components away, and start new ones of these shapes."""
        for name, value in self.new.items():
            self.past.append(name, value, dim=1)
        for name, shape in shapes.items():
            self.new[name] = nn.Parameter(self._begin(name, shape, start))

    def joining(self, asked: Tensor, labels: Tensor | None) -> AbstractContextManager[None]:
        """See `PromptPool.joining`."""
        prompt = _mixed(asked, self.new["key"], self.new["filter"], self.new["prompt"])
        if self.past:  # apart: these need no gradient, and no copy
            prompt = prompt + _mixed(asked, self.past["key"], self.past["filter"], self.past["prompt"])
        return self.prefix.using(prompt.unbind())

    def overlap(self) -> Tensor:
        """Σ over blocks and K, A, P of the mean square of X Xᵀ - I, X being all, without what is constant."""
        return torch.stack([self._overlap(name) for name in sorted(self.new)]).sum()

    def _begin(self, name: str, shape: tuple[int, ...], start: Start) -> Tensor:
        """Unit vectors (blocks, components, ...), one for each component."""
        fresh = torch.randn(shape, dtype=torch.float64).flatten(2).mT  # (blocks, size, components)
        old = self.past[name].flatten(2).mT.double().cpu() if name in self.past else fresh[..., :0]
        if start == "orthogonal" and old.shape[2] + fresh.shape[2] <= fresh.shape[1]:
            span = torch.linalg.qr(old).Q
            for _ in range(2):  # once leaves what rounding adds
                fresh = torch.linalg.qr(fresh - span @ (span.mT @ fresh)).Q
        else:
            fresh = fresh / fresh.norm(dim=1, keepdim=True)
        begun: Tensor = fresh.mT.float().reshape(shape)
        return begun.contiguous()

    def _overlap(self, name: str) -> Tensor:
        new: Tensor = self.new[name].flatten(2)
        among = new @ new.mT - torch.eye(new.shape[1], dtype=new.dtype, device=new.device)
        total = among.square().sum()
        count = new.shape[1]
        if name in self.past:
            old = self.past[name].flatten(2)
            total, count = total + 2 * (new @ old.mT).square().sum(), count + old.shape[1]
        return total / (count * count)


class CODAPrompt(QueriedPrompts[Components], name="coda_prompt"):
    """Prompts made for each image or text from components, some of which each task adds; the encoder stays as it is.

    Args:
        components: that each task adds; None shares the paper's 100, or as many as there are features, out among the
            tasks; where the end is open 10, or a tenth of the features.
        length: vectors of a prompt in each block, half of them keys and half of them values.
        blocks: which blocks have prompts; None is the paper's "0-4", or all where there are fewer.
        strength: weight of the orthogonality penalty (λ); the paper's is 0.1, its later code's 0.
        start: new components are `orthogonal` to all former ones, or `random`. Vectors that find no free direction
            left, as in a stream longer than announced, are random too.
        tower: which encoder; each has components of its own.
    """

    def __init__(
        self,
        components: Annotated[int, Range(1, 1024)] | None = None,
        length: Annotated[int, Range(2, 256)] = 8,
        blocks: str | None = None,
        strength: Strength = 0.0,
        start: Start = "orthogonal",
        tower: Tower = "vision",
    ) -> None:
        super().__init__(tower)
        if length % 2:
            raise ValueError(f"length={length}: expected an even number, half keys and half values, such as 8")
        self.components, self.length, self.blocks = components, length, blocks
        self.strength, self.start = strength, start

    def grow(self, learner: Core, task: Task) -> None:
        """Put the last task's components away, and start new ones."""
        for tower in named_towers(self.tower):
            if task.index == 0:
                self.towers[tower] = Components()
            own = self.of(tower)
            where = self.blocks or first_blocks(learner.backbone, 0, _BLOCKS, tower)
            own.grow(self._shapes(learner, task, tower, where), self.start)
            if task.index == 0:
                attach_prefix(learner, own.prefix, where, tower)

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """strength · Σ over blocks and K, A, P of the mean square of X Xᵀ - I."""
        if not self.strength:
            return 0.0
        return self.strength * sum(own.overlap() for own in self.placed())

    def _shapes(self, learner: Core, task: Task, tower: OneTower, where: str) -> dict[str, tuple[int, ...]]:
        sites, dim = learner.backbone.sites("k", where, tower), learner.backbone.dim
        count, before = self.components, self.of(tower).new
        if "key" in before:
            count = before["key"].shape[1]
        elif count is None:
            count = min(_ALL, dim) // task.total if task.total else min(_EACH, dim // 10)
            count = max(1, count)
        elif self.start == "orthogonal" and count * (task.total or 1) > dim:
            raise ValueError(
                f"components={count} a task would need {count * (task.total or 1)} orthogonal keys in {dim} features; "
                f"write at most {max(1, dim // (task.total or 1))}, or start='random'"
            )
        narrow, wide = (len(sites), count, dim), (len(sites), count, self.length // 2, 2 * sites[0].fan_out)
        return {"key": narrow, "filter": narrow, "prompt": wide}


def _mixed(asked: Tensor, keys: Tensor, filters: Tensor, prompts: Tensor) -> Tensor:
    """Σ_m cos(q ∘ A_m, K_m) P_m for each block and input, (blocks, B, length / 2, 2 · width)."""
    # (q ∘ A) · K = q · (A ∘ K) and |q ∘ A|² = q² · A²: no (B, components, dim) is ever made
    products = asked @ (filters * keys).mT
    norms = (asked.square() @ filters.square().mT).sqrt() * keys.norm(dim=2)[:, None]
    mixed: Tensor = (products / norms.clamp_min(1e-12)) @ prompts.flatten(2)
    return mixed.reshape(*mixed.shape[:2], *prompts.shape[2:])
