"""A search for the best options, on a class order that is never reported: trials are runs' folders, Optuna proposes.

Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) with median pruning (Golovin et al., KDD 2017): a trial
whose average accuracy after a task is below the median of the others' at that task is given up.

The study's journal (`study.log`) holds what was proposed and measured; the runs beside it hold the rest. A killed
search goes on with the same command: the trial that was in work is resumed where its run stands.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from perdure import metrics
from perdure.backbones.preprocess import UnreadableImage
from perdure.core import checkpoint
from perdure.core.manifests import check_several
from perdure.experiments.orders import REMEDY, fixed_order
from perdure.experiments.study import (
    STUDY,
    best_score,
    check_same,
    complete_of,
    done_of,
    errors_of,
    next_trial,
    nothing_begun_nothing_left,
    open_study,
    propose_again,
    quiet,
)
from perdure.options.own_methods import OWN_METHODS
from perdure.options.paths import refuse_same
from perdure.options.search_space import Interval, Space, check_space, filled
from perdure.storage import schema
from perdure.training.config import (
    RunConfig,
    TrainConfig,
    flags,
    make_backbone,
    make_method,
    make_objective,
    make_stream,
)
from perdure.training.loop import Progress, Quiet
from perdure.training.run import resume, run
from perdure.training.snapshots import Interrupted
from perdure.types import Row, Task

if TYPE_CHECKING:
    from optuna import Study, Trial

TEXTS = ("method", "backbone", "objective")
"""Options of a run that may have holes."""


class TuneProgress(Progress, Protocol):
    """Progress that is also told of the search."""

    def trial(self, number: int, total: int, options: Mapping[str, Any], best: float | None) -> None:
        """Trial `number` (from 0) of `total` begins with these options; `best` is the best score so far."""


def tune(
    config: RunConfig,
    space: Space,
    out: str | Path,
    *,
    trials: int,
    report_seeds: Sequence[int] = (0, 1, 2),
    progress: TuneProgress | None = None,
) -> dict[str, Any]:
    """Search until `trials` are finished; returns what is also written to `study.json`.

    Args:
        config: of each trial; its seed is the development class order. `method`, `backbone` and `objective` may have
            holes (`lora(rank=?)`), which the space fills.
        space: from `perdure.options.search_space.parse_space`.
        out: folder of the study; finished trials in it count.
        trials: number of trials, finished or given up.
        report_seeds: class orders on which results will be reported: the development order must not be among them.
        progress: who is told.

    Raises:
        ValueError: when the development order is a reported one, the space does not fit, or `out` holds another study.
        Interrupted: after SIGINT or SIGTERM.
    """
    out = Path(out)
    import optuna

    if config.seed in report_seeds:
        free = next(seed for seed in range(100, 101 + len(report_seeds)) if seed not in report_seeds)
        raise ValueError(
            f"--order-seed {config.seed} is among --report-seeds {' '.join(map(str, report_seeds))}: options chosen on "
            f"an order look better on it than they are. Give an order that is not reported, such as {free}"
        )
    settings = [field.name for field in fields(TrainConfig)]
    check_space(space, {name: getattr(config, name) for name in TEXTS}, settings)
    _check_left_open(config, space)
    first = check_ends(config, space)
    asked = {
        "config": config.describe(),
        "space": {name: _described(each) for name, each in space.items()},
        "order_seed": config.seed,
        "report_seeds": list(report_seeds),
    }
    check_several(out)
    refuse_same(out, config.stream)
    with checkpoint.locked(out), nothing_begun_nothing_left(out), quiet(optuna):
        check_same(out, asked)
        checkpoint.write_json(out / STUDY, asked)
        study = open_study(optuna, out)
        propose_again(optuna, study, space)
        if done_of(study) < trials:
            _check_order(first, report_seeds)
        while (done := done_of(study)) < trials:
            _one(optuna, study, config, space, out, progress, (done, trials))
        found = asked | _result(study, config, space, report_seeds, out)
        checkpoint.write_json(out / STUDY, found)
        return found


def _one(
    optuna: Any,
    study: "Study",
    config: RunConfig,
    space: Space,
    out: Path,
    progress: TuneProgress | None,
    place: tuple[int, int],
) -> None:
    """One trial: its options, its run, its score."""
    trial = next_trial(optuna, study, config.seed)
    options = {name: _suggest(trial, name, each) for name, each in space.items()}
    mine = configured(config, options)
    if progress:
        progress.trial(*place, options, best_score(study))
    folder = out / _folder(mine)
    watched = _Watched(trial, progress)
    try:
        if (folder / "run.json").exists():
            if not (folder / "summary.json").exists():  # what has ended costs nothing, and is not given up
                watched.again(folder)
            summary = resume(folder, watched)
        else:
            summary = run(mine, folder, watched)
    except Interrupted as stop:
        said = str(stop).partition(";")[0]
        raise Interrupted(f"{folder.name}: {said}; the same command goes on from here") from stop
    except _Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    except ValueError as error:  # options that do not go together, or training that diverged
        _check_data(mine, error)
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        _refuse_when_none_can_run(study, error)
        return
    trial.set_user_attr("folder", folder.name)
    if summary.get("unlike_scores"):
        raise ValueError(f"there is no one number to search by: {summary['unlike_scores']}")
    study.tell(trial, summary["acc"])


class _Pruned(Exception):
    """This trial is not worth finishing."""


class _Watched(Quiet):
    """Tells the study the average accuracy after each task, and others what they want to see."""

    def __init__(self, trial: "Trial", progress: Progress | None) -> None:
        self.trial, self.inner = trial, progress or Quiet()

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        self.inner.task(task, tasks, epochs, steps)

    def step(self, step: int, loss: Tensor, images: int) -> None:
        self.inner.step(step, loss, images)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def encoded(self, examples: int) -> None:
        self.inner.encoded(examples)

    def scores(self, task: Task, rows: list[Row]) -> None:
        self.inner.scores(task, rows)
        self._report(task, rows)

    def again(self, folder: Path) -> None:
        """What a run has learnt already is told to the study, which takes it for another trial; may raise `_Pruned`."""
        for done in checkpoint.whole(folder):
            self._report(done.tasks[-1], done.rows)

    def _report(self, task: Task, rows: list[Row]) -> None:
        average = metrics.average_after(rows, task.index)
        if average is None:  # old tasks are measured after the last one only: nothing to give up by
            return
        self.trial.report(average, task.index)
        last = task.total is not None and task.index == task.total - 1
        if not last and self.trial.should_prune():
            raise _Pruned


def configured(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """A trial's configuration: holes filled, settings replaced."""
    texts: dict[str, Any] = {name: filled(getattr(config, name), options) for name in TEXTS}
    settings = {name: value for name, value in options.items() if name in {f.name for f in fields(TrainConfig)}}
    return replace(config.but(**settings), **texts)


