"""The coloured shapes of the PyPI package easy-vqa as a stream of 24 classes such as "blue circle"."""

import functools
import importlib.resources
import json
import re
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from perdure.backbones.preprocess import Preprocess
from perdure.streams.options import Options, StreamPlan, stream
from perdure.streams.sources import Files
from perdure.streams.task_split import Found, Part, arrange
from perdure.types import Stream

_SHAPES = ("circle", "rectangle", "triangle")
_NEGATIVE = re.compile(r"\b(not|no)\b")


@stream("domain")
def easy_vqa(options: Options) -> StreamPlan:
    """4,000 train and 1,000 test images, 64 × 64, of one coloured shape each; from the package `easy-vqa` (MIT).

    The class of an image, one of 8 colours with one of 3 shapes, follows from the package's questions and answers on
    it; images of which they do not tell enough (534 of the 5,000 in version 1.0) are left out and counted in the
    stream's notes. 8 tasks by default.

    Raises:
        ValueError: when the package is missing.
    """

    def plan(preprocess: Preprocess, seed: int) -> Stream:
        return arrange(_read(), options.by_default(tasks=8), preprocess, seed)

    return plan


def _read() -> Found:
    try:
        folder = importlib.resources.files("easy_vqa") / "data"
    except ModuleNotFoundError as error:
        raise ValueError("the data of easy_vqa is not installed: pip install 'perdure[demo]'") from error
    answers = (folder / "answers.txt").read_text(encoding="utf-8").split()
    colours = sorted(set(answers) - set(_SHAPES) - {"yes", "no"})
    names = tuple(f"{colour} {shape}" for colour in colours for shape in _SHAPES)
    train, test = (_part(folder / part, names) for part in ("train", "test"))
    left_out = {"undetermined_images": train[1] + test[1]} if train[1] or test[1] else {}
    return Found("easy_vqa", train[0], test[0], names, notes=left_out)


def _part(folder: Traversable, names: tuple[str, ...]) -> tuple[Part, int]:
    everything = frozenset(names)
    possible: dict[int, frozenset[str]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        possible[image] = possible.get(image, everything) & _answering(names, question, answer)
    known = {i: names.index(next(iter(rest))) for i, rest in sorted(possible.items()) if len(rest) == 1}
    count = len(known)
    part = Part(
        Files(Path(str(folder)) / "images", [f"{i}.png" for i in known]),
        np.arange(count),
        np.array(list(known.values()), dtype=np.int64),
        np.zeros(count, dtype=np.int64),
    )
    return part, len(possible) - count


@functools.cache  # the package asks 48,248 questions, a few hundred different ones
def _answering(names: tuple[str, ...], question: str, answer: str) -> frozenset[str]:
    words = {name: set(name.split()) for name in names}
    said = set(re.findall("[a-z]+", question)) & set().union(*words.values())
    if answer in ("yes", "no"):
        holds = (answer == "yes") != bool(_NEGATIVE.search(question))
        return frozenset(name for name in names if bool(words[name] & said) == holds)
    # "what is the blue shape?" says the colour and asks for the shape.
    return frozenset(name for name in names if {answer, *said} <= words[name])
