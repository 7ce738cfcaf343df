"""The learner as people use it: create, teach, ask, save, load, export."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from perdure import checkpoint
from perdure.augment import AUGMENTS
from perdure.config import RunConfig, check_options, make_backbone, make_method, make_objective
from perdure.learner import Core
from perdure.run import (
    Interrupted,
    facts_of,
    learn_stream,
    nothing_learnt_nothing_left,
    read_record,
    record,
    summarise,
)
from perdure.runtime import Runtime, resolve
from perdure.spec import parse
from perdure.streams import ImageSet, build_stream, folder_task, given_task
from perdure.streams.draws import digest
from perdure.streams.sources import Picture
from perdure.train import Diverged, Progress, Quiet, TrainConfig, fit_task, predict_scores
from perdure.types import Data, Row, Stream, Task

OPEN = ""
"""The stream of a learner that is taught one folder after another."""

_SPECS = ("backbone", "method", "objective")
_FIXED = (*_SPECS, "seed", "precision", "attention", "device")
_SOURCE = "source.json"
_WORDS = {"folder": "folders", "train_sha256": "images"}


_LEAST_STEPS = 60
"""Of a task that is taught by hand, when the number of epochs is left open."""


class Learner(Core):
    """A pre-trained model that goes on learning.

    learner = Learner.create("pocket()", "inflora(rank=10)")
    learner.learn(images, labels)
    learner.predict(["cat.jpg"])      # [[("cat", 0.93), ("dog", 0.04), ...]]
    learner.save("my.learner")
    """

    config: RunConfig
    runtime: Runtime
    _facts: dict[str, Any]

    @classmethod
    def create(
        cls, backbone: str = "pocket()", method: str = "inflora(rank=10)", objective: str = "classify()", **options: Any
    ) -> Self:
        """A learner that has learnt nothing yet.

        Args:
            backbone: the pre-trained model, in the mini-language.
            method: how it learns.
            objective: what is asked of it.
            options: fields of `RunConfig`: epochs, lr, batch_size, seed, precision, ...

        Raises:
            ValueError: for names and options that do not exist.
        """
        check_options("create", options, RunConfig)
        return cls._build(RunConfig(stream=OPEN, backbone=backbone, method=method, objective=objective, **options))

    @classmethod
    def _build(cls, config: RunConfig, runtime: Runtime | None = None, scenario: Any = "class") -> Self:
        method, objective = make_method(config.method), make_objective(config.objective)
        backbone = make_backbone(config.backbone)
        if runtime is None:
            runtime = resolve(backbone, config.precision, config.attention, config.batch_size, config.device)
        runtime.apply(backbone)
        learner = cls(backbone, objective, method, scenario, config.seed)
        learner.precision, learner.augment = runtime.dtype, AUGMENTS[config.augment]
        learner.config, learner.runtime = config, runtime
        learner._facts = {}
        return learner

    @property
    def known(self) -> dict[str, int]:
        """Class name -> id of everything learnt so far."""
        return dict(zip(self.objective.names, self.objective.classes, strict=True))

    def learn(
        self,
        images: Sequence[Picture] | torch.Tensor | str | Path,
        labels: Sequence[str | int] | torch.Tensor | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """One more task.

        Args:
            images: Pillow images, paths, uint8 arrays (H, W, 3) or a uint8 tensor (n, 3, H, W); or the path of a folder
                of class folders.
            labels: a name or number for each image; None for a folder.
            progress: who is told.
            options: fields of `TrainConfig`, for this task only.

        Raises:
            ValueError: for images, labels or options that cannot be used.
        """
        check_options("learn", options, TrainConfig)
        train = dataclasses.replace(self._train_config(), **options)
        index = self.learnt
        if isinstance(images, str | Path):
            if labels is not None:
                raise ValueError(f"{images} is a folder, whose sub-folders are the labels; leave labels out")
            task = folder_task(images, self.backbone.preprocess, self.known, index, seed=self.seed)
        elif labels is None:
            raise ValueError("labels are missing: give a name or number for each image")
        else:
            task = given_task(_several(images), labels, self.backbone.preprocess, self.known, index)
        _check_first(self, task, self.known, "labels" if labels is not None else str(images))
        train = self._long_enough(train, task, "epochs" in options)
        self.grow(task)
        self._facts = facts_of(fit_task(self, task, train, progress), 0.0)
        return self

    def predict(
        self, images: Sequence[Picture] | torch.Tensor, top: int | None = None, batch_size: int = 256
    ) -> list[list[tuple[str, float]]]:
        """Class names with scores, best first, for each image; scores of an image add up to 1.

        Args:
            images: as in `learn`.
            top: how many names; all when None.
            batch_size: images at once; the answer does not depend on it.

        Raises:
            ValueError: when nothing was learnt yet, or an image cannot be read.
        """
        if not self.learnt:
            raise ValueError("this learner has learnt nothing yet: call learn(images, labels) first")
        images = _several(images)
        if not len(images):
            return []
        data = ImageSet.of(images, [0] * len(images), self.backbone.preprocess)
        with self.inference():
            shares = predict_scores(self, data, batch_size).softmax(1).cpu()
        best = shares.topk(min(top or shares.shape[1], shares.shape[1]), dim=1)
        names = self.objective.names
        return [
            [(names[i], float(share)) for i, share in zip(where, line, strict=True)]
            for where, line in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def save(self, folder: str | Path, rows: Sequence[Row] = ()) -> Path:
        """Write what was learnt to `folder`, new or of this learner; to save twice without learning changes nothing.

        Args:
            folder: where to.
            rows: measurements made after the last task, for the report.

        Raises:
            ValueError: when nothing was learnt yet, or the folder holds another learner.
        """
        folder = Path(folder)
        if not self.learnt:
            raise ValueError("this learner has learnt nothing yet: there is nothing to save")
        with checkpoint.locked(folder):
            if not (folder / "run.json").exists():
                checkpoint.write_json(folder / "run.json", self._record())
            elif read_record(folder)["config"] != self.config.describe():
                raise ValueError(f"{folder} holds another learner; save to a new folder")
            done = checkpoint.whole(folder)
            before = done[-1].learnt if done else 0
            if done and checkpoint.holds(done[-1], self):
                return folder
            if before >= self.learnt or (done and done[-1].tasks != self.tasks[:before]):
                raise ValueError(f"{folder} has learnt something else since; save to a new folder")
            gap = {"alone": True} if before < self.learnt - 1 else {}
            checkpoint.save_task(folder, self, list(rows), self._facts | gap)
            checkpoint.write_json(folder / "summary.json", summarise(folder, Stream(OPEN, self.scenario, ())))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The learner of a folder, as it was after its last whole task; a run's folder or a saved learner's.

        Raises:
            ValueError: when the folder is not a learner, is damaged, or its backbone has changed.
        """
        learner = cls._from(Path(folder))
        done = checkpoint.whole(Path(folder))
        if not done:
            raise ValueError(f"{folder} has no learnt task yet: go on with 'perdure resume {folder}'")
        checkpoint.restore(learner, done[-1])
        return learner

    @classmethod
    def _from(cls, folder: Path) -> Self:
        written = read_record(folder)
        known = {f.name for f in dataclasses.fields(RunConfig)}
        config = RunConfig(**{k: v for k, v in written["config"].items() if k in known})
        return cls._build(config, Runtime(**written["resolved"]), written["stream"]["scenario"])

    def export(self, folder: str | Path, to: str) -> Path:
        """Write the model for other libraries: `peft` or `merged`; see `perdure.export`."""
        from perdure.export import export

        return export(self, Path(folder), to)

    def _record(self) -> dict[str, Any]:
        return record(self.config, self, Stream(OPEN, self.scenario, ()), self.runtime)

    def _train_config(self) -> TrainConfig:
        return TrainConfig(**{f.name: getattr(self.config, f.name) for f in dataclasses.fields(TrainConfig)})

    def _long_enough(self, train: TrainConfig, task: Task, settled: bool) -> TrainConfig:
        """More passes over a small task, unless the user settled their number: in a few steps nothing is learnt."""
        if settled or self.config.epochs != RunConfig.epochs:
            return train
        steps = math.ceil(len(task.train) / train.batch_size)
        return dataclasses.replace(train, epochs=max(train.epochs, math.ceil(_LEAST_STEPS / steps)))


