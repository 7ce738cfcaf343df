"""The training loop."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler

from perdure.core.compiling import begin, compiled
from perdure.core.learner import Core, derived_seed
from perdure.core.method import Method, parts_of, predicts, treated
from perdure.core.unsaved import check_saved
from perdure.formatting import Aside
from perdure.process import ALONE, as_found, plain
from perdure.training.config import TrainConfig as TrainConfig
from perdure.training.early_stop import EarlyStop, check_trains
from perdure.types import Batch, Data, Row, Task


class Diverged(ValueError):
    """Training ended in parameters that are not finite."""


class Progress(Protocol):
    """What is told while a run goes on; the console shows it, tests collect it."""

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """A task begins, with so many steps in all."""

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """A step ended; reading `loss` waits for the device."""

    def scores(self, task: Task, rows: list[Row]) -> None:
        """A task was learnt and evaluated."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def encoded(self, examples: int) -> None:
        """So many more of a task's examples were encoded, before its first step or after its last."""


class Quiet:
    """No progress."""

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        """Nothing."""

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """Nothing."""

    def scores(self, task: Task, rows: list[Row]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def encoded(self, examples: int) -> None:
        """Nothing."""


def told_by(progress: Progress | None) -> Progress:
    """Who is told: `progress`, or nobody.

    Raises:
        ValueError: when it lacks one of the methods of `Progress`.
    """
    if progress is None:
        return Quiet()
    for name in ("task", "step", "scores", "note", "encoded"):
        if not callable(getattr(progress, name, None)):
            raise ValueError(f"progress={progress!r:.60} has no {name}(...): expected an object such as Screen()")
    return progress


@dataclass(frozen=True)
class Fitted:
    """What learning one task took: wall time of its parts (`prepare` and `finish` are the method's own hooks)."""

    prepare: float
    train: float
    finish: float
    images: int
    trainable: int
    moved: bool
    """Whether more than heads was trained, or features are the method's own: those of old images are others now."""


SaveStep = Callable[[int, torch.optim.Optimizer | None], None]
P = ParamSpec("P")
T = TypeVar("T")


def _undisturbed(fit: Callable[Concatenate[Core, P], T]) -> Callable[Concatenate[Core, P], T]:
    """`fit` while nobody else is asked by the learner or changes it; torch and its generators are left as found."""

    @functools.wraps(fit)
    def fitting(learner: Core, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with learner.turn, plain(), as_found():
            try:
                return fit(learner, *args, **kwargs)
            finally:
                learner.looked = None

    return fitting


@_undisturbed
def fit_task(
    learner: Core,
    task: Task,
    config: TrainConfig,
    progress: Progress | None = None,
    save_step: SaveStep | None = None,
    resumed: tuple[int, Callable[[torch.optim.Optimizer], None]] | None = None,
    early: EarlyStop | None = None,
    pause: Callable[[], None] | None = None,
) -> Fitted:
    """Learn one task.

    Args:
        learner: already grown for `task`.
        task: with its training data.
        config: how.
        progress: who is told.
        save_step: called after every step with the number of steps done.
        resumed: number of steps already done, and what puts the optimizer's state back; the learner's is in place.
        early: what may end it before its last epoch.
        pause: called after each batch that is encoded while there is no step to lose; may raise.
    """
    check_shared_out(learner, config)
    check_trains(learner, config)
    progress, method = told_by(progress), learner.method
    clock = [time.perf_counter()]
    learner.train()
    learner.accumulate = config.accumulate
    learner.scaler = GradScaler(learner.device.type, enabled=learner.precision == torch.float16)
    learner.prepare()

    nothing_to_lose = True

    def looked(examples: int) -> None:
        progress.encoded(examples)
        if pause and nothing_to_lose:
            pause()

    learner.looked = looked
    if resumed is None:
        _begin(learner, task)
    data = method.data(learner, task)
    if learner.pretext is None:  # which looks at images, and at other parts of them in every step
        data = learner.cache.of(data, config.epochs)
    learner.looked = None
    clock.append(time.perf_counter())
    steps = config.epochs * math.ceil(len(data) / config.batch_size)
    optimizer = _optimizer(learner, config)
    trainable = sum(p.numel() for p in learner.trainable().values())
    moved = bool(treated(method)) or not all(name.startswith("objective.") for name in learner.trainable())
    trains = optimizer is not None or learner.online  # a pass goes by, whether or not anything is trained
    progress.task(task, task.total, config.epochs, steps if trains else 0)
    if not trains:
        _tell_idle(learner, task, progress)
    if learner.compiles:
        begin(learner.backbone)
    images = _train(learner, task, data, config, optimizer, progress, save_step, resumed, early) if trains else 0
    clock.append(time.perf_counter())
    learner.step, learner.last_epoch = steps, False  # also where a resumed run had no step left to do
    nothing_to_lose, learner.looked = not trains, looked
    _end(learner, task)
    clock.append(time.perf_counter())
    return Fitted(clock[1] - clock[0], clock[2] - clock[1], clock[3] - clock[2], images, trainable, moved)


def _begin(learner: Core, task: Task) -> None:
    """The parts prepare themselves; all processes go on from one state."""
    learner.method.check(learner, task)
    learner.step = 0
    _reseed(learner, task, "begin")
    if learner.pretext is not None:
        learner.pretext.begin_task(learner)
    learner.method.begin_task(learner, task)
    learner.processes.agree(learner.learnt_state())


def _train(
    learner: Core,
    task: Task,
    data: Data,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    save_step: SaveStep | None,
    resumed: tuple[int, Callable[[torch.optim.Optimizer], None]] | None,
    early: EarlyStop | None,
) -> int:
    """All steps that are left of a task, see `fit_task`; returns how many examples were learnt from."""
    method, per_epoch = learner.method, math.ceil(len(data) / config.batch_size)
    steps, done, images = config.epochs * per_epoch, 0, 0
    if resumed:
        done, restore = resumed
        if optimizer:
            restore(optimizer)
    ended, unsure = early is not None and early.over(), True
    for step, batch in () if ended else _training_batches(learner, task, data, config, done):
        learner.step, learner.last_epoch = step, step >= steps - per_epoch
        _reseed(learner, task, "step", step)
        if learner.online:
            learner.newest = range(step * config.batch_size, min((step + 1) * config.batch_size, len(data)))
        batch = method.batch(learner, batch)
        if "image" in batch:
            batch = learner.augment(batch, learner.generator("augment", step))
        batch = learner.cache.complete(batch)
        loss = torch.zeros(())
        if optimizer:
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step, steps) * group["scale"]
            sure = unsure and (not _shows(task) or any(each.get("images") for each in batch["conversation"]))
            loss = _descend(learner, task, batch, optimizer, first=sure)
            unsure = unsure and not sure
        method.after_step(learner, batch)
        images += len(batch["label"])
        progress.step(step + 1, loss.detach(), len(batch["label"]))
        ended = early is not None and (step + 1) % per_epoch == 0 and early.epoch()
        if save_step:
            save_step(step + 1, optimizer)
        if ended:
            break
    check_finite(learner, task)
    return images


def _end(learner: Core, task: Task) -> None:
    """The parts settle what was trained, and remember what later tasks need of it."""
    _reseed(learner, task, "end")
    learner.method.finalize(learner, task)
    learner.method.end_task(learner, task)
    learner.pretext = None
    check_saved(learner)
    learner.processes.agree(learner.learnt_state())
    learner.prepare()
    learner.learnt = task.index + 1


def _descend(learner: Core, task: Task, batch: Batch, optimizer: torch.optim.Optimizer, first: bool) -> Tensor:
    """One step; returns the loss before it. In the `first` one all that is trained must have a gradient.

    Conversations without images move nothing where the tower of the images is all that is trained.
    """
    optimizer.zero_grad()
    trained, scaler = [p for group in optimizer.param_groups for p in group["params"]], learner.scaler
    with compiled(learner.backbone) if learner.compiles else nullcontext():
        loss = learner.loss(batch)
        if loss.requires_grad:
            with learner.undivided():  # what is encoded once more, or in steps of a method's own, is all here
                learner.method.backward(learner, scaler.scale(loss), batch)
    learner.processes.average_gradients(trained)
    scaler.unscale_(optimizer)
    if first:
        _check_gradients(learner, task)
    if scaler.is_enabled() and not all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None):
        optimizer.zero_grad(set_to_none=False)  # no parameter will move, and nobody is to add up what overflowed
    learner.method.after_backward(learner)
    scaler.step(optimizer)
    scaler.update()
    return loss


