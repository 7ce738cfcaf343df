"""A memory of past examples that holds references, not data: (task, position) pairs and their labels."""

from typing import Literal

import torch
from torch import Tensor, nn

from perdure.memory.tensors import Tensors
from perdure.types import Batch, Task

Selection = Literal["reservoir", "class_balanced"]


class Examples(nn.Module):
    """At most `size` past examples.

    Args:
        size: number of examples.
        selection: `reservoir`: a uniform sample of everything seen (Vitter's algorithm R, each example offered once);
            `class_balanced`: the same number of each class, random within the class.
    """

    def __init__(self, size: int, selection: Selection) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1 example to remember")
        self.size, self.selection = size, selection
        self.kept = Tensors()  # refs (n, 3): task, position, class; offered (1,)

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def refs(self) -> Tensor:
        """What is kept: int64 (n, 3) of task index, position in its training set, class."""
        return self.kept.get("refs", torch.empty(0, 3, dtype=torch.int64))

    def add(self, task: Task, generator: torch.Generator) -> None:
        """Offer all training examples of `task`, in random order."""
        order = torch.randperm(len(task.train), generator=generator)
        labels = task.train.labels.cpu()
        new = torch.stack([torch.full_like(order, task.index), order, labels[order]], dim=1)
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
            picks.append(everything[everything[:, 2] == c][: share + (i < extra)])
        return torch.cat(picks)

    def draw(self, tasks: list[Task], n: int, generator: torch.Generator) -> Batch:
        """`n` kept examples, drawn with replacement, read from the training sets of `tasks`."""
        return read(tasks, self.refs[torch.randint(len(self), (n,), generator=generator)])


def read(tasks: list[Task], refs: Tensor) -> Batch:
    """The examples that `refs` (n, 3) point to, as one batch.

    Raises:
        ValueError: when a task's data is not at hand any more.
    """
    parts = []
    for index in torch.unique(refs[:, 0]).tolist():
        data = tasks[index].train
        if not len(data):
            raise ValueError(
                f"the memory refers to examples of task {index} ({tasks[index].name}), whose data is not at hand: "
                "restore the folder it was learnt from, or export with memory"
            )
        parts.append(data.__getitems__(refs[refs[:, 0] == index, 1].tolist()))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
