"""Experts that the tasks of a tower share, the router that each input takes, and what tasks are known by."""

import torch
from torch import Tensor, nn

from perdure.adapters.experts import Experts, Routes
from perdure.adapters.injection import Adapters, attach, overhear
from perdure.backbones.base import OneTower
from perdure.core.data_parallel import Portion
from perdure.core.learner import Core
from perdure.core.method import parts_of
from perdure.formatting import room_for
from perdure.mechanisms.class_statistics import ClassTable, TaskGaussians
from perdure.mechanisms.prompting import PerTower, text_query
from perdure.types import Data

_CHUNK = 256


class Mixture(nn.Module):
    """Experts in the blocks of one tower, and what knows whose inputs they have seen.

    Args:
        task_identifier: of this tower; a table where its inputs are class names.
        tower: which.
        noise: deviation of what is added to a router's scores in training.
    """

    def __init__(self, task_identifier: TaskGaussians | ClassTable, tower: OneTower, noise: float) -> None:
        super().__init__()
        self.adapters: Adapters[Experts] = Adapters()
        self.task_identifier, self.tower, self.noise = task_identifier, tower, noise

    @property
    def learning(self) -> bool:
        """Whether there are routers in training, which a task has until it ends."""
        return next(iter(self.adapters)).routes_new

    def by_itself(
        self,
        asked: Tensor,
        counted: Tensor | None = None,
        seen: Tensor | None = None,
        told: Tensor | None = None,
    ) -> list[Routes]:
        """Every input by the router of the task that knows its query (n, dim) best, or of that which it is `told`."""
        tasks = self.task_identifier.tasks  # in the order in which they were learnt
        if told is None:
            place = self.task_identifier.route(asked)
        else:
            place = torch.searchsorted(torch.tensor(tasks, device=told.device), told)
        routes = Routes(tasks, place, counted=counted, seen=seen)
        return [routes] * len(self.adapters)

    def open(self, count: int, device: torch.device) -> None:
        """`count` new experts in each block, and a new router over them all."""
        for adapter in self.adapters:
            adapter.add(count, device)
        for adapter in self.adapters:
            adapter.open_router(device)

    def place(self, learner: Core, blocks: str | None, rank: int, top: int, scale: float, count: int) -> None:
        """Put experts beside the MLPs of the chosen blocks, for which `count` of them, not open yet, must have room."""
        backbone = learner.backbone
        firsts, lasts = (backbone.sites(at, blocks, self.tower) for at in ("fc1", "fc2"))
        widths = sum(first.fan_in + last.fan_out for first, last in zip(firsts, lasts, strict=True))
        room_for(4 * count * rank * widths, f"moe_adapters with {count} experts of rank={rank}")
        for pair in zip(firsts, lasts, strict=True):
            norm = backbone.norm_before(pair[0])
            adapter = Experts(pair, rank, top, scale, norm is not None)
            self.adapters.append(adapter)
            attach(backbone, pair, adapter)
            if norm is not None:
                overhear(backbone, pair[0], norm, adapter.overhear)

    def in_training(
        self,
        learner: Core,
        count: int,
        labels: Tensor | None,
        counted: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> list[Routes]:
        """Everything by the router in training; what is of old tasks, as replay brings it, by those of its task."""
        adapters = self.adapters
        place = torch.zeros(count, dtype=torch.int64, device=learner.device)
        routers: list[int | None] = [None]
        # class names of old tasks are read in every step
        mixed = self.tower == "text" or any(part.rehearses for part in parts_of(learner.method))
        if labels is not None and len(learner.tasks) > 1 and mixed:
            owner = {c: task.index for task in learner.tasks for c in task.classes}
            routers += self.task_identifier.tasks
            table = torch.zeros(max(owner) + 1, dtype=torch.int64)
            for c, index in owner.items():
                table[c] = routers.index(index) if index in routers else 0
            place = table.to(learner.device)[labels]
        most = max(adapter.count for adapter in adapters)
        purpose = "moe_adapters" if self.tower == "vision" else "moe_adapters text"
        generator = learner.generator(purpose, learner.step)
        # what a process draws for its part of a batch is what one would draw for it of the whole
        part = learner.part or Portion(range(count), count)
        draw = torch.randn(len(adapters), part.of, most, dtype=torch.float32, generator=generator)
        draw = draw[:, part.rows.start : part.rows.stop]
        tallied = learner.part is not None or learner.processes.first  # what all read counts once
        # routers of former tasks have nothing to try out any more
        noise = (self.noise * draw).to(learner.device) * (place == 0).unsqueeze(1)
        return [
            Routes(routers, place, its[:, : a.count], counted, seen, tallied)
            for its, a in zip(noise, adapters, strict=True)
        ]


def pretrained_features(learner: Core, data: Data, order: Tensor, tower: OneTower) -> tuple[Tensor, Tensor]:
    """Unit features (n, dim) of images, or of what is said of them, by the pre-trained model, and labels (n,)."""
    with learner.inference():
        if tower != "text":
            found = [PerTower.asked_of(learner, batch, tower) for batch in learner.batches(data, _CHUNK, order)]
            labels = data.labels.to(learner.device)[order.to(learner.device)]
        else:
            texts = _texts(learner, data, order)
            lines, labels = list(texts), torch.tensor(list(texts.values()), device=learner.device)
            found = [
                text_query(learner, learner.backbone.tokenised(lines[start : start + _CHUNK]))
                for start in range(0, len(lines), _CHUNK)
            ]
    # cloned: tensors made under inference_mode may not take part in training
    return torch.cat(found).clone(), labels.clone()


def _texts(learner: Core, data: Data, order: Tensor) -> dict[str, int]:
    """The class names of the task, or all captions of the images, and of which class each is."""
    found: dict[str, int] = {}
    if "classes" in learner.objective.asks:
        lines, labels = learner.objective.texts(learner, {})
        return dict(zip(lines, labels.tolist(), strict=True))
    for batch in learner.batches(data, _CHUNK, order):
        for texts, label in zip(batch["text"], batch["label"].tolist(), strict=True):
            found |= dict.fromkeys(texts, label)
    return found
