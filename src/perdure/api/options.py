"""Options of Python calls: fields of a run's configuration, where they say something."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from perdure.formatting import meant

OF_STREAMS = ("stream", "vary", "evaluate", "retain", "shard", "online")
"""Options of a run that say nothing of a learner, which is taught lesson after lesson."""
HELD_OUT = ("early_stop", "early_stop_share", "calibrate")
"""Options that set images with labels apart."""


def check_options(call: str, options: Mapping[str, Any], config: type, idle: Collection[str] = ()) -> None:
    """Refuse options of a `call` that are no fields of the dataclass `config`, with a near name, or would be `idle`."""
    known = [f.name for f in dataclasses.fields(config) if f.name not in idle]
    for name, value in options.items():
        if name in idle:
            raise ValueError(f"{call}({name}={value!r:.60}) has no effect: leave it out")
        if name not in known:
            raise ValueError(f"{call} has no option {name!r}{meant(name, known)}; it has: {', '.join(sorted(known))}")
