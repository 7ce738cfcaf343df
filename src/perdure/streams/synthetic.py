"""Streams of random pictures: no disk, no download, every seed another world; for tests and first steps."""

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from perdure.backbones.preprocess import Preprocess
from perdure.formatting import human_bytes
from perdure.options.ranges import Count, Range, checked
from perdure.streams.image_set import Captioned, ImageSet
from perdure.streams.options import StreamPlan
from perdure.streams.splits import digest, noted
from perdure.types import Scenario, Stream, Task

_SYLLABLES = tuple(first + second for second in "aeiou" for first in "bdfgklmnprst")
_PHRASES = ("a {0} of {1}", "{1}: one {0}", "the {0} ({1})", "{0}, {1}", "{1}, look: {0}")

_MOST_PICTURES, _MOST_BYTES = 10**5, 2**27
Tasks = Annotated[int, Range(1, 1000)]
Side = Annotated[int, Range(1, 512)]
"""Of pictures, in pixels."""
Noise = Annotated[float, Range(0, 100)]
"""Standard deviation, where that of the pictures is 1."""


@checked
def synthetic(
    tasks: Tasks = 3,
    classes_per_task: Count = 3,
    per_class: Count = 16,
    test_per_class: Count = 10,
    size: Side = 16,
    noise: Noise = 0.7,
    scenario: Scenario = "class",
) -> StreamPlan:
    """Images drawn around one random picture a class; with scenario="domain" each domain adds a picture of its own.

    Args:
        tasks: number of tasks.
        classes_per_task: new ones in every task; with scenario="domain" the same ones in every task.
        per_class: train images of a class in a task.
        test_per_class: test images of a class in a task.
        size: side of the pictures, in pixels; they are resized to what the backbone wants.
        noise: standard deviation of the noise, where that of the pictures is 1.
        scenario: "class", "task" or "domain".

    Raises:
        ValueError: when a number is out of its range, there are too many pictures, or there is only one class.
    """
    _not_too_many(tasks * classes_per_task * (per_class + test_per_class), size)
    if classes_per_task * (1 if scenario == "domain" else tasks) < 2:
        raise ValueError(f"classes_per_task={classes_per_task}: only one class in all; a stream needs at least 2")

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        def part(t: int, classes: tuple[int, ...], kind: str, count: int) -> ImageSet:
            labels = torch.tensor(classes).repeat_interleave(count)
            centres = {c: _picture(size, seed, f"class {c}") for c in classes}
            if scenario == "domain":
                shift = _picture(size, seed, f"domain {t}")
                centres = {c: centre + shift for c, centre in centres.items()}
            grain = _noise((len(labels), 3, size, size), seed, f"{kind} {t}")
            pictures = grain.mul_(noise).add_(torch.stack([centres[c] for c in labels.tolist()]))
            return ImageSet.of(_bytes(pictures), labels, preprocess)

        made = []
        for t, classes in enumerate(_classes(tasks, classes_per_task, scenario)):
            names = tuple(f"picture {c}" for c in classes)
            title = f"domain {t}" if scenario == "domain" else f"{t}: {names[0]} ... ({len(names)} classes)"
            train, test = part(t, classes, "train", per_class), part(t, classes, "test", test_per_class)
            made.append(Task(t, title, classes, names, tasks, train, test))
        return noted("synthetic", scenario, made, {"kind": "given"})

    return plan


@checked
def captions_synthetic(
    tasks: Tasks = 3,
    per_task: Count = 12,
    test_per_task: Count = 6,
    captions: Annotated[int, Range(1, len(_PHRASES))] = 2,
    size: Side = 16,
    noise: Noise = 0.5,
    scenario: Scenario = "class",
) -> StreamPlan:
    """Random pictures with captions; each is of one invented thing, which has its own picture and its own word.

    A test image shows a thing of the task's train images again, with other noise: a learner can find it. With
    scenario="domain" each task shows the same images, and calls the things by other words, as another language does.

    Args:
        tasks: number of tasks; each is one topic (with scenario="domain", one language).
        per_task: train images of a task, each of another thing.
        test_per_task: test images of a task; at most `per_task`.
        captions: of an image, 1 to 5.
        size: side of the pictures, in pixels; they are resized to what the backbone wants.
        noise: standard deviation of the noise, where that of the pictures is 1.
        scenario: "class", "task" or "domain".

    Raises:
        ValueError: when a number is out of its range, or there are too many pictures.
    """
    if test_per_task > per_task:
        raise ValueError(f"test_per_task={test_per_task}: expected at most per_task={per_task}")
    _not_too_many(tasks * (per_task + test_per_task), size)
    same = scenario == "domain"
    kind = "language" if same else "topic"
    lines = [
        [phrase.format(_word(i), f"{kind} {i // per_task}") for phrase in _PHRASES[:captions]]
        for i in range(tasks * per_task)
    ]

    def part(t: int, name: str, count: int, first: int, preprocess: Preprocess, seed: int) -> Captioned:
        shown = 0 if same else t
        things = torch.stack([_picture(size, seed, f"thing {shown * per_task + i}") for i in range(count)])
        grain = _noise((count, 3, size, size), seed, f"{name} {shown}")
        images = ImageSet.of(_bytes(grain.mul_(noise).add_(things)), torch.full((count,), t), preprocess)
        return Captioned(images, first + shown * count + torch.arange(count), lines[t * per_task :][:count])

    def plan(preprocess: Preprocess, seed: int, measured: bool = False) -> Stream:
        made = []
        for t in range(tasks):
            train = part(t, "train", per_task, 0, preprocess, seed)
            test = part(t, "test", test_per_task, tasks * per_task, preprocess, seed)
            made.append(Task(t, f"{kind} {t}", (t,), (f"{kind} {t}",), tasks, train, test))
        counts = {"train": [per_task * captions] * tasks, "test": [test_per_task * captions] * tasks}
        return noted("captions_synthetic", scenario, made, {"kind": "given"}, captions=counts)

    return plan


def _bytes(pictures: Tensor) -> Tensor:
    """Of mean 0 and deviation 1, changed in place, to uint8."""
    return pictures.mul_(40).add_(128).round_().clamp_(0, 255).to(torch.uint8)


def _not_too_many(pictures: int, size: int) -> None:
    """They are drawn at once and stay in memory, which is why they are few and small."""
    if pictures > _MOST_PICTURES or pictures * 3 * size**2 > _MOST_BYTES:
        raise ValueError(
            f"{pictures} pictures of {size} pixels a side: expected at most {_MOST_PICTURES}, and "
            f"{human_bytes(_MOST_BYTES)} in all; give fewer of them, or a smaller size"
        )


def _word(number: int) -> str:
    # Neighbours differ in both syllables, so that words are told apart by their letters, whatever the order of these.
    base = len(_SYLLABLES)
    first, second, rest = number % base, number // base % base, number // base**2
    return _SYLLABLES[first] + _SYLLABLES[(second + 7 * first) % base] + (_word(rest - 1) if rest else "")


def _classes(tasks: int, each: int, scenario: Scenario) -> Iterator[tuple[int, ...]]:
    for t in range(tasks):
        yield tuple(range(each)) if scenario == "domain" else tuple(range(t * each, (t + 1) * each))


def _picture(size: int, seed: int, purpose: str) -> Tensor:
    return _noise((3, size, size), seed, purpose)


def _noise(shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest((seed, purpose))[:15], 16))
    return torch.randn(shape, dtype=torch.float32, generator=generator)