def _check_left_open(config: RunConfig, space: Space) -> None:
    """Refuse a setting that is given and searched too."""
    for field in fields(TrainConfig):
        if field.name not in space:
            continue
        usual: dict[str, Any] = {field.name: field.default}
        try:
            left_out = replace(config, **usual)
        except ValueError:  # another setting, such as milestones, stands beside this value only
            continue
        if left_out != config:
            value = getattr(config, field.name)
            raise ValueError(f"{field.name}={value!r} has no effect: the space searches {field.name}; leave it out")


def check_ends(config: RunConfig, space: Space) -> RunConfig:
    """Build each end of the space, so that what no option takes is refused before any trial; returns a trial's."""
    ends = {n: (e.low, e.high) if isinstance(e, Interval) else e for n, e in space.items()}
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        for value in values:
            mine = configured(config, first | {name: value})
            make_method(mine.method)
            make_objective(mine.objective, mine.method)
            if mine.backbone != configured(config, first).backbone:
                make_backbone(mine.backbone, mine.method)
    return configured(config, first)


def _check_order(config: RunConfig, report_seeds: Sequence[int]) -> None:
    """Refuse to choose options on the order of tasks that will be reported, whatever the seeds are called."""
    if not report_seeds:
        return
    chosen = "options chosen on the order that is reported look better on it than they are"
    if "order" not in config.vary.split(","):
        raise ValueError(
            f"--vary {config.vary} leaves the order of tasks as it is with every seed: {chosen}. Add order"
        )
    preprocess = make_backbone(config.backbone, config.method).preprocess
    if fixed := fixed_order(config, preprocess, (config.seed, *report_seeds)):
        raise ValueError(f"{fixed}: {chosen}. {REMEDY}")


