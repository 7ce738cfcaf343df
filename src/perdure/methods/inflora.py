"""InfLoRA: interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv:2404.00228).

`begin_task` designs the frozen projection B_t (section 3.2, "designing dimensionality reduction matrix"): the leading
directions of the new task's inputs inside the space that old tasks' inputs leave free. Only A_t is trained, so whatever
it becomes, the layer's output on old inputs does not change. `end_task` takes the new inputs' space (DualGPM, section
3.3) and merges the branch. In this package's letters B_t is `down` and A_t is `up`.

Both follow the official code, an SVD of F R with R the inputs' second moments and F the projector on the free space:
the eigenvectors of F R² F, and its eigenvalues as energy. The paper's SVD of the inputs themselves is that of F R F.

Differs: float64 `eigh` of the symmetric form instead of an SVD in float32; rows beyond the free space are zero (the
official code's are arbitrary there and leave the space); the first task reaches `keep` instead of stopping one
direction short, and is never mislabelled when it takes more than half; moments come from at most `moments` images; old
branches are folded into the weights instead of being recomputed in every step.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adapters.injection import attach
from perdure.adapters.low_rank import LowRank
from perdure.backbones.base import Tower
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.mechanisms.moments import Moments, RunningMoments, check_sketch, exact, second_moments
from perdure.mechanisms.rank_selection import DRS
from perdure.mechanisms.subspace import Subspace, SubspaceMemory, check_balance, keep_schedule
from perdure.options.ranges import Count, Rank, Share, Strength, without_effect
from perdure.types import Batch, Site, Task

# Kaiming-uniform rows, which the official code starts from, have norm 1/√3; B_t's rows keep it.
_ROW_NORM = 1 / math.sqrt(3)
_RANK = 10


class InfLoRA(Method, name="inflora"):
    """One branch per task whose input projection avoids the input space of former tasks.

    Args:
        rank: rows of each task's B_t; None is 10.
        at: which layers, see `Backbone.sites`; layers that read the same input share B_t. None is "kv", as in the
            paper, and in a language model "qkv".
        blocks: which blocks, all by default; "0-4" is the paper's InfLoRA-b5.
        tower: which encoder.
        keep: share of the old inputs' energy to protect (the paper's ε), in (0, 1].
        power: of the second moments R of which B_t and the energy are taken: 2 as in the official code, 1 as in the
            papers, where the same `keep` takes far more directions.
        schedule: `linear` raises `keep` to 1 over a known number of tasks; `fixed`, and an open end, hold it.
        design: `inputs` as in the paper, `random` for its ablation.
        project: False drops the projection on the free space, for the ablation.
        moments: number of training images that second moments are taken from.
        end_moments: `pass` takes those at a task's end in a forward pass, `training` from the images of the last epoch
            as they are trained on, with weights that still move: it spares the pass.
        balance: share of a language model's image tokens in second moments, between 0 and 1, however many they are;
            None counts every token alike.
        sketch: directions kept of second moments of layers wider than 4,096, in place of all (see `moments.Sketch`);
            None keeps all.
        ranks: candidates among which each task's rank is chosen after a short warm-up, see
            `perdure.mechanisms.rank_selection`; None takes `rank`. B_t's rows come in order of the inputs' energy, so a
            smaller rank keeps the leading ones.
        rank_cost: price of the largest of `ranks`; None is 0.5.
    """

    changes_encoder = True
    sole_adapter = True
    unlabelled: Literal["", "untaught", "any"] = "any"

    def __init__(
        self,
        rank: Rank | None = None,
        at: str | None = None,
        blocks: str | None = None,
        tower: Tower = "vision",
        keep: Share = 0.95,
        power: Literal[1, 2] = 2,
        schedule: Literal["linear", "fixed"] = "linear",
        design: Literal["inputs", "random"] = "inputs",
        project: bool = True,
        moments: Count = 512,
        end_moments: Literal["pass", "training"] = "pass",
        balance: Share | None = None,
        sketch: Rank | None = None,
        ranks: Sequence[Rank] | None = None,
        rank_cost: Strength | None = None,
    ) -> None:
        super().__init__()
        if end_moments == "training" and tower != "vision":
            raise ValueError(f"end_moments='training' counts images, and tower={tower!r} reads texts: leave it out")
        if ranks is None:
            without_effect("without ranks", rank_cost=rank_cost)
            self.drs = DRS((_RANK if rank is None else rank,), "fixed")
        else:
            without_effect("beside ranks", rank=rank)
            if len(set(ranks)) == 1:
                raise ValueError(
                    f"ranks={tuple(ranks)}: one candidate leaves nothing to choose; write rank={ranks[0]} instead"
                )
            self.drs = DRS(ranks, "affine", rank_cost)
            self.unlabelled = ""  # a rank is chosen by how hard classes are to tell apart
        self.at, self.blocks, self.tower, self.balance, self.sketch = at, blocks, tower, balance, sketch
        self.keep, self.power, self.schedule = keep, power, schedule
        self.design, self.project, self.moments, self.end_moments = design, project, moments, end_moments
        self.adapters = nn.ModuleDict()
        self.subspaces = SubspaceMemory()  # of each input
        self.running_moments = RunningMoments()  # in the last epoch
        self.encodes_once = end_moments == "training"
        self._inputs: dict[str, Site] = {}  # adapter key -> one of the sites that read this input
        self._reach: dict[str, float] = {}  # adapter key -> `old_space_share` of the task just learnt

    def grow(self, learner: Core, task: Task) -> None:
        """A new branch in every chosen layer; what the last one learnt is merged."""
        check_balance(self.name, self.balance, self.tower)
        if self.end_moments == "training" and not learner.objective.one_row:
            raise ValueError("end_moments='training' counts images, and conversations have many or none: leave it out")
        if not self.adapters:
            at = self.at or ("qkv" if self.tower == "language" else "kv")
            for key, sites in learner.backbone.sites_by_input(at, self.blocks, self.tower).items():
                self.adapters[_key(key)] = LowRank(sites, self.drs.largest)
                self._inputs[_key(key)] = sites[0]
                attach(learner.backbone, sites, self._adapter(_key(key)))
            check_sketch(self.sketch, self._inputs.values())
        for key in self.adapters:
            self._adapter(key).open(train_down=False)

    def begin_task(self, learner: Core, task: Task) -> None:
        """Design B_t (equations 8 and 9), and choose its number of rows."""
        generator, power = learner.generator("design"), self.power
        for key, moments in self._moments(learner, task, "design").items():
            space = self._space(key, moments.device) if self.project else Subspace.empty(len(moments), moments.device)
            if self.design == "random":
                noise = torch.randn(len(moments), self.drs.largest, dtype=torch.float64, generator=generator)
                noise = noise.to(moments.device)
                moments, power = noise @ noise.T, 1
            down = self._adapter(key).down
            assert down is not None
            with torch.no_grad():
                down.copy_(_ROW_NORM * space.design(moments, self.drs.largest, power))
        self.drs.choose(learner, task, [self._adapter(key) for key in self.adapters])

    def batch(self, learner: Core, batch: Batch) -> Batch:
        """Unchanged; with `end_moments="training"` its inputs are counted in the last epoch."""
        if self.end_moments == "training" and learner.last_epoch and self.running_moments.images < self.moments:
            self.running_moments.listen(self._layers(learner))
        return batch

    def penalty(self, learner: Core, batch: Batch, features: Tensor) -> Tensor | float:
        """None; what the layers have read of the task's own images is counted."""
        if self.running_moments.listening:
            labels = learner.method.data(learner, learner.task).labels.to(batch["label"].device)
            own = torch.isin(batch["label"], labels).nonzero().flatten()
            own = own[: self.moments - self.running_moments.images]
            self.running_moments.add(own, learner.processes, len(batch["label"]))
        return 0.0

    def end_task(self, learner: Core, task: Task) -> None:
        """Take the space of this task's inputs (equation 10 and DualGPM), and merge the branch."""
        keep = self.keep if self.schedule == "fixed" else keep_schedule(self.keep, task.index, task.total)
        self._reach = {key: self._old_space_share(key) for key in self.adapters} if task.index else {}
        found = self.running_moments.finish() or self._moments(learner, task, "take")
        for key, moments in found.items():
            space = self._space(key, moments.device).take(moments, keep, self.power)
            self.subspaces.keep(key, space)
            self._adapter(key).merge()

    def measures(self, learner: Core) -> dict[str, float]:
        """Per input: free directions, the share taken, and the share of the task's update that reaches old inputs."""
        facts = self.drs.measures()
        for key, site in self._inputs.items():
            free = self._space(key).free
            facts[f"free_dimension/{site.input}"] = free
            facts[f"occupied_share/{site.input}"] = 1 - free / site.fan_in
            if key in self._reach:
                facts[f"old_space_share/{site.input}"] = self._reach[key]
        return facts

    def _adapter(self, key: str) -> LowRank:
        adapter = self.adapters[key]
        assert isinstance(adapter, LowRank)
        return adapter

    @torch.no_grad()
    def _old_space_share(self, key: str) -> float:
        """‖ΔW M‖ / ‖ΔW‖ (Frobenius) of the open branch, M the former tasks' space; 0 for a branch that does nothing."""
        adapter = self._adapter(key)
        assert adapter.down is not None
        # up = QR: the orthonormal Q changes no norm, and R is only (rank, rank)
        up, down = torch.linalg.qr(exact(torch.cat(list(adapter.up))), mode="r").R, exact(adapter.down)
        whole = (up @ down).norm()
        return float((up @ self._space(key, down.device).inside(down)).norm() / whole) if whole else 0.0

    def _space(self, key: str, device: torch.device | str = "cpu") -> Subspace:
        """What is taken, or free, in float64 on the device of the moments."""
        return self.subspaces.of(key, self._adapter(key).fan_in, device)

    def _moments(self, learner: Core, task: Task, purpose: str) -> dict[str, Moments]:
        """E[x xᵀ] of each input."""
        views = learner.training_views(learner.method.data(learner, task), self.moments, purpose)

        def groups(key: str) -> Sequence[Tensor] | None:
            return learner.backbone.token_groups(self._inputs[key].layer)

        layers = self._layers(learner)
        return second_moments(learner.forward_towers, layers, views, groups, self.balance, self.sketch, learner)

    def _layers(self, learner: Core) -> dict[str, nn.Module]:
        return {key: learner.backbone.get_submodule(site.layer) for key, site in self._inputs.items()}


def _key(name: str) -> str:
    """A module's key may hold no dot."""
    return name.replace(".", "/")
