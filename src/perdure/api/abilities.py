"""What a learner can be asked for, and how it presents itself."""

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.api.given import Asked, known_task, measurable, shown, told, within
from perdure.core.forgetting import forget_classes
from perdure.core.learner import Core
from perdure.core.manifests import RECORD
from perdure.core.shared_copy import become, twin_of
from perdure.formatting import counted, meant, shortened
from perdure.objectives.zeroshot import class_texts
from perdure.options.ranges import BatchSize, Count, checking, without_effect
from perdure.process import Turn, as_found, plain
from perdure.streams.conversations import Conversation
from perdure.streams.naming import recorded
from perdure.training.config import RunConfig, TrainConfig
from perdure.training.runtime import Runtime
from perdure.training.summary import hashes_at_hand, of_all_tasks, taught_hashes
from perdure.types import Data, Task, class_ids

TOKENS = 256
"""Most of an answer to `ask`, unless said otherwise; what was taught ends by itself."""
_LEAST_STEPS = 60
"""Of a task that is taught by hand, when the number of epochs is left open."""


class Abilities(Core):
    """A core that refuses what it cannot do, in one line."""

    config: RunConfig
    runtime: Runtime
    lessons: Turn
    _folder: Path | None = None
    """Where it was loaded from."""
    _hashes: Mapping[int, Tensor] = {}
    """Of images that its tasks were taught elsewhere: to learners that became this one."""

    @contextmanager
    def lesson(self, call: str) -> Iterator[None]:
        """Within, `call` changes what was learnt: one at a time, with the learner's own threads."""
        with self.lessons, as_found(self.runtime.threads):
            if self.lessons.depth > 1:
                raise ValueError(f"this learner is learning: {call} cannot be called from its progress; call it after")
            yield

    def _taught(self, first: int = 0) -> dict[int, Tensor]:
        """Hashes (n,) of the images of each task learnt from `first` on, by its position, as far as they are known."""
        kept = taught_hashes(self._folder) if self._folder and (self._folder / RECORD).exists() else {}
        known = {**self._hashes, **kept, **hashes_at_hand(self.tasks[first : self.learnt])}
        return {index: hashes for index, hashes in known.items() if first <= index < self.learnt}

    @property
    def known(self) -> dict[str, int]:
        """Name -> id of all classes learnt so far; of captions and conversations, of all tasks."""
        return class_ids(self.tasks)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes learnt so far, in the order of the columns of `predict_proba`."""
        return tuple(self.objective.names)

    def __repr__(self) -> str:
        """One line, where a module would show its hundred layers."""
        tasks = counted(self.learnt, "task")
        if "classes" in self.objective.asks:
            classes = {c for task in self.tasks[: self.learnt] for c in task.classes}
            tasks += f", {counted(len(classes), 'class', 'classes')}"
        return f"{type(self).__name__}({self.config.backbone}, {self.config.method}; {tasks})"

    def __dir__(self) -> list[str]:
        """What is its own: a module has sixty names more, which stay in reach."""
        own = {name for kind in type(self).__mro__ if issubclass(kind, Core) for name in vars(kind)}
        return sorted(name for name in own | {"backbone", "method", "objective"} if name not in _OF_MODULES)

    def usual_training(self) -> TrainConfig:
        """How tasks are trained unless said otherwise."""
        return TrainConfig(**{f.name: getattr(self.config, f.name) for f in dataclasses.fields(TrainConfig)})

    def long_enough(self, train: TrainConfig, task: Task, settled: bool) -> TrainConfig:
        """More passes over a small task, unless the user settled their number: in a few steps nothing is learnt."""
        if settled or self.config.epochs != RunConfig.epochs:
            return train
        steps = math.ceil(len(task.train) / train.batch_size)
        return dataclasses.replace(train, epochs=max(train.epochs, math.ceil(_LEAST_STEPS / steps)))

    @plain()
    @checking("task")
    def evaluate(self, images: Any = None, labels: Any = None, task: str | None = None) -> dict[str, float]:
        """Scores by name, the mean over tasks: of the test images at hand, or of `images` with `labels`.

        Args:
            images: as in `learn`, of classes that were learnt; of a folder, those that this learner was taught are left
                out, with a warning. None measures the test images of the tasks that this object has learnt, or that
                came with their folders.
            labels: a name or number for each image; None for a folder.
            task: name of the task that all of it belongs to, where it is known, see `predict`; without images that
                task alone is measured.

        Raises:
            ValueError: when there is nothing to measure, all images were taught, or a class was not learnt.
        """
        self.check_learnt()
        known = known_task(self, task)
        tasks = [each for each in self.tasks[: self.learnt] if len(each.test)]
        if images is None:
            without_effect("without images", labels=labels)
            tasks = [each for each in tasks if known is None or each.index == known.index]
        else:
            taught = of_all_tasks([self._taught()]) if isinstance(images, str | Path) else None
            given, seen = measurable(self, images, labels, taught)
            tasks = [given]
            if seen:
                warnings.warn(f"{images}: {seen} images were taught to this learner and are left out", stacklevel=3)
        if not tasks:
            raise ValueError("there are no test images at hand: give evaluate(images, labels), or use 'perdure eval'")
        with within(known, self, tasks) as asked:
            found = self.objective.evaluate(self, asked)
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    @plain()
    @checking("tokens", "task")
    def reply(
        self, conversations: Sequence[Conversation], tokens: Count = TOKENS, task: str | None = None
    ) -> list[str]:
        """What it says next in each of `conversations`; see `ask`."""
        self.check_speaks()
        objective: Any = self.objective
        data = told(Asked(conversations), known_task(self, task))
        said: list[str] = objective.answers(self, data, tokens)
        return said

    def check_speaks(self) -> None:
        """Raise a ValueError unless it answers in words."""
        if "conversations" not in self.objective.asks:
            asks = " and ".join(self.objective.asks)
            raise ValueError(
                f"this learner learns {asks} and does not answer in words: use predict or search, or make one with "
                "mllm(path=...) and generate()"
            )

    def check_sees(self, call: str) -> None:
        """Raise a ValueError where `call` is none of what it can be asked, for it answers in words."""
        if "conversations" in self.objective.asks:
            raise ValueError(
                f"this learner answers in words, which {call} does not give: use ask, as "
                "'perdure ask LEARNER cat.jpg \"What is this?\"'"
            )

    def check_calibrated(self, classes: Sequence[str] | None) -> None:
        """Raise a ValueError unless its scores of what was learnt can be calibrated."""
        if classes is not None:
            raise ValueError(
                "calibrated scores are those of what was learnt, and say nothing of other names: leave out calibrated "
                "(--calibrated), or classes (--classes)"
            )
        if not self.temperature:
            raise ValueError(
                "this learner has no temperature, for no images were set apart when it learnt: teach a new one with "
                "calibrate=0.1 (--calibrate 0.1)"
            )

    def class_called(self, name: str) -> int:
        """The id of the class `name`, which can be forgotten.

        Raises:
            ValueError: when it was not learnt, or is the only one.
        """
        if "classes" not in self.objective.asks:
            asks = " and ".join(self.objective.asks)
            raise ValueError(f"this learner learns {asks}, of which nothing can be forgotten: teach a new one without")
        known = self.known
        [spelt] = recorded([name], known)
        if spelt not in known:
            near = meant(spelt, known) or "; 'perdure show' names the classes"
            raise ValueError(f"class {name!r} was not learnt{near}")
        if len(known) == 1:
            raise ValueError(f"{name!r} is the only class left, without which nothing is answered: remove the learner")
        return known[spelt]

    @plain()
    @checking("name")
    def forget(self, name: str) -> Self:
        """Never answer the class `name` again, and let go of what is kept of it; other classes score as before.

        What goes, and what may remain: `docs/quickstart.md`. It can be taught again, as a class that is new.

        Raises:
            ValueError: when it was not learnt, or is the only class.
        """
        with self.lesson("forget"):
            c = self.class_called(name)
            twin = twin_of(self)
            forget_classes(twin, {c})
            become(self, twin)
        return self

    @checking("batch_size", "calibrated", "task")
    def _shares(
        self, images: Any, batch_size: BatchSize, classes: Sequence[str] | None, calibrated: bool, task: str | None
    ) -> tuple[Sequence[str], torch.Tensor]:
        self.check_sees("predict")
        if classes is None:
            self.check_learnt()
            if "classes" not in self.objective.asks:
                raise ValueError(
                    "this learner ranks images and captions and has learnt no classes: name some with "
                    "classes=['a cat', 'a dog'] (--classes), or use search"
                )
        if calibrated:
            self.check_calibrated(classes)
        if classes is not None:
            _check_words(classes)
        known = known_task(self, task, chosen=classes is None)
        data = told(shown(images, self), known)
        names: Sequence[str] = tuple(classes) if classes is not None else (known or self.objective).names
        if not len(data):
            return names, torch.zeros(0, len(names))
        with self.inference():
            if classes is None:
                scores = self.scores_of(data, batch_size)
                if known is not None:
                    scores = scores[:, [self.objective.classes.index(c) for c in known.classes]]
            else:
                texts = class_texts(self, classes, self.objective.templates, task=known)
                scores = self.backbone.logit_scale * self.towards(data, texts, batch_size)
            return names, (scores.float() / (self.temperature.value if calibrated else 1)).softmax(1).cpu().clone()

    def check_learnt(self) -> None:
        """Raise a ValueError before the first task."""
        if all(task.pretext for task in self.tasks[: self.learnt]):
            what = "was only pre-trained, without labels" if self.learnt else "has learnt nothing yet"
            raise ValueError(f"this learner {what}: teach it first, with 'perdure learn' or learn(images, labels)")

    def unread(self, texts: Sequence[str]) -> list[str]:
        """A line for each script of which the text encoder knows nothing, unless this learner was taught words."""
        return [] if "captions" in self.objective.asks else self.backbone.unread(texts)

    def towards(self, data: Data, texts: Tensor, size: int) -> Tensor:
        """Cosines (n, m) of images to unit-length embeddings of texts (m, dim)."""
        features = torch.cat([self.encode(batch) for batch in self.batches(data, size)])
        if features.shape[1] != texts.shape[1]:
            raise ValueError(
                f"the {features.shape[1]} features of {self.method.spec!r} are not in the space of the "
                f"{texts.shape[1]}-dimensional texts: this learner cannot be asked by text"
            )
        return F.normalize(features, dim=1) @ texts.T


def _check_words(classes: Any) -> None:
    """Raise a ValueError for names to choose among that are none, or not different ones."""
    if (
        isinstance(classes, str)
        or not isinstance(classes, Collection)
        or not all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(f"classes={shortened(repr(classes))}: expected a list of names, such as ['a cat', 'a dog']")
    if not len(classes):
        raise ValueError("classes is empty: give at least one name, or None for what was learnt")
    if any(not name.strip() for name in classes):
        raise ValueError(f"classes={shortened(repr(list(classes)))}: a name is empty; leave it out")
    if twice := [name for name in classes if list(classes).count(name) > 1]:
        raise ValueError(
            f"classes: {shortened(twice[0])!r} stands there {list(classes).count(twice[0])} times: keep one"
        )


_OF_MODULES = {name for name in vars(nn.Module) if not name.startswith("__")}