def teach_folder(
    photos: Path,
    into: Path,
    config: RunConfig,
    given: Mapping[str, Any],
    progress: Progress | None = None,
    skip_bad: bool = False,
) -> tuple[Task, dict[str, Any]]:
    """Teach the learner in folder `into` one more task; it is made when it is not there.

    Like a run, it is saved within the task and goes on where it was stopped when it is called again. Tasks learnt from
    folders that are still there are evaluated again, and their examples can be replayed.

    Args:
        photos: folder of class folders.
        into: the learner's folder.
        config: for a new learner.
        given: what of `config` the user asked for; it must agree with a learner that is already there.
        progress: who is told.
        skip_bad: leave unreadable images out and report them.

    Raises:
        ValueError: for a folder that cannot be learnt from, options that would have no effect, or a damaged learner.
        Interrupted: after SIGINT or SIGTERM.
    """
    progress = progress or Quiet()
    with checkpoint.locked(into):
        there = (into / "run.json").exists()
        if there:
            learner = Learner._from(into)
            _refuse_without_effect(into, learner.config, given)
        else:
            learner = Learner._build(dataclasses.replace(config, stream=OPEN))
        trained = {k: v for k, v in given.items() if k in {f.name for f in dataclasses.fields(TrainConfig)}}
        train = dataclasses.replace(learner._train_config(), **trained)
        before = _tasks_with_data(learner, into, progress)
        known = {name: c for task in before for name, c in zip(task.names, task.classes, strict=True)}
        task = folder_task(photos, learner.backbone.preprocess, known, len(before), skip_bad, learner.seed)
        _check_first(learner, task, known, str(photos))
        train = learner._long_enough(train, task, "epochs" in given)
        source = _source(photos, task, skip_bad) | {"options": trained}
        _refuse_other_task(into, len(before), source)
        if not there:
            checkpoint.write_json(into / "run.json", learner._record())
        _place_source(into, len(before), source)
        stream = Stream(OPEN, learner.scenario, (*before, task), {"skipped": _skipped((*before, task))})
        facts = {"source": source}
        try:
            with nothing_learnt_nothing_left(into):
                return task, learn_stream(train, learner, stream, into, progress, learner.config.save_every, facts)
        except Interrupted as stop:
            said = str(stop).partition(";")[0]
            raise Interrupted(
                f"{said}; go on with 'perdure learn {photos} --into {into}' and the same options"
            ) from stop
        except Diverged as error:
            shutil.rmtree(into / f"task-{len(before):03d}", ignore_errors=True)  # of no use to go on from
            raise ValueError(f"{error}: teach it again with a lower --lr than {train.lr:g}") from error


