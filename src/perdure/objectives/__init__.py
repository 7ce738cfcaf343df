"""What is asked of the features, how it is learnt, and how it is scored."""

from perdure.core.objective import OBJECTIVES
from perdure.objectives.classify import Classify
from perdure.objectives.generate import Generate
from perdure.objectives.retrieve import Retrieve
from perdure.objectives.zeroshot import ZeroShot

__all__ = ["OBJECTIVES", "Classify", "Generate", "Retrieve", "ZeroShot"]
