"""When a run measures what: before its first task, and after each."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

from perdure.core.learner import Core
from perdure.core.method import Method, predicts
from perdure.evaluation.answer_examples import answered_after, answered_before, answered_once_learnt
from perdure.evaluation.feature_drift import Drift
from perdure.evaluation.held_out import HeldOut
from perdure.evaluation.search_examples import found_after, found_before
from perdure.types import Data, Row, Stream, Task

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
    """

    def __init__(
        self, stream: Stream, retention: HeldOut, drift: Drift, out: Path, note: Callable[[str], None]
    ) -> None:
        self.stream, self.retention, self.drift, self.out, self.note = stream, retention, drift, out, note
        self._kept: dict[int, Data] = {}  # features of test sets, by task, while nothing moves them

    def before(self, learner: Core, task: Task) -> list[Row]:
        """Grow for `task`; where a task can be measured unlearnt, measure this one first (forward transfer)."""
        rows: list[Row] = []
        if task.index == 0 and (learner.objective.open_vocabulary or self.retention.sets):
            self.note("measuring the pre-trained model")
            rows = self._untaught(learner)
        learner.grow(task)
        if task.index > 0 and len(task.test) and self._open(learner) and not self._square:
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
            seen = self._seen(last)
            sets = learner.cache.tests([task.test for task in seen], moved)
            tests = [dataclasses.replace(task, test=test) for task, test in zip(seen, sets, strict=True)]
        seen = [each for each in tests if each.index <= task.index]
        rows = [row for each in self._rows(learner, task.index, seen) for row in each]
        for later in tests[len(seen) :]:
            rows += self._beside(learner, task.index, seen, later)
        rows += self.retention.measure(learner, task.index)
        answered_once_learnt(learner, task, self.out)
        rows += [Row(task.index, None, k, float(v)) for k, v in learner.method.measures(learner).items()]
        return rows + self.drift.measure(learner, task, seen)

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

    def _untaught(self, learner: Core) -> list[Row]:
        # in float32: the weights are not to lose digits before it is known whether they are trained
        untaught, rows = Core(learner.backbone, copy.copy(learner.objective), Method(), self.stream.scenario), []
        if learner.objective.open_vocabulary:
            for each in self.stream:
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
        tasks = [task] if "classes" in learner.objective.asks else [*seen, task]
        return cls._rows(learner, after, tasks)[-1]

    @staticmethod
    def _rows(learner: Core, after: int, tasks: list[Task]) -> list[list[Row]]:
        """What the objective measures on each of `tasks`, which are measured together."""
        found = learner.objective.evaluate(learner, tasks) if tasks else []
        return [[Row(after, t.index, k, v) for k, v in each.items()] for t, each in zip(tasks, found, strict=True)]
