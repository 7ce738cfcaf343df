"""What people give a learner in Python: examples of a task, and questions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.base import Backbone
from perdure.core.learner import Core
from perdure.core.method import follows_task, parts_of
from perdure.core.pretext import make_pretext
from perdure.formatting import meant
from perdure.options.paths import anchored
from perdure.streams import (
    ConversationSet,
    ImageSet,
    captioned_task,
    conversation_task,
    folder_task,
    given_captions,
    given_conversations,
    given_task,
)
from perdure.streams.conversations import Conversation, messages
from perdure.streams.single_task import COLUMN
from perdure.streams.sources import listed
from perdure.streams.unlabelled import given_unlabelled, unlabelled_task
from perdure.types import Batch, Data, Nothing, Task, Told, Union, class_ids, to


class Sees(Protocol):
    """A learner, or specialists: who has images looked at as its backbone wants them."""

    @property
    def backbone(self) -> Backbone:
        """The model that looks."""
        ...


_BESIDE = {"classes": "labels", "captions": "captions", "conversations": "conversations"}
"""What an objective asks for -> how it is called in `Learner.learn`."""


def task_of(
    learner: Core,
    images: Any,
    known: Mapping[str, int],
    tell: Callable[[str], None] = lambda _: None,
    **beside: Any,
) -> Task:
    """The task that is given to `Learner.learn`.

    Args:
        learner: who is to learn it.
        images: see there; a path is that of a folder or file.
        known: name -> id of what was learnt so far.
        tell: is told what to know of a folder or file.
        beside: `labels`, `captions` and `conversations`, None where they were left out.

    Raises:
        ValueError: when it cannot be used, or would have no effect.
    """
    asks = min(learner.objective.asks)
    wanted, objective = _BESIDE[asks], learner.objective.name
    if idle := [name for name, value in beside.items() if value is not None and name != wanted]:
        raise ValueError(f"{idle[0]} have no effect with {objective}, which learns {asks}: give {wanted}=[...]")
    given, preprocess, index = beside[wanted], learner.backbone.preprocess, learner.learnt
    if isinstance(images, str | Path):
        return _read(learner, images, given, asks, known, tell)
    if given is None:
        each = {"labels": "a name or number", "captions": "a text, or several,"}.get(wanted)
        raise ValueError(f"{wanted} are missing: give {f'{each} for each image' if each else 'a list, or a file'}")
    if asks == "conversations":
        if images is not None:
            raise ValueError("images stand in the conversations: give learn(conversations=[...]) alone")
        return given_conversations(given, known, index, tell)
    if images is None:
        raise ValueError("images are missing: give pictures, or the path of a folder")
    make: Any = given_task if asks == "classes" else given_captions
    made: Task = make(several(images), given, preprocess, known, index)
    return made


def pretraining_task(learner: Core, images: Any, pretext: str, captions: Any, replay: str | Path | None = None) -> Task:
    """The step of pre-training that is given to `Learner.pretrain`; arguments as there.

    Raises:
        ValueError: when it cannot be used, or would have no effect.
    """
    preprocess, index, pretext = learner.backbone.preprocess, learner.learnt, anchored(pretext)
    reads = make_pretext(pretext).captions
    if captions is not None and not reads:
        raise ValueError(f"captions have no effect with {pretext}: write pretext='contrast()', or leave them out")
    if replay is not None and (reads or not isinstance(images, str | Path)):
        idle = pretext if reads else "images that are given themselves"
        raise ValueError(f"replay={str(replay)!r} has no effect with {idle}: put old ones among them, or leave it out")
    if isinstance(images, str | Path):
        if not (captions is None or isinstance(captions, str)):
            raise ValueError(f"{images} is a file, which has the captions; give the name of their column, or none")
        column = (captions or COLUMN) if reads else None
        return unlabelled_task(images, preprocess, index, pretext, column, replay, seed=learner.seed)
    if reads and captions is None:
        raise ValueError("captions are missing: give a text, or several, for each image")
    return given_unlabelled(several(images), captions, preprocess, index, pretext)


def untaught(data: Data, known: Tensor) -> tuple[Data, int]:
    """`data` without what shows one of the images whose hashes are known, and how many these were."""
    if not (isinstance(data, ImageSet | ConversationSet) and len(known)):
        return data, 0
    seen = data.shows(known)
    return data.subset((~seen).nonzero().flatten()), int(seen.sum())


def measurable(learner: Core, images: Any, labels: Any, taught: Tensor | None) -> tuple[Task, int]:
    """What is given to `Learner.evaluate`, as a task whose images are tests.

    Args:
        learner: who is measured.
        images: given, with `labels`.
        labels: of the images.
        taught: hashes of images that are left out; None leaves out none.

    Returns:
        The task, and how many images were left out.

    Raises:
        ValueError: when it cannot be used, all images were taught, or a class was not learnt.
    """
    if "classes" not in learner.objective.asks:
        raise ValueError(
            f"evaluate(images, labels) measures classes, which {learner.objective.name} does not learn: measure a file "
            "with 'perdure eval'"
        )
    known = class_ids(learner.tasks[: learner.learnt])
    found = task_of(learner, images, known, labels=labels)
    if unknown := [name for name in found.names if name not in known]:
        raise ValueError(f"class {unknown[0]!r} was not learnt{meant(unknown[0], known)}; leave its images out")
    parts = [(part, 0) if taught is None else untaught(part, taught) for part in (found.train, found.test)]
    tests, count = [part for part, _ in parts if len(part)], sum(seen for _, seen in parts)
    if not tests:
        raise ValueError(f"{images}: all {count} images were taught to this learner: measure on others")
    return replace(found, train=Nothing(), test=tests[0] if len(tests) == 1 else Union(tests)), count


def _read(
    learner: Core, path: str | Path, given: Any, asks: str, known: Mapping[str, int], tell: Callable[[str], None]
) -> Task:
    place = learner.backbone.preprocess, known, learner.learnt
    if asks == "classes":
        if given is not None:
            raise ValueError(f"{path} is a folder, whose sub-folders are the labels; leave labels out")
        return folder_task(path, *place, seed=learner.seed, tell=tell)
    if asks == "conversations":
        if given is not None:
            raise ValueError(f"{path} has the conversations; leave conversations= out")
        return conversation_task(path, known, learner.learnt, tell=tell)
    if not (Path(path).is_dir() or Path(path).suffix in (".jsonl", ".parquet")):
        raise ValueError(
            f"{path} is no parquet or JSONL file of images and captions: give pictures as a list, [{str(path)!r}]"
        )
    if not (given is None or isinstance(given, str)):
        raise ValueError(f"{path} is a file, which has the captions; give the name of their column, or none")
    return captioned_task(path, *place, given, tell=tell)


def known_task(learner: Core, name: str | None, chosen: bool = True) -> Task | None:
    """The task called `name`, of which an answer is wanted; None where it is not known.

    Args:
        learner: who answers.
        name: of a task that it has learnt.
        chosen: whether answers are chosen among the classes that were learnt.

    Raises:
        ValueError: when none is called so, or the answer would be the same.
    """
    if name is None:
        return None
    names = [task.name for task in learner.tasks[: learner.learnt]]
    if name not in names:
        taught = [task.name for task in learner.tasks[: learner.learnt] if not task.pretext]
        near = meant(name, taught) or f"; it has learnt: {', '.join(map(repr, taught)) or 'nothing'}"
        raise ValueError(f"this learner has no task {name!r}{near}")
    if names.count(name) > 1:  # of versions that let folders of one name be tasks of one name
        numbers = " and ".join(str(i + 1) for i, each in enumerate(names) if each == name)
        raise ValueError(
            f"tasks {numbers} of this learner are both called {name!r}, which does not say one: leave it out"
        )
    found = learner.tasks[names.index(name)]
    if found.pretext:
        raise ValueError(f"task {name!r} is a step of pre-training, which taught nothing to be asked for: leave it out")
    if "classes" in learner.objective.asks and not found.classes:
        raise ValueError(f"all classes of task {name!r} were forgotten: leave it out")
    fewer = chosen and "classes" in learner.objective.asks and {*found.classes} != {*learner.objective.classes}
    if not fewer and not follows_task(learner.method):
        raise ValueError(
            f"task={name!r} has no effect: {learner.method.spec!r} answers the same whatever the task; leave it out"
        )
    return found


def told(data: Data, known: Task | None) -> Data:
    """`data`, all of which belongs to the task that is `known`, if any."""
    return data if known is None else Told(data, known.index)


@contextmanager
def within(known: Task | None, learner: Core, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    """`tasks` as they are measured while a `learner` is told that all of it belongs to the task `known`, if any.

    Raises:
        ValueError: when one has a class that this task has not.
    """
    if known is None:
        yield tasks
        return
    names = dict(zip(learner.objective.classes, learner.objective.names, strict=True))
    with learner.turn:
        scenario = learner.scenario
        try:
            if "classes" in learner.objective.asks:
                learner.scenario = "task"  # no other classes compete
                if strange := [names[c] for task in tasks for c in task.classes if c not in known.classes]:
                    raise ValueError(f"class {strange[0]!r} is none of task {known.name!r}: measure it without task")
                tasks = [replace(task, classes=known.classes, names=known.names) for task in tasks]
            yield [replace(task, test=Told(task.test, known.index)) for task in tasks]
        finally:
            learner.scenario = scenario


def check_first(learner: Core, task: Task, known: Mapping[str, int], where: str) -> None:
    """Refuse a first task that has nothing to tell apart."""
    if not known and len(task.classes) < 2 and not learner.objective.open_vocabulary:
        raise ValueError(f"{where}: one class only, {task.names[0]!r}; a first task needs at least two")
    rehearsed = learner.learnt and any(part.rehearses for part in parts_of(learner.method))
    if "captions" in learner.objective.asks and len(task.train) < 2 and not rehearsed:
        raise ValueError(f"{where}: one image only; images are told apart from each other, so give at least two")


def shown(images: Any, learner: Sees) -> ImageSet:
    """The images to look at, one or several."""
    if isinstance(images, ImageSet):
        return images
    images = listed(several(images), "images")
    for each in images if isinstance(images, list | tuple) else ():
        if isinstance(each, str | Path) and Path(each).is_dir():
            raise ValueError(f"{each} is a folder: give its images, as list(Path({str(each)!r}).rglob('*.jpg'))")
    return ImageSet.queries(images, learner.backbone.preprocess)


def several(images: Any) -> Any:
    """A sequence of images from what may be one of them."""
    one = isinstance(images, str | Path | Image.Image)
    # (H, W, 3) and (H, W, 1) are one picture; several grey ones are (n, H, W).
    one = one or (isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] in (1, 3, 4))
    return [images] if one else images


class Asked:
    """Conversations that wait for an answer; implements `perdure.types.Data`."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.labels = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Under "conversation" those at `positions`."""
        return {"conversation": [self.conversations[i] for i in positions]}


