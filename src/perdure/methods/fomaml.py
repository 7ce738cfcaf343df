"""First-order MAML (Finn, Abbeel & Levine, ICML 2017, arXiv:1703.03400, section 5.2): no gradients of gradients.

`backward`: as in `maml`, but ∇L_S is taken for constant, so what is left to the optimizer is ∇L_Q at the adapted θ'.
The official code has it as `stop_grad`; Nichol et al. (2018, arXiv:1803.02999) name it FOMAML.

Differs: as `maml` does.
"""

from perdure.mechanisms.meta_learning import ModelAgnostic
from perdure.options.ranges import Count, Rate


class FOMAML(ModelAgnostic, name="fomaml"):
    """As `maml`, at the cost of plain training: the gradient at the adapted weights is taken for that of the start.

    Args:
        inner_steps: number of steps on the support.
        inner_lr: their rate, of plain gradient descent; of heads' weights in units of 10 / mean ‖feature‖².
    """

    second_order = False

    def __init__(self, inner_steps: Count = 1, inner_lr: Rate = 0.1) -> None:
        super().__init__(inner_steps, inner_lr)