def _tasks_with_data(learner: Learner, folder: Path, progress: Progress) -> list[Task]:
    """The tasks already learnt, with their data where it is still at hand."""
    done = checkpoint.whole(folder)
    if not done:
        return []
    declared: tuple[Task, ...] = ()
    if learner.config.stream != OPEN:
        declared = build_stream(learner.config.stream, learner.backbone.preprocess, learner.config.seed).tasks
        if done[-1].learnt < len(declared):
            raise ValueError(
                f"{folder} has learnt {done[-1].learnt} of its stream's {len(declared)} tasks: finish it with "
                f"'perdure resume {folder}' before it learns more"
            )
    sources = {each.learnt - 1: each.manifest.get("source") for each in done}
    tasks: list[Task] = []
    for described in done[-1].tasks:
        task = declared[described.index] if described.index < len(declared) else described
        if source := sources.get(described.index):
            known = {name: c for t in tasks for name, c in zip(t.names, t.classes, strict=True)}
            task = _again(source, described, learner, known)
            if not len(task.train):
                progress.note(
                    f"{source['folder']} is gone or has changed since it was learnt (task {described.index + 1}): it "
                    "is not evaluated again, and its images cannot be replayed"
                )
        tasks.append(task if task == described else described)
    return tasks


def _again(source: Mapping[str, Any], described: Task, learner: Learner, known: Mapping[str, int]) -> Task:
    """A task with its data, read again; without when that is not what was learnt."""
    if not Path(source["folder"]).is_dir():
        return described
    try:
        task = folder_task(
            source["folder"], learner.backbone.preprocess, known, described.index, source["skip_bad"], learner.seed
        )
    except ValueError:  # no folder of classes any more
        return described
    # A memory refers to images by their position.
    return task if task == described and _digest(task.train) == source["train_sha256"] else described


def _source(photos: Path, task: Task, skip_bad: bool) -> dict[str, Any]:
    return {
        "folder": str(photos.resolve()),
        "skip_bad": skip_bad,
        "train_sha256": _digest(task.train),
        "skipped": _skipped([task]),
    }


def _digest(data: Data) -> str:
    """Of which images there are, in their order."""
    if not isinstance(data, ImageSet):
        return ""
    return digest(data.source.key(row) for row in data.rows.tolist())


def _skipped(tasks: Sequence[Task]) -> list[str]:
    sets = [data for task in tasks for data in (task.train, task.test) if isinstance(data, ImageSet)]
    return [where for data in sets for where in data.skipped]


def _refuse_without_effect(into: Path, config: RunConfig, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        made = getattr(config, name)
        if name in _FIXED and value != made and (name not in _SPECS or parse(value) != parse(made)):
            raise ValueError(
                f"{into} was made with {name}={made!r}; {value!r} would have no effect: leave it out, or teach a new "
                "learner"
            )


def _refuse_other_task(into: Path, index: int, source: Mapping[str, Any]) -> None:
    """What was stopped within a task goes on with the same images and options only."""
    begun = into / f"task-{index:03d}"
    if checkpoint.latest_step(into, index) is None or not (begun / _SOURCE).is_file():
        return
    before = json.loads((begun / _SOURCE).read_text(encoding="utf-8"))
    if before != source:
        changed = next(key for key in before if before[key] != source.get(key))
        raise ValueError(
            f"{into} was stopped while it learnt {before['folder']}, and now the {_WORDS.get(changed, changed)} "
            f"differ: give the same to finish that, or remove {begun} to give it up"
        )


def _place_source(into: Path, index: int, source: Mapping[str, Any]) -> None:
    begun = into / f"task-{index:03d}"
    begun.mkdir(exist_ok=True)
    checkpoint.write_json(begun / _SOURCE, source)


def _check_first(learner: Learner, task: Task, known: Mapping[str, int], where: str) -> None:
    if not known and len(task.classes) < 2 and not learner.objective.open_vocabulary:
        raise ValueError(f"{where}: one class only, {task.names[0]!r}; a first task needs at least two")


def _several(images: Any) -> Any:
    """A sequence of images from what may be one of them."""
    one = isinstance(images, str | Path | Image.Image)
    # (H, W, 3) is one picture; several grey ones are (n, H, W).
    one = one or (isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (3, 4))
    return [images] if one else images
