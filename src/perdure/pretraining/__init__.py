"""What is learnt of images without labels: one file a pretext; see `perdure.core.pretext`."""

from perdure.core.pretext import PRETEXTS
from perdure.pretraining.contrast import Contrast
from perdure.pretraining.distill import Distill
from perdure.pretraining.masked import Masked

__all__ = ["PRETEXTS", "Contrast", "Distill", "Masked"]
