"""What specialists are asked when they are measured: images whose class is known, or questions whose answer is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from perdure.api.folders import tasks_with_data
from perdure.api.given import seen_by, unit_features
from perdure.api.learner import Learner
from perdure.api.specialists import Specialists
from perdure.core import checkpoint
from perdure.objectives.generate import reference_of
from perdure.scoring import Reference, common_top, score_of
from perdure.streams import ConversationSet, ImageSet, build_stream
from perdure.training.loop import Progress
from perdure.training.summary import of_all_tasks, taught_hashes
from perdure.types import Nothing, Task

Said = TypeVar("Said")


class Exam(Protocol, Generic[Said]):
    """Questions to all members who are `able`; `things` says of what kind they are."""

    things: str
    able: list[str]
    owns: Tensor
    """bool (members, n): who was taught what it takes."""

    def ask(self, learner: Learner) -> Said:
        """What a learner says to all of it."""

    def marks(self, said: Said) -> Tensor:
        """What that is worth, (n,): 1 where it is right, 0 where it is wrong."""

    def together(self, said: Sequence[Said]) -> Said | None:
        """What all say together; None where that cannot be averaged."""

    def routed(self) -> list[str]:
        """Who is asked about each, as the team chooses."""


class ClassExam:
    """Images, of which each member says how likely its classes are: shares (n, columns).

    Args:
        team: with members who learnt classes.
        stream: which images, without those that a member was taught; None is all that members were tested on.
        progress: who is told.

    Raises:
        ValueError: when there are no images, or a class is none that a member has learnt.
    """

    things = "images"

    def __init__(self, team: Specialists, stream: str | None, progress: Progress) -> None:
        self.team, self.able = team, team.able("classes")
        self.sets: list[tuple[ImageSet, list[str]]] = []
        for task, _ in _fresh(team, stream, "classes") if stream else _own(team, self.able, progress):
            name = dict(zip(task.classes, task.names, strict=True)).__getitem__
            data: Any = task.test
            self.sets.append((seen_by(data, team.backbone), list(map(name, data.labels.tolist()))))
        truths = [name for _, names in self.sets for name in names]
        if not truths:
            raise _nothing(team, stream, "images")
        if strange := [name for name in truths if name not in team.known]:
            raise ValueError(f"class {strange[0]!r} is none that a member of {team.folder} has learnt")
        self.columns = {name: place for place, name in enumerate(dict.fromkeys((*team.known, *truths)))}
        self.target = torch.tensor([self.columns[name] for name in truths])
        known = [team.members[each].known for each in self.able]
        self.owns = torch.tensor([[name in each for name in truths] for each in known])

    def ask(self, learner: Learner) -> Tensor:
        """See `Exam.ask`."""
        shares, first = torch.zeros(len(self.target), len(self.columns)), 0
        for images, names in self.sets:
            for row, line in enumerate(learner.predict(seen_by(images, learner.backbone)), first):
                for name, share in line:
                    shares[row, self.columns[name]] = share
            first += len(names)
        return shares

    def marks(self, said: Tensor) -> Tensor:
        """See `Exam.marks`."""
        return (said.argmax(1) == self.target).float()

    def together(self, said: Sequence[Tensor]) -> Tensor:
        """The mean of their shares."""
        return torch.stack(list(said)).mean(0)

    def routed(self) -> list[str]:
        """See `Exam.routed`."""
        features = torch.cat([unit_features(self.team.backbone, images) for images, _ in self.sets])
        return self.team._chosen(features, self.able)[0]


class QuestionExam:
    """Questions, which each member answers in words; a team's words cannot be averaged.

    Args:
        team: with members who speak.
        stream: which questions, without those that a member was taught; None is all that members were tested on.
        progress: who is told.

    Raises:
        ValueError: when there are no questions, or their scores have different scales.
    """

    things = "questions"

    def __init__(self, team: Specialists, stream: str | None, progress: Progress) -> None:
        self.team, self.able = team, team.able("conversations")
        objective: Any = team.members[self.able[0]].objective
        found = _fresh(team, stream, "conversations") if stream else _own(team, self.able, progress)
        self.tests: list[ConversationSet] = []
        self.scored: list[tuple[str, list[Reference]]] = []
        owners: list[list[bool]] = []
        for task, of in found:
            test = task.test
            assert isinstance(test, ConversationSet)
            self.tests.append(test)
            score = objective.score_for(task if task.score else objective.planned(task))
            self.scored.append((score, [reference_of(each) for each in _conversations(test)]))
            owners += [[each in of for each in self.able]] * len(test)
        if not owners:
            raise _nothing(team, stream, "questions")
        common_top(score for score, _ in self.scored)
        self.owns = torch.tensor(owners).T

    def ask(self, learner: Learner) -> list[list[str]]:
        """Its answers to each set of questions."""
        objective: Any = learner.objective
        return [objective.answers(learner, test) for test in self.tests]

    def marks(self, said: Sequence[Sequence[str]]) -> Tensor:
        """See `Exam.marks`; the strict score of each answer."""
        pairs = zip(said, self.scored, strict=True)
        grades = [score_of(score).grade(answers, references) for answers, (score, references) in pairs]
        return torch.tensor([mark.strict for grade in grades for mark in grade.marks])

    def together(self, said: Sequence[object]) -> None:
        """Words have no mean."""

    def routed(self) -> list[str]:
        """See `Exam.routed`."""
        return [self.team._speaker(each, self.able) for test in self.tests for each in _conversations(test)]


def exam_of(team: Specialists, stream: str | None, progress: Progress) -> Exam[Any]:
    """Images where a member learnt classes, else questions.

    Raises:
        ValueError: when no member answers either.
    """
    if team.able("classes"):
        return ClassExam(team, stream, progress)
    if team.able("conversations"):
        return QuestionExam(team, stream, progress)
    raise ValueError(f"no member of {team.folder} has learnt classes or answers in words: there is nothing to measure")


def place_of(team: Specialists, name: str) -> Path:
    """Where a member lies."""
    facts = next(each for each in team.record["members"] if each["name"] == name)
    there = Path(facts["folder"])
    return there if there.exists() else team.folder / facts["beside"]


def _nothing(team: Specialists, stream: str | None, things: str) -> ValueError:
    """What to raise where nothing is left to measure on."""
    if stream:
        return ValueError(f"{stream} has no {things} that members of {team.folder} were not taught: give others")
    return ValueError(f"the members of {team.folder} have no test {things} that can be read: give some with --stream")


def _conversations(test: ConversationSet) -> list[Any]:
    found: list[Any] = test.__getitems__(range(len(test)))["conversation"]
    return found


def _own(team: Specialists, able: Sequence[str], progress: Progress) -> list[tuple[Task, list[str]]]:
    """All tasks with a test that members were taught, and by whom each was."""
    found = []
    for name in able:
        learner, folder = team.members[name], place_of(team, name)
        tasks = tasks_with_data(learner, folder, checkpoint.whole(folder), progress.note)[: learner.learnt]
        found += [(task, [name]) for task in tasks if len(task.test)]
    return found


def _fresh(team: Specialists, described: str, gives: str) -> list[tuple[Task, list[str]]]:
    """The tasks of a stream, without what a member was taught, and who knows a task of that name."""
    stream = build_stream(described, team.backbone.preprocess, 0, measured=True)
    if stream.gives != gives:
        raise ValueError(f"{described} gives {stream.gives}: give a stream of {gives}")
    taught = of_all_tasks(taught_hashes(place_of(team, name)) for name in team.members)
    knows = {name: {task.name for task in each.tasks[: each.learnt]} for name, each in team.members.items()}
    found = []
    for task in stream:
        data: Any = task.test
        fresh = (~data.shows(taught)).nonzero().flatten()
        if len(fresh):
            left = dataclasses.replace(task, train=Nothing(), test=data.subset(fresh))
            found.append((left, [name for name in knows if task.name in knows[name]]))
    return found