def _suggest(trial: "Trial", name: str, each: Interval | tuple[Any, ...]) -> Any:
    if isinstance(each, tuple):
        return trial.suggest_categorical(name, each)
    if isinstance(each.low, int) and isinstance(each.high, int):
        return trial.suggest_int(name, each.low, each.high, log=each.log)
    return trial.suggest_float(name, each.low, each.high, log=each.log)


def _described(each: Interval | tuple[Any, ...]) -> Any:
    return list(each) if isinstance(each, tuple) else {"low": each.low, "high": each.high, "log": each.log}


def _folder(config: RunConfig) -> str:
    """A trial's folder is named by what it does, so the same options are never run twice."""
    text = json.dumps(config.describe(), sort_keys=True)
    return f"trial-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _check_data(config: RunConfig, error: ValueError) -> None:
    """Raise `error` when it is not the options' fault but that of what is read: every other trial would have it too."""
    if isinstance(error, schema.Damaged | UnreadableImage):
        raise error
    try:
        backbone = make_backbone(config.backbone, config.method)
    except ValueError:  # it has options that are searched too
        return
    try:
        make_stream(config, backbone.preprocess)
    except ValueError:
        raise error from None


def _refuse_when_none_can_run(study: "Study", error: ValueError) -> None:
    errors = errors_of(study)
    if len(errors) >= 3 and len(errors) == done_of(study):
        raise ValueError(f"none of the first {len(errors)} trials could be run; the last one: {error}") from error


def _result(study: "Study", config: RunConfig, space: Space, report_seeds: Sequence[int], out: Path) -> dict[str, Any]:
    import optuna

    complete, failed = complete_of(study), errors_of(study)
    if not complete:
        raise ValueError(f"no trial was finished: {failed[-1] if failed else 'all were given up'}; change the space")
    rows = sorted(
        ({"score": t.value, "options": t.params, "folder": t.user_attrs["folder"]} for t in complete), key=_by
    )
    importance: dict[str, float] = {}
    if len(complete) > 3 and len({row["score"] for row in rows}) > 1:
        found = optuna.importance.get_param_importances(study)
        importance = {name: float(value) for name, value in found.items()}
    best = configured(config, rows[0]["options"])
    return {
        "trials": rows,
        "pruned": done_of(study) - len(complete) - len(failed),
        "failed": failed,
        "importance": importance,
        "best": rows[0],
        "command": report_command(best, report_seeds, out / "report"),
    }


def _by(row: Mapping[str, Any]) -> tuple[float, str]:
    return -row["score"], row["folder"]


def report_command(best: RunConfig, seeds: Sequence[int], out: Path) -> str:
    """The command line that reports the best options on other class orders."""
    words = ["perdure", "compare", "--methods", best.method, "--seeds", *map(str, seeds), "--out", str(out)]
    own = ["--import", file] if (file := os.environ.get(OWN_METHODS)) else []
    return shlex.join([*words, *flags(best.describe(), ("method", "seed")), *own])
