"""When a run measures what: before its first task, and after each."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from perdure.core.learner import Core, derived_seed
from perdure.core.method import Method, predicts
from perdure.core.objective import Objective
from perdure.core.shared_copy import cast_copy
from perdure.evaluation.answer_examples import answered_after, answered_before, answered_once_learnt
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.held_out import HeldOut
from perdure.evaluation.per_class import Answers
from perdure.evaluation.search_examples import found_after, found_before
from perdure.evaluation.with_task import measured
from perdure.formatting import Aside
from perdure.types import Data, Row, Stream, Subset, Task

_LONGEST = 4
"""Conversations to learn that are read before the stream, of each task and number of images."""


class Evaluation:
    """The measurements of a run, as rows.

    Args:
        stream: all tasks.
        retention: held-out data sets.
        drift: what features were.
        out: the run's folder, for examples of what is found.
        note: is told what takes long.
        most: test examples that are measured of a task other than the newest, before the last task; None for all, 0
            for none.
    """

    def __init__(
        self,
        stream: Stream,
        retention: HeldOut,
        drift: Drift,
        out: Path,
        note: Callable[[str], None],
        most: int | None = None,
    ) -> None:
        self.stream, self.retention, self.drift, self.out, self.note = stream, retention, drift, out, note
        self.most = most
        self._samples: dict[int, Data] = {}  # of test sets, by task: the same object is known to the learner's cache
        self.answered: Answers = {}
        """What was answered to each test image after the last task."""

    def before(self, learner: Core, task: Task) -> list[Row]:
        """Grow for `task`; where a task can be measured unlearnt, measure this one first (forward transfer)."""
        rows: list[Row] = []
        if task.index == 0 and (learner.objective.open_vocabulary or self.retention.sets):
            self.note(Aside("measuring the pre-trained model"))
            rows = self._untaught(learner)
        learner.grow(task)
        if task.index > 0 and len(task.test) and self._open(learner) and not (self._square and self.most != 0):
            rows += self._beside(learner, task.index - 1, self._seen(task.index - 1), task)
        return rows

    def after(self, learner: Core, task: Task, moved: bool = True) -> list[Row]:
        """The tasks learnt so far, in a sequence of data sets also the others; the method's facts; what is retained.

        Args:
            learner: who has learnt `task`.
            task: the last one.
            moved: whether features of old images are others than before it.
        """
        last = len(self.stream) - 1 if self._square and self._open(learner) else task.index
        with learner.inference():
            seen, whole = self._measured(learner, last, task)
            sets = learner.cache.tests([task.test for task in seen], moved)
            tests = [dataclasses.replace(task, test=test) for task, test in zip(seen, sets, strict=True)]
        seen, sources = ([each for each in some if each.index <= task.index] for some in (tests, seen))
        rows = [row for each in self._rows(learner, task.index, seen, sources) for row in each]
        self.answered, learner.objective.answered = learner.objective.answered, {}
        for later in tests[len(seen) :]:
            rows += self._beside(learner, task.index, seen, later)
        rows += self.retention.measure(learner, task.index)
        answered_once_learnt(learner, task, self.out)
        learner.tested = sources
        rows += [Row(task.index, None, k, float(v)) for k, v in learner.method.measures(learner).items()]
        learner.tested = None
        return rows + self.drift.measure(learner, task, [each for each in seen if each.index in whole])

    def end(self, learner: Core) -> None:
        """Examples of what is found now, once all is learnt."""
        for note in (found_after, answered_after):
            note(learner, self.stream, self.out)

    @property
    def _square(self) -> bool:
        """Whether every task is measured after every task, as the MTIL benchmark does."""
        return bool(self.stream.notes.get("sequence"))

    @staticmethod
    def _open(learner: Core) -> bool:
        return learner.objective.open_vocabulary and not predicts(learner.method)

    def _seen(self, last: int) -> list[Task]:
        return [task for task in self.stream.tasks[: last + 1] if len(task.test)]

    def _measured(self, learner: Core, last: int, newest: Task) -> tuple[list[Task], set[int]]:
        """The tasks up to `last` that are measured after `newest`, with what of their tests; which of them whole."""
        found, whole = [], set()
        final = newest.index == len(self.stream) - 1
        for task in self._seen(last):
            if self.most is None or final or task.index == newest.index or len(task.test) <= self.most:
                found.append(task)
                whole.add(task.index)
            elif self.most:
                if task.index not in self._samples:
                    self._samples[task.index] = _sample(learner, task, self.most)
                found.append(dataclasses.replace(task, test=self._samples[task.index]))
        return found, whole

    def _untaught(self, learner: Core) -> list[Row]:
        # a copy, for the weights are not to lose digits before it is known whether they are trained
        backbone = cast_copy(learner.backbone, learner.precision)
        untaught, rows = Core(backbone, copy.copy(learner.objective), Method(), self.stream.scenario), []
        untaught.processes, untaught.store, untaught.fingerprint = learner.processes, learner.store, learner.fingerprint
        if learner.objective.open_vocabulary:
            for each in (task for task in self.stream if not task.pretext):
                untaught.grow(each)
                if longest := getattr(each.train, "longest", None):
                    # what there is no room for is refused now, and not after the tasks before it
                    learner.backbone.prepare(each.train.__getitems__(longest(_LONGEST)))
                if len(each.test):
                    rows += self._beside(untaught, -1, self._seen(each.index - 1), each)
        for note in (found_before, answered_before):
            note(untaught, self.stream, self.out)
        return rows + self.retention.measure(untaught, -1)

    @classmethod
    def _beside(cls, learner: Core, after: int, seen: list[Task], task: Task) -> list[Row]:
        """What is measured on `task`; in a ranking the images and captions of `seen` are searched too."""
        tasks = [*seen, task] if "captions" in learner.objective.asks else [task]
        return cls._rows(learner, after, tasks)[-1]

    @staticmethod
    def _rows(learner: Core, after: int, tasks: list[Task], sources: list[Task] | None = None) -> list[list[Row]]:
        """What is measured on each of `tasks`, which are measured together; see `measured`."""
        found = measured(learner, tasks, sources) if tasks else []
        return [[Row(after, t.index, k, v) for k, v in each.items()] for t, each in zip(tasks, found, strict=True)]


def check_effect(most: int | None, stream: Stream, objective: Objective) -> None:
    """Refuse to leave measurements out, `most` as of `Evaluation`, where there are none, or all are needed.

    Raises:
        ValueError: says why.
    """
    if most is None:
        return
    if "captions" in objective.asks:
        raise ValueError(
            f"--evaluate: {objective.name} searches the images and captions of all tasks so far whenever one is "
            "measured: leave it out"
        )
    square = bool(stream.notes.get("sequence")) and objective.open_vocabulary
    others = [task for task in stream if task.index != len(stream) - 1 and (square or task.index < len(stream) - 2)]
    if not any(len(task.test) > most for task in others):
        why = f"no old task has more than {most} test examples" if others and most else "no task is old before the last"
        raise ValueError(f"--evaluate has no effect on {stream.name or 'this stream'}: {why}: leave it out")


def _sample(learner: Core, task: Task, most: int) -> Data:
    """The same `most` test examples of a task whenever it is asked for, in their order."""
    generator = torch.Generator().manual_seed(derived_seed(learner.seed, task.index, "evaluate"))
    known = learner.cache.test(task.test)
    return Subset(known, torch.randperm(len(known), generator=generator)[:most].sort().values)
