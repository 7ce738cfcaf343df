"""Model-agnostic meta-learning (MAML; Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400), of adapters and heads.

`backward`: θ' = θ - α ∇L_S(θ), `inner_steps` times, on a half S of the batch; the gradient that is left to the
optimizer is ∇_θ L_Q(θ') on the other half Q (equations 1 and 4), through the inner steps' own gradients.

Differs: a stream gives one task at a time, so there is one pair (S, Q) a step, and no mean over tasks; S and Q share
their classes as far as the batch has several examples of each. Penalties of other parts belong to L_Q alone.
"""

from perdure.core.learner import Core
from perdure.mechanisms.meta_learning import ModelAgnostic, check_second_order
from perdure.options.ranges import Count, Rate
from perdure.types import Task


class MAML(ModelAgnostic, name="maml"):
    """Trains what its partner trains, so that a step on one half of a batch helps the other half.

    Args:
        inner_steps: number of steps on the support.
        inner_lr: their rate, of plain gradient descent (the paper's α); of heads' weights in units of 10 / mean
            ‖feature‖².
    """

    second_order = True

    def __init__(self, inner_steps: Count = 1, inner_lr: Rate = 0.1) -> None:
        super().__init__(inner_steps, inner_lr)

    def check(self, learner: Core, task: Task) -> None:
        """Refuse second order of pre-trained weights too; known when all parts have grown."""
        super().check(learner, task)
        check_second_order(learner, self, "fomaml")
