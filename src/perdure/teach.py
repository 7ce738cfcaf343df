"""The learner as people use it: create, teach, ask, save, load, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from perdure import checkpoint
from perdure.augment import AUGMENTS
from perdure.config import RunConfig, make_backbone, make_method, make_objective
from perdure.learner import Core
from perdure.run import learn_stream, read_record, record
from perdure.runtime import Runtime, resolve
from perdure.streams import ImageSet, build_stream, folder_task, given_task
from perdure.streams.sources import Picture
from perdure.train import Progress, Quiet, TrainConfig, fit_task, predict_scores
from perdure.types import Row, Stream, Task

OPEN = ""
"""The stream of a learner that is taught one folder after another."""


class Learner(Core):
    """A pre-trained model that goes on learning.

    learner = Learner.create("pocket()", "inflora(rank=10)")
    learner.learn(images, labels)
    learner.predict(["cat.jpg"])      # [[("cat", 0.93), ("dog", 0.04), ...]]
    learner.save("my.learner")
    """

    config: RunConfig
    runtime: Runtime

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
        known = {f.name for f in dataclasses.fields(RunConfig)}
        if strange := [name for name in options if name not in known]:
            raise ValueError(f"Learner.create has no option {strange[0]!r}; it has: {', '.join(sorted(known))}")
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
        train = dataclasses.replace(self._train_config(), **options)
        index = self.learnt
        if isinstance(images, str | Path):
            if labels is not None:
                raise ValueError(f"{images} is a folder, whose sub-folders are the labels; leave labels out")
            task = folder_task(images, self.backbone.preprocess, self.known, index, seed=self.seed)
        elif labels is None:
            raise ValueError("labels are missing: give a name or number for each image")
        else:
            task = given_task(images, labels, self.backbone.preprocess, self.known, index)
        self.grow(task)
        fit_task(self, task, train, progress)
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
        """Write what was learnt to `folder`, new or of this learner.

        Raises:
            ValueError: when nothing was learnt since the last save there, or the folder holds another learner.
        """
        folder = Path(folder)
        if not self.learnt:
            raise ValueError("this learner has learnt nothing yet: there is nothing to save")
        with checkpoint.locked(folder):
            if not (folder / "run.json").exists():
                checkpoint.write_json(folder / "run.json", self._record())
            elif read_record(folder)["config"] != self.config.describe():
                raise ValueError(f"{folder} holds another learner; save to a new folder")
            checkpoint.save_task(folder, self, list(rows), {})
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
    """
    with checkpoint.locked(into):
        if (into / "run.json").exists():
            learner = Learner._from(into)
            for name, value in given.items():
                fixed = name in ("backbone", "method", "objective", "seed", "precision", "attention", "device")
                if fixed and value != getattr(learner.config, name):
                    raise ValueError(
                        f"{into} was made with {name}={getattr(learner.config, name)!r}; {value!r} would have no "
                        "effect: leave it out, or teach a new learner"
                    )
            train = dataclasses.replace(
                learner._train_config(),
                **{k: v for k, v in given.items() if k in {f.name for f in dataclasses.fields(TrainConfig)}},
            )
        else:
            learner = Learner._build(dataclasses.replace(config, stream=OPEN))
            train = learner._train_config()
            checkpoint.write_json(into / "run.json", learner._record())
        before = _tasks_with_data(learner, into)
        known = {name: c for task in before for name, c in zip(task.names, task.classes, strict=True)}
        task = folder_task(photos, learner.backbone.preprocess, known, len(before), skip_bad, learner.seed)
        if len(before) == 0 and len(task.classes) < 2 and config.objective.startswith("classify"):
            raise ValueError(f"{photos} has one class only, {task.names[0]!r}; a first task needs at least two")
        stream = Stream(OPEN, learner.scenario, (*before, task))
        facts = {"source": {"folder": str(photos.resolve()), "skip_bad": skip_bad}}
        return task, learn_stream(train, learner, stream, into, progress or Quiet(), config.save_every, facts)


def _tasks_with_data(learner: Learner, folder: Path) -> list[Task]:
    """The tasks already learnt, with their data where it is still at hand."""
    tasks: list[Task] = []
    done = checkpoint.whole(folder)
    declared: tuple[Task, ...] = ()
    if learner.config.stream != OPEN and done:
        declared = build_stream(learner.config.stream, learner.backbone.preprocess, learner.config.seed).tasks
    for checkpointed in done:
        described = checkpointed.tasks[-1]
        source = checkpointed.manifest.get("source")
        task = declared[described.index] if described.index < len(declared) else described
        if source and Path(source["folder"]).is_dir():
            known = {name: c for t in tasks for name, c in zip(t.names, t.classes, strict=True)}
            task = folder_task(
                source["folder"], learner.backbone.preprocess, known, described.index, source["skip_bad"], learner.seed
            )
        # A folder that changed since cannot give back the examples that were learnt.
        tasks.append(task if task == described else described)
    return tasks
