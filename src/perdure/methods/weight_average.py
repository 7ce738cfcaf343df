"""Averages of weights: ZSCL's running mean (Zheng et al., ICCV 2023, arXiv:2303.06628), WiSE-FT (arXiv:2109.01903).

What a pre-trained model knows is lost gradually along the way of the training, so a point between start and end knows
both. Running (the paper's WE): after a task stands the mean of the values before it and of those after its steps 0, k,
2k, ... WiSE-FT (Wortsman et al., CVPR 2022): (1 - alpha) · values before + alpha · values after.

Differs: WiSE-FT goes back to the values before the task, not to the pre-trained ones, so that old tasks count as well.
ZSCL averages the whole model; here it is what tasks share and the task trains.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.options.ranges import Count, Share, without_effect
from perdure.types import Batch, Task


class WeightAverage(Method, name="weight_average"):
    """Puts an average in the place of what a task has trained, when it ends.

    What is averaged are parameters that tasks share: weights that are fine-tuned, and factors of branches that go on
    (a mean of factors is not the factors of the mean). With `running`, heads in training too.

    Args:
        form: `running` is the mean over the way; `wise` a point between its ends.
        every: with `running`, number of steps between two of the values that are averaged; None is 1.
        alpha: with `wise`, the share of what was learnt, above 0; 1 is plain training. None is 0.5.
    """

    protects = "shared_parameters"
    unlabelled = "any"

    def __init__(
        self, form: Literal["running", "wise"] = "running", every: Count | None = None, alpha: Share | None = None
    ) -> None:
        super().__init__()
        if form == "running":
            without_effect("with form='running'", alpha=alpha)
        else:
            without_effect("with form='wise', which looks at the ends only", every=every)
        self.form, self.every, self.alpha = form, every or 1, 0.5 if alpha is None else alpha
        # name of a parameter of the learner -> its mean so far, or its value before the task
        self.average = BufferDict()
        self.count = BufferDict()  # "taken": how many values a mean is of

    def begin_task(self, learner: Core, task: Task) -> None:
        """Note the values before the first step."""
        for name in self._averaged(learner):
            self.average[name] = learner.get_parameter(name).contiguous()
        self.count["taken"] = torch.ones((), dtype=torch.int64)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse a task in which nothing that tasks share is trained."""
        if not any(not name.startswith("objective.") for name in self._averaged(learner)):
            raise ValueError(
                f"task {task.number}: weight_average has no effect where no part trains what tasks share any more: "
                "take one that does in every task, as in 'finetune + weight_average' or 'lora + weight_average'"
            )

    def after_step(self, learner: Core, batch: Batch) -> None:
        """mean ← mean + (θ - mean) / number of values, when it is time."""
        if self.form == "wise" or learner.step % self.every:
            return
        names, taken = sorted(self.average), learner.step // self.every + 2
        with torch.no_grad():
            values = [learner.get_parameter(name).detach() for name in names]
            torch._foreach_lerp_([self.average[name] for name in names], values, 1 / taken)
        self.count["taken"] = torch.tensor(taken)

    def finalize(self, learner: Core, task: Task) -> None:
        """Put the averages in place.

        Raises:
            ValueError: when the task was too short for `every`.
        """
        if self.form == "running" and self.every > 1 and int(self.count["taken"]) == 2:
            raise ValueError(
                f"every={self.every}: task {task.number} had no more than {self.every} steps, so that half of the mean "
                "is where it began: write a smaller number, such as every=1"
            )
        with torch.no_grad():
            for name in sorted(self.average):
                value, average = learner.get_parameter(name), self.average[name]
                value.copy_(average if self.form == "running" else average.lerp(value, self.alpha))
        self.average.clear()
        self.count.clear()

    def _averaged(self, learner: Core) -> Sequence[str]:
        """Names; a point between a fresh head and a trained one would be a head that is half as sure."""
        names = learner.shared()
        return [name for name in names if self.form == "running" or not name.startswith("objective.")]
