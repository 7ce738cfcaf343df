"""References to old examples: which they are, and how they are read again from their tasks' training sets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.streams.image_set import ImageSet
from perdure.streams.sources import Files
from perdure.types import Batch, Data, Task, join, take


class BufferView:
    """The examples that `refs` (n, 3) point to, as a data set.

    Args:
        tasks: with their training sets.
        refs: task index, position in its training set, class.
    """

    def __init__(self, tasks: list[Task], refs: Tensor) -> None:
        self.tasks, self.refs = tasks, refs.cpu()
        self.labels = self.refs[:, 2]

    def __len__(self) -> int:
        return len(self.refs)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Examples at `positions`, in their order."""
        return read_references(self.tasks, self.refs[torch.as_tensor(positions)])


def refer(task: Task, order: Tensor | None = None) -> Tensor:
    """References (n, 3) to the training examples of `task` at the positions `order`, or to all as they stand."""
    order = torch.arange(len(task.train)) if order is None else order.cpu()
    return torch.stack([torch.full_like(order, task.index), order, task.train.labels.cpu()[order]], dim=1)


def read_references(tasks: list[Task], refs: Tensor) -> Batch:
    """The examples that `refs` (n, 3) point to, in their order, as one batch.

    Raises:
        ValueError: when a task's data is not at hand any more.
    """
    refs, parts, places = refs.cpu(), [], []
    for index in torch.unique(refs[:, 0]).tolist():
        data = tasks[index].train
        if not len(data):
            raise gone(tasks[index])
        places.append((refs[:, 0] == index).nonzero().flatten())
        parts.append(data.__getitems__(refs[places[-1], 1].tolist()))
    return take(join(parts), torch.cat(places).argsort())


def gone(task: Task) -> ValueError:
    """What to raise when examples of `task` are needed and its data is not at hand any more."""
    return ValueError(
        f"the memory refers to examples of task {task.number} ({task.name}), whose data is not at hand: restore the "
        "folder it was learnt from, or teach a new learner; what was given in Python or distilled is not read again"
    )


def lies_elsewhere(data: Data) -> bool:
    """Whether the folder that images would be read from is not there any more."""
    if not isinstance(data, ImageSet) or not isinstance(data.source, Files):
        return False
    return not data.cached and not data.source.root.is_dir()
