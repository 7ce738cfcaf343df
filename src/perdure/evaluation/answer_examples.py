"""What a language model answers before a stream, right after each task, and in the end: some questions of each task."""

from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch

from perdure.backbones.preprocess import decode
from perdure.core import checkpoint
from perdure.core.learner import Core
from perdure.evaluation.examples import EXAMPLES, read_examples, thumbnail
from perdure.formatting import shortened
from perdure.objectives.generate import reference_of
from perdure.scoring import Mark, Reference, Score, score_of
from perdure.scoring.captions import CaptionScore, words
from perdure.storage.schema import AskedQuestion, Examples
from perdure.types import Stream, Task

When = Literal["before", "learnt", "end"]
_QUESTIONS = 10  # of a task, spread evenly over its test questions
_PICTURES = 4  # of a question
_LONGEST = 600  # characters of a text


def answered_before(learner: Core, stream: Stream, out: Path) -> None:
    """Choose questions, and note what the pre-trained model answers; nothing for other objectives.

    Args:
        learner: untaught, grown for all tasks of the stream.
        stream: with its test sets.
        out: the run's folder.
    """
    if "conversations" in learner.objective.asks:
        _write(out, _noted(learner, stream, {"questions": [], "pictures": {}}, "before"))


def answered_once_learnt(learner: Core, task: Task, out: Path) -> None:
    """Note what is answered to the questions of `task`, which was learnt just now."""
    if "conversations" in learner.objective.asks and (out / EXAMPLES).exists():
        _write(out, _noted(learner, [task], read_examples(out), "learnt"))


def answered_after(learner: Core, stream: Stream, out: Path) -> None:
    """Note what is answered in the end; answers of tasks whose questions are not at hand any more are dropped."""
    if "conversations" not in learner.objective.asks or not (out / EXAMPLES).exists():
        return
    noted = read_examples(out)
    if noted.get("learnt") == learner.learnt:
        return
    for question in noted.get("questions", ()):
        question["said"].pop("end", None)
        question["right"] = [when for when in question["right"] if when != "end"]
    noted = _noted(learner, stream, noted, "end")
    noted["learnt"] = learner.learnt
    _write(out, noted)


def _noted(learner: Core, tasks: Iterable[Task], noted: Examples, when: When) -> Examples:
    """`noted` with what `learner` says now to the questions of `tasks`, chosen where none were yet."""
    objective: Any = learner.objective
    for task in tasks:
        if not len(task.test):
            continue
        count = min(_QUESTIONS, len(task.test))
        places = torch.tensor([number * len(task.test) // count for number in range(count)])
        with learner.inference():
            batch = next(learner.batches(task.test, count, places))
            said = objective.say(learner, batch)
        references = [reference_of(each) for each in batch["conversation"]]
        score = score_of(objective.score_for(task))
        right = map(partial(_is_right, score), said, references, score.grade(said, references).marks)
        known = [each for each in noted.get("questions", ()) if each["task"] == task.index]
        if not known:
            known = [_question(task, each, noted["pictures"]) for each in batch["conversation"]]
            noted["questions"] = [*noted.get("questions", ()), *known]
        for question, answer, is_right in zip(known, said, right, strict=True):
            question["said"][when] = shortened(answer, _LONGEST)
            question["right"] = sorted({*question["right"], when} if is_right else {*question["right"]} - {when})
    return noted


def _is_right(score: Score, answer: str, reference: Reference, mark: Mark) -> bool:
    """Whether it got the highest mark, or is a caption in the words of a true one, whatever CIDEr makes of it."""
    same = isinstance(score, CaptionScore) and words(answer) in map(words, reference.answers)
    return mark.form == "parsed" and (same or mark.strict >= score.top * (1 - 1e-6))


def _question(task: Task, conversation: Mapping[str, Any], pictures: dict[str, str]) -> AskedQuestion:
    """A question without answers; its thumbnails are added to `pictures`."""
    reference, names = reference_of(conversation), []
    for image in conversation.get("images", ())[:_PICTURES]:
        small = thumbnail(decode(image, str(conversation.get("where", "a conversation"))))
        names.append(sha256(small.encode()).hexdigest()[:16])
        pictures[names[-1]] = small
    truth = [shortened(answer, _LONGEST) for answer in dict.fromkeys(reference.answers)]
    asked = shortened(reference.question, _LONGEST)
    return {"task": task.index, "question": asked, "truth": truth, "pictures": names, "said": {}, "right": []}


def _write(out: Path, noted: Examples) -> None:
    checkpoint.write_sealed(out / EXAMPLES, {name: value for name, value in noted.items() if name != "seal"})
