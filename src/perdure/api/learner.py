"""The learner as people use it: create, teach, ask, save, load, export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, overload

import torch

from perdure.api.abilities import TOKENS, Abilities
from perdure.api.given import asked, check_first, known_task, pretraining_task, shown, task_of, told
from perdure.api.lesson_source import found_now, given_source, nothing_learnt, sources_facts
from perdure.api.options import HELD_OUT, OF_STREAMS, check_options
from perdure.core import checkpoint
from perdure.core.checkpoint import read_record
from perdure.core.manifests import holds_no_task, manifest_paths, refuse_team
from perdure.core.shared_copy import as_now, become, part, twin_of
from perdure.evaluation.calibration import fit, set_apart
from perdure.export.model import export
from perdure.objectives.zeroshot import class_texts
from perdure.options.ranges import BatchSize, Count, checking
from perdure.process import Turn, as_found, plain
from perdure.storage.replacement import drafted, settle
from perdure.storage.schema import LessonSource
from perdure.streams import ImageSet
from perdure.streams.single_task import free_name
from perdure.streams.sources import Picture
from perdure.training.building import build_learner
from perdure.training.config import RunConfig, former_parts
from perdure.training.defaults import for_lessons
from perdure.training.early_stop import watching
from perdure.training.loop import Progress, Quiet, TrainConfig, fit_task, told_by
from perdure.training.record import check_method, record_of, recorded_config, recorded_runtime, write_record
from perdure.training.runtime import Runtime
from perdure.training.summary import COSTS, facts_of, taught_files, write_summary
from perdure.types import Row, Stream, Task

OPEN = ""
"""The stream of a learner that is taught one folder after another."""


class Learner(Abilities):
    """A pre-trained model that goes on learning.

    ```python
    learner = Learner.create("pocket()", "inflora(rank=10)")
    learner.learn(images, labels)
    learner.predict(["cat.jpg"])      # one list of (name, score) an image, best first
    learner.save("my.learner")
    ```

    Every method can be called from any thread. While one learns, the others answer, save and export by what was learnt
    before; a task that fails or is interrupted leaves the learner as it was.
    """

    config: RunConfig
    _facts: dict[str, Any]
    _sources: dict[int, LessonSource]

    @classmethod
    @checking("backbone", "method", "objective")
    def create(
        cls, backbone: str = "pocket()", method: str | None = None, objective: str | None = None, **options: Any
    ) -> Self:
        """A learner that has learnt nothing yet.

        Args:
            backbone: the pre-trained model, in the option syntax.
            method: how it learns; None is probe + align, or LoRA for a language model.
            objective: what is asked of it; None is classify(), or generate() for a language model.
            options: fields of `RunConfig`: epochs, lr, batch_size, seed, precision, ...

        Raises:
            ValueError: for names and options that do not exist.
        """
        check_options("Learner.create", options, RunConfig, OF_STREAMS)
        given = {name: value for name, value in (("method", method), ("objective", objective)) if value is not None}
        settings = for_lessons(backbone, objective) | given | options
        config = RunConfig(stream=OPEN, backbone=backbone, **settings)
        if old := former_parts(config):
            warnings.warn(old, FutureWarning, stacklevel=2)
        return cls.of(config)

    @classmethod
    @plain()
    def of(cls, config: RunConfig, runtime: Runtime | None = None) -> Self:
        """A learner that has learnt nothing yet, from its configuration."""
        config = config.settled()
        learner, found = build_learner(cls, config, runtime)
        learner.online = False  # a lesson is announced, also where a pass without borders was before
        learner.config, learner.runtime, learner.lessons = config, found, Turn()
        learner._facts, learner._sources = {}, {}
        learner.objective.bind(learner)  # a language model answers before it has learnt anything
        return learner

    @classmethod
    def untaught(cls, folder: Path, device: str | None = None) -> Self:
        """The learner of a folder, as it was before its first task; on `device` instead of its own."""
        written = read_record(folder)
        config = recorded_config(folder, written)
        check_method(folder, config)
        learner = cls.of(config, recorded_runtime(folder, written, device))
        learner.scenario = written["stream"]["scenario"]
        return learner

    @plain()
    def learn(
        self,
        images: Sequence[Picture] | torch.Tensor | str | Path | None = None,
        labels: Sequence[str | int] | torch.Tensor | None = None,
        progress: Progress | None = None,
        captions: Sequence[str | Sequence[str]] | str | None = None,
        conversations: Sequence[Any] | None = None,
        **options: Any,
    ) -> Self:
        """One more task.

        Args:
            images: Pillow images, paths, uint8 arrays (H, W, 3) or a uint8 tensor (n, 3, H, W); or the path of a folder
                of class folders, with `retrieve` of a parquet or JSONL file of images and captions, with `generate` of
                a file of conversations.
            labels: with classes, a name or number for each image; None for a folder.
            progress: who is told; to it, too, the learner answers by what it knew before.
            captions: with `retrieve`, a text or several for each image; of a file, the column that holds them.
            conversations: with `generate`, entries as in a file, which hold their images as paths or Pillow images.
            options: fields of `TrainConfig`, for this task only.

        Raises:
            ValueError: for images, labels or options that cannot be used.
        """
        check_options("Learner.learn", options, TrainConfig)
        train = self.usual_training().but(**options)
        with self.lesson("learn"):
            known = self.known
            beside = {"labels": labels, "captions": captions, "conversations": conversations}
            task = task_of(self, images, known, told_by(progress).note, **beside)
            given = "captions" if labels is None else "labels"
            check_first(self, task, known, str(images) if isinstance(images, str | Path) else given)
            task = self.objective.planned(task)
            train = self.long_enough(train, task, "epochs" in options)
            self._learn(task, train, progress, given_source(self, images, task, options, {"captions": captions}))
        return self

    @plain()
    @checking("pretext", "replay")
    def pretrain(
        self,
        images: Sequence[Picture] | torch.Tensor | str | Path,
        pretext: str = "masked()",
        captions: Sequence[str | Sequence[str]] | str | None = None,
        progress: Progress | None = None,
        replay: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """One step of pre-training: images without labels teach what makes features, and no head is touched.

        Args:
            images: as in `learn`; of a folder all images in it and below, whatever its folders are called.
            pretext: what is learnt, `masked()`, `distill()` or `contrast()`; see `perdure.pretraining`.
            captions: with `contrast()`, a text or several for each image; of a file, the column that holds them.
            progress: who is told.
            replay: with a folder, one of images of the old domain, mixed in as a fifth of what is learnt.
            options: fields of `TrainConfig`; the schedule is warmup-cosine unless said otherwise.

        Raises:
            ValueError: for what cannot be used, and where a part of the method needs labels.
        """
        check_options("Learner.pretrain", options, TrainConfig, HELD_OUT)
        no_stop = {"early_stop": 0, "early_stop_share": None}
        train = self.usual_training().but(**no_stop | {"schedule": "warmup-cosine"} | options)
        with self.lesson("pretrain"):
            task = pretraining_task(self, images, pretext, captions, replay)
            reading = {"pretext": pretext, "captions": captions, "replay": replay and str(replay)}
            source = given_source(self, images, task, options, reading)
            self._learn(task, self.long_enough(train, task, "epochs" in options), progress, source)
        return self

    def _learn(self, task: Task, train: TrainConfig, progress: Progress | None, source: LessonSource | None) -> None:
        """Teach a twin, and become it; `source` says where the task came from."""
        task = replace(task, name=free_name(task.name, [each.name for each in self.tasks[: self.learnt]]))
        twin = twin_of(self)
        task, watched = set_apart(self, task, train.held_out, "early_stop_share")
        learnt, held = set_apart(self, task)
        twin.grow(learnt)
        part(twin, self)
        twin._facts = facts_of(fit_task(twin, learnt, train, progress, early=watching(twin, watched, train)), 0.0)
        twin._sources = self._sources | ({task.index: source} if source else {})
        fit(twin, held)
        become(self, twin)

    @plain()
    @checking("top")
    def predict(
        self,
        images: Sequence[Picture] | torch.Tensor | ImageSet,
        top: Count | None = None,
        batch_size: BatchSize = 256,
        classes: Sequence[str] | None = None,
        calibrated: bool = False,
        task: str | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Class names with scores, best first, for each image; scores of an image add up to 1.

        They are the softmax of what the method answers with (logits, cosines, ...): an order, and no probability. Only
        `calibrated` ones are meant as how often such an answer is right.

        Args:
            images: as in `learn`, or an image set.
            top: how many names; all when None.
            batch_size: images at once; the answer does not depend on it.
            classes: names to choose among, whatever was learnt, by a text tower; None answers with what was learnt.
            calibrated: divide the answers by the temperature that images set apart from training have asked for.
            task: name of the task that the images belong to, where it is known: only its classes are answered, and a
                method that chooses by the image what a task has taught takes that of this one.

        Raises:
            ValueError: when nothing was learnt yet, an image cannot be read, or the backbone has no text tower for
                `classes`.
        """
        names, shares = self._shares(images, batch_size, classes, calibrated, task)
        best = shares.topk(min(top or shares.shape[1], shares.shape[1]), dim=1)
        return [
            [(names[i], float(share)) for i, share in zip(where, line, strict=True)]
            for where, line in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @plain()
    def predict_proba(
        self,
        images: Sequence[Picture] | torch.Tensor | ImageSet,
        batch_size: BatchSize = 256,
        classes: Sequence[str] | None = None,
        calibrated: bool = False,
        task: str | None = None,
    ) -> torch.Tensor:
        """The scores of `predict` as a tensor (n, classes) on the CPU, rows that add up to 1; arguments as there.

        Columns are in the order of `class_names`, of `classes` where these are given, or of the names of `task`.
        """
        return self._shares(images, batch_size, classes, calibrated, task)[1]

    @plain()
    @checking("text", "top", "batch_size", "task")
    def search(
        self,
        images: Sequence[Picture] | torch.Tensor | ImageSet,
        text: str,
        top: Count = 5,
        batch_size: BatchSize = 256,
        task: str | None = None,
    ) -> list[tuple[int, float]]:
        """Which of `images` fit `text` best: their positions with the cosine of image and text, best first.

        Args:
            images: as in `learn`.
            text: what is looked for, in any language that the text tower knows.
            top: how many.
            batch_size: images at once; the answer does not depend on it.
            task: name of the task that images and text belong to, where it is known; see `predict`.

        Raises:
            ValueError: when the text is empty, an image cannot be read, or the backbone has no text tower.
        """
        self.check_sees("search")
        if not text.strip():
            raise ValueError("the text to search for is empty: say what to look for")
        known = known_task(self, task, chosen=False)
        data = told(shown(images, self), known)
        if not len(data):
            return []
        with self.inference():
            cosines = self.towards(data, class_texts(self, [text], ("{}",), task=known), batch_size)[:, 0].cpu()
        best = cosines.topk(min(top, len(cosines)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @overload
    def ask(self, images: Any, question: str, tokens: int = ..., task: str | None = ...) -> str: ...
    @overload
    def ask(self, images: Any, question: Sequence[str], tokens: int = ..., task: str | None = ...) -> list[str]: ...
    @plain()
    @checking("tokens", "task")
    def ask(
        self, images: Any, question: str | Sequence[str], tokens: Count = TOKENS, task: str | None = None
    ) -> str | list[str]:
        """What it answers to a question about images, or to several questions.

        Args:
            images: None, one or several, as in `learn`; for a list of questions a list of such, or None.
            question: in words; the images stand before it.
            tokens: most tokens of an answer.
            task: name of the task that the question belongs to, where it is known; see `predict`.

        Raises:
            ValueError: when this learner does not answer in words, a question is empty or an image cannot be read.
        """
        self.check_speaks()
        said = self.reply(asked(images, question, self), tokens, task)
        return said[0] if isinstance(question, str) else said

    @plain()
    @checking("folder")
    def save(self, folder: str | Path, rows: Sequence[Row] = ()) -> Path:
        """Write what was learnt to `folder`, new or of this learner; to save twice without learning changes nothing.

        While another thread teaches it, what it knew before is written.

        Args:
            folder: where to.
            rows: measurements made after the last task, for the report.

        Raises:
            ValueError: when nothing was learnt yet, or the folder holds another learner.
        """
        folder, now = Path(folder), as_now(self)
        if not now.learnt:
            raise ValueError("this learner has learnt nothing yet: there is nothing to save")
        with checkpoint.locked(folder):
            settle(folder)
            if not (folder / "run.json").exists() or holds_no_task(folder):
                refuse_team(folder)
                if manifest_paths(folder, "task"):
                    raise ValueError(f"{folder} has lost its run.json: restore it, or save to a new folder")
                with drafted(folder) as draft:
                    write_record(draft, now.record())
                    now._write(draft, rows)
            elif recorded_config(folder, read_record(folder)) != now.config:
                raise ValueError(f"{folder} holds another learner; save to a new folder")
            else:
                now._write(folder, rows)
        return folder

    def _write(self, folder: Path, rows: Sequence[Row]) -> None:
        """The task that was learnt last, beside the record of this learner."""
        done = checkpoint.whole(folder)
        before = done[-1].learnt if done else 0
        if not (done and checkpoint.matches(done[-1], self)):
            if before >= self.learnt or (done and done[-1].tasks != self.tasks[:before]):
                raise ValueError(f"{folder} has learnt something else since; save to a new folder")
            new = self.tasks[before : self.learnt]
            facts = self._facts | sources_facts(self._sources, new) | ({"alone": True} if len(new) > 1 else {})
            taught = taught_files(self._taught(before), new[-1].index)
            checkpoint.save_task(folder, self, list(rows), facts, taught)
        # also when nothing was to be saved: a process may have been killed before it came here
        checkpoint.write_results(folder, checkpoint.whole(folder))
        write_summary(folder, Quiet().note)

    @classmethod
    @plain()
    @checking("folder", "device")
    def load(cls, folder: str | Path, device: str | None = None) -> Self:
        """The learner of a folder, as it was after its last whole task; a run's folder or a saved learner's.

        Args:
            folder: where from.
            device: to compute on; None is the one that it was made on.

        Raises:
            ValueError: when the folder is not a learner, is damaged, or its backbone has changed.
        """
        read_record(Path(folder))
        done = checkpoint.whole(Path(folder))  # before the model is read, which may take longer
        if not done:
            raise nothing_learnt(Path(folder))
        learner = cls.untaught(Path(folder), device)
        with as_found(learner.runtime.threads):
            checkpoint.restore(learner, done[-1])
        learner._facts = {k: v for k, v in done[-1].manifest.items() if k in COSTS}
        learner._sources = {i: found_now(source, Path(folder)) for i, source in checkpoint.sources(done).items()}
        learner._folder = Path(folder)
        return learner

    @plain()
    @checking("folder", "to")
    def export(self, folder: str | Path, to: str) -> Path:
        """Write the model for other libraries: `peft`, `merged`, `transformers`, `onnx` or `torch`.

        See `perdure.export.model`.
        """
        return export(as_now(self), Path(folder), to)

    def record(self) -> dict[str, Any]:
        """The content of run.json, for a learner that is taught without a declared stream."""
        return record_of(self.config, self, Stream(OPEN, self.scenario, ()), self.runtime)
