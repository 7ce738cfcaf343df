"""Measurements where it is known which task an example is of, and the method takes what this task has taught."""

from collections.abc import Sequence
from dataclasses import replace

from perdure.core.learner import Core
from perdure.core.method import follows_task
from perdure.metrics import ACCURACY
from perdure.types import Task, Told


def measured(learner: Core, tasks: Sequence[Task], sources: Sequence[Task] | None = None) -> list[dict[str, float]]:
    """What the objective measures on each of `tasks`.

    Where the scenario tells the task, a method that follows it is told; else its accuracy with the task told is
    measured by a pass of its own. Neither where captions are ranked, nor of answers in words, which cost too much to be
    given twice: those are measured with the task told where that is asked for.

    Args:
        learner: who is measured.
        tasks: whose test sets may hold features in place of images.
        sources: the same with images, where they do.
    """
    objective = learner.objective
    told = learner.scenario == "task"
    if not follows_task(learner.method) or not (told or "classes" in objective.asks):
        return objective.evaluate(learner, tasks)
    known = [
        replace(task, test=Told(task.test, task.index)) if task.index < learner.learnt else task
        for task in sources or tasks
    ]
    answers = objective.evaluate(learner, known)
    if told:
        return answers
    name = ACCURACY[1]
    free = objective.evaluate(learner, tasks)
    return [each | {name: other[name]} for each, other in zip(free, answers, strict=True)]
