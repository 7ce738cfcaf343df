"""Which images a learner was taught, told by their content: to keep them apart from those it is measured on."""

from pathlib import Path

import torch
from torch import Tensor

from perdure.core import checkpoint
from perdure.streams import ImageSet
from perdure.types import Task

FILE = "taught.safetensors"
_HASHES = "hashes"


def files(task: Task) -> dict[str, dict[str, Tensor]]:
    """What is kept of a task: 8 bytes of hash an image."""
    if not isinstance(task.train, ImageSet):
        return {}
    hashes = task.train.hashes()
    return {FILE: {_HASHES: torch.unique(hashes[hashes != 0])}}


def hashes(folder: Path) -> tuple[Tensor, list[int]]:
    """Hashes (n,) of all images taught to the learner in `folder`, and the tasks of which they are not known."""
    known = [(each.learnt - 1, checkpoint.beside(each, FILE)) for each in checkpoint.whole(folder)]
    found = [tensors[_HASHES] for _, tensors in known if tensors]
    return torch.cat([torch.empty(0, dtype=torch.int64), *found]), [index for index, tensors in known if not tensors]
