"""Progressive networks: a column a task, which reads those of former tasks (Rusu et al., 2016, arXiv:1606.04671).

`grow` opens a column, a small adapter behind each block, h + a_k with
a_k = U gelu(V h) + L gelu(Σ_{j<k} M_j (α_j · a_j)): the paper's adapter of non-linear lateral connections, its learned
scales α, small at first, included (see `ProgressiveColumns`). Former columns are frozen and get no gradient, so what is
answered for a task whose name is told never changes again. `end_task` closes the column. Where nobody tells the task, a
router sends each example to the column of the task under which its pre-trained features are likeliest, which is ours.

Differs: the paper's columns are whole networks, and each runs on its own activations, T passes for T tasks. Here they
are adapters of one frozen network, and former columns are asked about the hidden state of the new one, in one pass.
GELU for ReLU, of which a few units may all be dead.
"""

from perdure.adapters.injection import attach_behind
from perdure.adapters.progressive_columns import ProgressiveColumns
from perdure.backbones.base import OneTower
from perdure.backbones.sites import block_numbers
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.task_experts import ExpertTower, Keys, TaskExperts
from perdure.options.ranges import Rank


class ProgressiveNetwork(TaskExperts, name="pnn"):
    """A column of adapters a task with lateral connections to all former ones, which are frozen.

    Args:
        rank: units of a column in each block, and of what reads the former ones.
        blocks: which blocks, all by default.
        tower: where columns stand; None is `language` in a language model, else `vision`.
        lateral: whether a column reads the former ones; without it, columns are isolated adapters.
        keys: what the router looks at: an example's images, its words (without answers), or both; None is all there is.
    """

    def __init__(
        self,
        rank: Rank = 16,
        blocks: str | None = None,
        tower: ExpertTower | None = None,
        lateral: bool = True,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(TaskGaussians(), tower, blocks, rank=rank, keys=keys)
        self.lateral = lateral

    def place(self, learner: Core, tower: OneTower) -> None:
        """Columns behind the chosen blocks."""
        names = learner.backbone.blocks(tower)
        width = learner.backbone.sites("q", "0", tower)[0].fan_in
        for number in block_numbers(self.blocks, len(names)):
            columns = ProgressiveColumns(width, self.rank, self.lateral)
            self.experts.append(columns)
            attach_behind(learner.backbone.get_submodule(names[number]), columns)

    def measures(self, learner: Core) -> dict[str, float]:
        """How many examples find their own task's column, and what is stored for all columns together."""
        stored = sum(value.numel() for columns in self.experts for value in columns.closed.values())
        return {**super().measures(learner), "column_parameters": float(stored)}