def _training_batches(
    learner: Core, task: Task, data: Data, config: TrainConfig, done: int
) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from step `done` on, in an order that depends on seed, task and epoch only.

    In a pass without borders examples come as they stand.
    """
    per_epoch = math.ceil(len(data) / config.batch_size)
    for epoch in range(done // per_epoch, config.epochs):
        order = torch.arange(len(data))
        if not learner.online:
            order = torch.randperm(len(data), generator=learner.generator("shuffle", epoch))
        skip = max(0, done - epoch * per_epoch)
        batches = learner.batches(data, config.batch_size, order[skip * config.batch_size :])
        yield from enumerate(batches, epoch * per_epoch + skip)


def check_shared_out(learner: Core, config: TrainConfig) -> None:
    """Refuse methods whose batches several processes cannot share, or cannot be divided as they need it or are asked.

    Raises:
        ValueError: with the method's name.
    """
    world, accumulate = learner.processes.world, config.accumulate
    if learner.pretext is not None and (world > 1 or accumulate > 1):
        raise ValueError(f"{learner.pretext.name} is learnt in one process and whole batches: leave accumulate out")
    if learner.sharded and learner.tunes_backbone:
        raise ValueError("shard='blocks' is for frozen weights, and here they are trained: leave it out, or take lora")
    for part in learner.method:
        steps_within = type(part).backward is not Method.backward
        if part.divides and config.batch_size == 1:
            raise ValueError(
                f"{part.name} has no effect with batch_size=1: it sets parts of a batch against each other, which one "
                "example has not. Give 2 or more"
            )
        if learner.compiles and steps_within:
            raise ValueError(
                f"{part.name} cannot learn with --compile: it takes steps of its own within a step, whose gradients "
                "are differentiated again. Leave --compile out"
            )
        if getattr(learner.backbone, "checkpointing", False) and steps_within:
            raise ValueError(
                f"{part.name} cannot learn with checkpointing=True: activations would be computed again after its own "
                "steps within a step, with other weights. Leave checkpointing out of mllm()"
            )
        if part.batchwise and (world > 1 or accumulate > 1):
            how = f"in {world} processes" if world > 1 else f"with accumulate={accumulate}"
            raise ValueError(
                f"{part.name}(batchwise=True) cannot learn {how}: what it makes of an example depends on all of its "
                "batch. Leave batchwise out, or learn in one process without accumulate"
            )
        if accumulate > 1 and steps_within:
            raise ValueError(
                f"{part.name} cannot learn with accumulate={accumulate}: it takes steps of its own within a step, of "
                "whole batches. Leave accumulate out (and give a smaller batch_size)"
            )
        if learner.precision == torch.float16 and steps_within:
            raise ValueError(
                f"{part.name} cannot learn with precision='fp16': it takes steps of its own within a step, whose loss "
                "nobody scales. Give precision='bf16' or 'fp32'"
            )
        if part.encodes_once and accumulate > 1:
            raise ValueError(
                f"{part.name} cannot learn with accumulate={accumulate}, which encodes examples twice: it counts what "
                "they are in a step. Leave accumulate out (and give a smaller batch_size)"
            )


def _optimizer(learner: Core, config: TrainConfig) -> torch.optim.Optimizer | None:
    """A fresh optimizer; None when nothing is trained."""
    described = learner.param_groups()  # the rate itself is set before every step
    if not described:
        return None
    if config.optimizer == "sgd":
        return torch.optim.SGD(described, config.peak, momentum=0.9, weight_decay=config.weight_decay, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(described, config.peak, weight_decay=config.weight_decay, fused=True)


def _tell_idle(learner: Core, task: Task, progress: Progress) -> None:
    """Say what has no effect where nothing is trained: the task, or what is asked of training."""
    method, name = learner.method, learner.method.spec or learner.method.name
    if any(part.changes_encoder for part in parts_of(method)) and not predicts(method):
        progress.note(f"task {task.number}, {task.name}: {name} trains nothing in it, so answers stay as they were")
    elif task.index == 0:
        progress.note(Aside(f"{name} trains nothing: epochs, learning rate, schedule and optimizer have no effect"))


def _reseed(learner: Core, task: Task, purpose: str, step: int | None = None) -> None:
    """The global generators too, for methods and models that draw from them."""
    # Where all runs on the CPU its generator alone: asking after each kind of accelerator takes half a millisecond.
    generators = torch.default_generator if learner.device.type == "cpu" else torch
    with ALONE:
        generators.manual_seed(derived_seed(learner.seed, task.index, purpose, step))


def _check_gradients(learner: Core, task: Task) -> None:
    """A parameter that is to be trained and gets no gradient is a request without effect."""
    still = [n for n, p in learner.trainable().items() if p.grad is None]
    idle = still if len(still) == len(learner.trainable()) else [n for n in still if not n.startswith("backbone.")]
    if idle and "conversations" in learner.objective.asks and not _shows(task):
        raise ValueError(
            f"task {task.number}: {len(idle)} trainable parameters get no gradient, the first is {idle[0]}: its "
            "conversations show no image that the towers of images could learn from. Adapt tower='language'"
        )
    if idle:
        raise ValueError(
            f"task {task.number}: {len(idle)} trainable parameters get no gradient, the first is {idle[0]}: the loss "
            "does not depend on them. Is the adapted tower part of the objective? (classify uses the vision tower only)"
        )


def _shows(task: Task) -> bool:
    """Whether there are conversations with images to learn from."""
    return any(each.images for each in getattr(task.train, "records", ()))


def check_finite(learner: Core, task: Task) -> None:
    """Raise `Diverged` when a trained parameter is not finite."""
    bad = [n for n, p in learner.trainable().items() if not torch.isfinite(p).all()]
    if bad:
        raise Diverged(f"training diverged in task {task.number}: {bad[0]} is not finite")
