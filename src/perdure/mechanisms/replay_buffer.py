"""A memory of past examples that holds references, not data: (task, position) pairs and their labels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adapters.buffer_dict import BufferDict
from perdure.types import Batch, Task

Selection = Literal["reservoir", "class_balanced"]


class ReplayBuffer(nn.Module):
    """At most `size` past examples.

    Args:
        size: number of examples.
        selection: `reservoir`: a uniform sample of everything seen (Vitter's algorithm R, each example offered once);
            `class_balanced`: the same number of each class, the first in the order in which they are offered.
    """

    def __init__(self, size: int, selection: Selection) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1 example to remember")
        self.size, self.selection = size, selection
        self.kept = BufferDict()  # refs (n, 3): task, position, class; offered (1,)

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def refs(self) -> Tensor:
        """What is kept: int64 (n, 3) of task index, position in its training set, class.

        Class-balanced examples of one class stand in the order in which they were offered, so that a smaller share
        drops the last.
        """
        return self.kept.get("refs", torch.empty(0, 3, dtype=torch.int64))

    def add(self, task: Task, generator: torch.Generator, order: Tensor | None = None) -> None:
        """Offer training examples of `task`: those of `order` (positions, best first), or all in random order."""
        if order is None:
            order = torch.randperm(len(task.train), generator=generator)
        new = refer(task, order)
        old = self.refs.cpu()
        kept = self._reservoir(old, new, generator) if self.selection == "reservoir" else self._balanced(old, new)
        self.kept["refs"] = kept

    def _reservoir(self, old: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        offered = int(self.kept["offered"]) if "offered" in self.kept else 0
        room = self.size - len(old)
        kept = torch.cat([old, new[:room]])
        late = torch.arange(len(new))[max(room, 0) :]
        slots = (torch.rand(len(late), generator=generator, dtype=torch.float64) * (offered + late + 1)).long()
        for position, slot in zip(late.tolist(), slots.tolist(), strict=True):
            if slot < self.size:
                kept[slot] = new[position]
        self.kept["offered"] = torch.tensor([offered + len(new)])
        return kept

    def _balanced(self, old: Tensor, new: Tensor) -> Tensor:
        everything = torch.cat([old, new])
        classes = torch.unique(everything[:, 2]).tolist()
        share, extra = divmod(self.size, len(classes))
        picks = []
        for i, c in enumerate(classes):
            picks.append(_by_turns(everything[everything[:, 2] == c])[: share + (i < extra)])
        return torch.cat(picks)

    def draw(self, tasks: list[Task], n: int, generator: torch.Generator) -> Batch:
        """`n` kept examples, drawn with replacement, read from the training sets of `tasks`."""
        return read(tasks, self.refs[self.pick(n, generator)])

    def pick(self, n: int, generator: torch.Generator) -> Tensor:
        """Rows (n,) of `refs`, drawn with replacement."""
        return torch.randint(len(self), (n,), generator=generator)


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
        return read(self.tasks, self.refs[torch.as_tensor(positions)])


def refer(task: Task, order: Tensor | None = None) -> Tensor:
    """References (n, 3) to the training examples of `task` at the positions `order`, or to all as they stand."""
    order = torch.arange(len(task.train)) if order is None else order.cpu()
    return torch.stack([torch.full_like(order, task.index), order, task.train.labels.cpu()[order]], dim=1)


def read(tasks: list[Task], refs: Tensor) -> Batch:
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
    back = torch.cat(places).argsort()
    return {key: torch.cat([part[key] for part in parts])[back.to(parts[0][key].device)] for key in parts[0]}


def gone(task: Task) -> ValueError:
    """What to raise when examples of `task` are needed and its data is not at hand any more."""
    return ValueError(
        f"the memory refers to examples of task {task.index} ({task.name}), whose data is not at hand: restore the "
        "folder it was learnt from, or teach a new learner"
    )


def _by_turns(refs: Tensor) -> Tensor:
    """Examples of one class, those of its tasks in turn: else a class that comes again would never replace its first.

    The order within a task is kept.
    """
    turn = torch.zeros(len(refs), dtype=torch.int64)
    for index in torch.unique(refs[:, 0]).tolist():
        mine = refs[:, 0] == index
        turn[mine] = torch.arange(int(mine.sum()))
    by_task = refs[:, 0].argsort(stable=True)
    return refs[by_task[turn[by_task].argsort(stable=True)]]
