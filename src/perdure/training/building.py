"""What a configuration names, put together and checked before anything is learnt."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from perdure.adapters.injection import detach
from perdure.backbones.base import Backbone
from perdure.backbones.language import Language
from perdure.core.feature_store import FeatureStore
from perdure.core.learner import Core
from perdure.core.objective import asking
from perdure.core.processes import Processes
from perdure.evaluation.schedule import check_effect
from perdure.streams.augment import AUGMENTS, check_views
from perdure.training.config import (
    RunConfig,
    make_backbone,
    make_method,
    make_objective,
    make_stream,
    measured_between,
)
from perdure.training.early_stop import check_trains
from perdure.training.loop import check_shared_out
from perdure.training.online import check_borders
from perdure.training.runtime import Runtime, resolve
from perdure.types import Stream, Task

C = TypeVar("C", bound=Core)


def build_run(config: RunConfig, runtime: Runtime | None, processes: Processes) -> tuple[Core, Stream, Runtime]:
    """The learner, and the stream as it is learnt, its tasks as the objective plans them."""
    learner, runtime = build_learner(Core, config, runtime, processes)
    objective = learner.objective
    stream = make_stream(config, learner.backbone.preprocess)
    check_gives(stream, learner, config.stream, f", or use --objective {asking(stream.gives)}")
    learner.scenario = stream.scenario
    return learner, replace(stream, tasks=tuple(map(objective.planned, stream))), runtime


def build_learner(
    kind: type[C], config: RunConfig, runtime: Runtime | None = None, processes: Processes | None = None
) -> tuple[C, Runtime]:
    """What `config` names, put together and made ready to compute; its stream is not built.

    Args:
        kind: class of the learner.
        config: of the run.
        runtime: how to compute; None resolves what `config` leaves open.
        processes: those that learn together; None is this one alone.
    """
    processes = processes or Processes()
    method, objective = make_method(config.method), make_objective(config.objective, config.method)
    if config.online:
        check_borders(method)
    backbone = make_backbone(config.backbone, config.method)
    if runtime is None:
        runtime = resolve(backbone, config.precision, config.attention, config.device, processes.world)
    runtime.apply(backbone)
    learner = kind(backbone, objective, method, seed=config.seed_of("start"))
    learner.precision, learner.augment, learner.calibrate = runtime.dtype, AUGMENTS[config.augment], config.calibrate
    learner.processes = processes
    if config.shard != "none" and processes.world == 1:
        raise ValueError(f"shard={config.shard!r} has no effect in one process: give --processes, or leave it out")
    if config.cache and processes.world > 1:
        raise ValueError(f"--cache {config.cache} is for runs in one process: leave it out, or --processes")
    if config.cache:
        facts = json.dumps(runtime.describe(), sort_keys=True) + torch.__version__
        learner.store = FeatureStore(Path(config.cache), int(config.cache_bytes), facts)
    learner.online = config.online
    if config.compile:
        check_compile(config, learner)
        learner.compiles = True
    check_shared_out(learner, config)
    return learner, runtime


def check_compile(config: RunConfig, learner: Core) -> None:
    """Refuse `--compile` where it cannot be.

    Raises:
        ValueError: with the reason and the remedy.
    """
    if isinstance(learner.backbone, Language):
        raise ValueError("--compile is for vision encoders: texts are of another length in every step. Leave it out")
    if config.shard != "none":
        raise ValueError(f"--compile and shard={config.shard!r}: blocks held in parts are not compiled; leave one out")
    learner.backbone.blocks()  # or it says what it has


def check_gives(stream: Stream, learner: Core, described: str, remedy: str = "") -> None:
    """Refuse a stream, `described` so, that has not what the objective asks for; `remedy` is what else to do."""
    if stream.gives not in (asks := learner.objective.asks):
        asked, name = " or ".join(asks), learner.objective.name
        raise ValueError(f"{name} learns {asked}, which {described} has not: give a stream of {asked}{remedy}")


def dry_run(config: RunConfig, backbone: Backbone, stream: Stream) -> None:
    """Grow for all tasks of `stream` as training would, by their descriptions alone.

    Args:
        config: of the run.
        backbone: as it was pre-trained, and so it is left.
        stream: its images are not read.

    Raises:
        ValueError: for what a task of `stream` would be refused with when its turn comes.
    """
    objective, method = make_objective(config.objective, config.method), make_method(config.method)
    check_effect(measured_between(config.evaluate), stream, objective)
    check_views(config.augment, objective.asks)
    learner = Core(backbone, objective, method, stream.scenario, config.seed_of("start"))
    learner.sharded = config.shard != "none"
    learner.online, learner.compiles = config.online, config.compile
    try:
        for task in stream:
            described = Task.described(task.describe())
            learner.grow(described)
            learner.method.check(learner, described)
        check_shared_out(learner, config)
        check_trains(learner, config)
        idle = {f"accumulate={config.accumulate}": config.accumulate > 1, "--compile": config.compile}
        for option, given in idle.items():
            if given and learner.constant_encoder:
                raise ValueError(f"{option} has no effect where no part trains the encoder: leave it out")
    finally:
        detach(backbone)
        backbone.requires_grad_(False)


def unread_names(learner: Core, tasks: Iterable[Task]) -> list[str]:
    """A line for each script that names of classes are written in and the text encoder that is to read them cannot."""
    if {"classes"} != set(learner.objective.asks) or "text" not in learner.objective.towers:
        return []
    return learner.backbone.unread([name for task in tasks for name in task.names])
