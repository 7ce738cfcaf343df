"""Orders of tasks: whether seeds, by which runs are to differ in them, give any other."""

import dataclasses
from collections.abc import Sequence

from perdure.backbones.preprocess import Preprocess
from perdure.reporting.runs import all_specs
from perdure.training.config import RunConfig, make_stream
from perdure.types import Stream

REMEDY = 'Write order="seed" in the stream, by which each seed has its own, or give other seeds'


def fixed_order(config: RunConfig, preprocess: Preprocess, seeds: Sequence[int]) -> str:
    """Says that the stream has its several tasks in one order with all of `seeds`; "" where that is not so."""
    made_up = any(spec.name.endswith("synthetic") for spec in all_specs(config.stream))  # anew by each seed
    if made_up or len(set(seeds)) < 2:
        return ""
    found: list[Stream] = []
    for seed in dict.fromkeys(seeds):
        found.append(make_stream(dataclasses.replace(config, seed=seed, online=False), preprocess))
        if len(found[-1]) < 2 or _order_of(found[-1]) != _order_of(found[0]):
            return ""
    return f"{found[0].name} has one order of tasks with all of the seeds {' '.join(map(str, seeds))}"


def _order_of(stream: Stream) -> list[tuple[str, tuple[str, ...]]]:
    return [(task.name, task.names) for task in stream]
