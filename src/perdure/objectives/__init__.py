"""What is asked of the features, how it is learnt, and how it is scored."""

from perdure.objectives.base import Objective
from perdure.objectives.classify import Classify
from perdure.objectives.retrieve import Retrieve
from perdure.objectives.zeroshot import ZeroShot

__all__ = ["OBJECTIVES", "Classify", "Objective", "Retrieve", "ZeroShot", "asking"]

OBJECTIVES: dict[str, type[Objective]] = {"classify": Classify, "zeroshot": ZeroShot, "retrieve": Retrieve}


def asking(for_: str) -> str:
    """Names of the objectives that learn `for_`, as they would be written in a sentence."""
    return " or ".join(name for name, objective in OBJECTIVES.items() if for_ in objective.asks)
