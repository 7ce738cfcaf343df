"""What is asked of the features, how it is learnt, and how it is scored."""

from perdure.objectives.base import Objective
from perdure.objectives.classify import Classify
from perdure.objectives.generate import Generate
from perdure.objectives.retrieve import Retrieve
from perdure.objectives.zeroshot import ZeroShot

__all__ = ["OBJECTIVES", "Classify", "Generate", "Objective", "Retrieve", "ZeroShot"]

OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classify,
    "zeroshot": ZeroShot,
    "retrieve": Retrieve,
    "generate": Generate,
}
