"""A learner whose backbone reads larger images or longer texts from now on: what it has learnt stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.api.learner import Learner
from perdure.core import checkpoint
from perdure.core.checkpoint import read_record
from perdure.core.manifests import latest_step, recorded_size
from perdure.formatting import command
from perdure.options.spec import changed, parse_one
from perdure.process import plain
from perdure.training.record import recorded_config, recorded_runtime, write_size


@plain()
def resize(folder: str | Path, **options: Any) -> str:
    """Write down that the learner in `folder` reads something else from now on; returns its backbone.

    Adapters, prompts and heads do not know how many tokens there are, so they go on where they were, on a backbone of
    the same weights with other positions (`perdure.backbones.positions`). Statistics that a method keeps of features
    (`ncm`, `ranpac`, `align`) stay those of the old size.

    Args:
        folder: a learner's or a run's.
        options: of its backbone, such as size=112; None leaves one as it is.

    Raises:
        ValueError: when none is given or all are as they were, the backbone has no such option or cannot read that,
            what was learnt does not fit it (an encoder that was trained itself, with its positions), or a task was
            begun.
    """
    folder = Path(folder)
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        raise ValueError("nothing to change: give --size, --length, or --rope with --factor")
    written = read_record(folder)
    with checkpoint.locked(folder):
        done = checkpoint.whole(folder)
        if not done:
            raise ValueError(f"{folder} has no learnt task yet: make a learner with these options of its backbone")
        if latest_step(folder, done):
            raise ValueError(f"{folder} was stopped within a task: end it first with {command('resume', folder)}")
        config = recorded_config(folder, written)
        read = dict(parse_one(config.backbone).kwargs)
        config = replace(config, backbone=changed(config.backbone, **given))
        learner = Learner.of(config, recorded_runtime(folder, written))
        learner.scenario = written["stream"]["scenario"]
        reads = dict(parse_one(learner.backbone.spec).kwargs)
        if any(all(read.get(name) == now.get(name) for name in given) for now in (given, reads)):
            raise ValueError(f"{folder} reads that already, on {learner.backbone.spec}: there is nothing to change")
        if learner.fingerprint.partition(" ")[0] != done[-1].manifest["backbone"].partition(" ")[0]:
            raise ValueError(f"{learner.backbone.spec} has other weights than {folder} stands on: it keeps its size")
        try:
            checkpoint.restore(learner, done[-1])
        except ValueError as error:
            if not learner.tunes_backbone:
                raise
            raise ValueError(
                f"{folder} has trained the encoder itself, positions and all, which cannot have another number of "
                "them: export it with --to merged, and give the export's backbone the new size"
            ) from error
        write_size(folder, recorded_size(folder) | given)
        return learner.backbone.spec