def asked(images: Any, questions: str | Sequence[str], learner: Sees) -> list[Conversation]:
    """A conversation for each question.

    Args:
        images: of one question, which may be None, one or several; of a list of questions, a list of such, or None.
        questions: one or several.
        learner: who is asked.

    Raises:
        ValueError: for an empty question, an image that cannot be read, or another number of images than questions.
    """
    if isinstance(questions, str):
        return [_conversation(images, questions, learner)]
    if not hasattr(questions, "__len__"):
        raise ValueError(f"question: got {questions!r:.60}, expected a text, or a list with one for each of the images")
    if len(questions) == 0 and images is not None and several(images) is not images:  # one image
        raise ValueError("question: got an empty list for an image, expected a text that says what you want to know")
    questions = listed(questions, "question")
    shown = [None] * len(questions) if images is None else listed(images, "images")
    if len(shown) != len(questions):
        raise ValueError(
            f"images: got {len(shown)} for {len(questions)} questions, expected an image, several, or None for each"
        )
    return [_conversation(each, question, learner) for each, question in zip(shown, questions, strict=True)]


def _conversation(images: Any, question: str, learner: Sees) -> Conversation:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}: say what you want to know")
    pictures = [] if images is None else decoded(images, learner)
    return Conversation(messages([("user", (*[None] * len(pictures), question.strip()))]), pictures)


def decoded(images: Any, learner: Sees) -> list[Image.Image]:
    """One or several images as they are, of any size."""
    source = shown(images, learner).source
    return [source.read(row) for row in range(len(source))]


def seen_by(data: ImageSet, backbone: Backbone) -> ImageSet:
    """The same images as `backbone` wants to see them."""
    return ImageSet(data.source, data.rows, data.labels, backbone.preprocess)


@torch.inference_mode()
def unit_features(encoder: Backbone, data: ImageSet, batch_size: int = 256) -> Tensor:
    """What `encoder` makes of images: features (n, d) of unit length, float32 on the CPU."""
    device, found = next(encoder.parameters()).device, [torch.zeros(0, encoder.dim)]
    for start in range(0, len(data), batch_size):
        batch = to(encoder.prepare(data.__getitems__(range(start, min(start + batch_size, len(data))))), device)
        found.append(F.normalize(encoder(batch).float(), dim=1).cpu())
    return torch.cat(found)
