"""Pictures of coloured shapes, drawn with Pillow, and what is asked and said about them; for `small_decoder.py`.

Questions are put in other words than easy-vqa's, and are mostly answered in sentences.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": ((255, 0, 0), (220, 20, 60)),
    "green": ((0, 255, 0), (0, 128, 0), (50, 205, 50)),
    "blue": ((0, 0, 255), (30, 60, 200)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "gray": ((128, 128, 128), (105, 105, 105)),
    "teal": ((0, 128, 128), (0, 110, 120)),
    "brown": ((165, 42, 42), (139, 69, 19)),
    "yellow": ((255, 255, 0), (250, 220, 0)),
    "orange": ((255, 140, 0), (255, 165, 0)),
    "purple": ((128, 0, 128), (110, 30, 160)),
    "pink": ((255, 105, 180), (255, 160, 190)),
    "white": ((255, 255, 255),),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "ring", "diamond")
SIDE = 64


@dataclass(frozen=True)
class Figure:
    """One shape of a picture."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it: one figure or two of different shapes and colours."""

    picture: Image.Image
    figures: tuple[Figure, ...]
    ground: str


def draw(number: int) -> Scene:
    """The picture of that number, always the same."""
    rng = random.Random(f"picture {number}")
    count = 1 if rng.random() < 0.7 else 2
    shapes, colours = rng.sample(SHAPES, count), rng.sample(list(COLOURS), count)
    paints = [tuple(min(255, max(0, c + rng.randint(-25, 25))) for c in rng.choice(COLOURS[name])) for name in colours]
    light = rng.random() < 0.7
    while True:
        ground = tuple(rng.randint(195, 255) if light else rng.randint(0, 150) for _ in range(3))
        if all(sum(abs(a - b) for a, b in zip(ground, paint, strict=True)) > 110 for paint in paints):
            break
        light = not light if rng.random() < 0.3 else light
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    canvas = ImageDraw.Draw(picture)
    figures, halves = [], rng.sample(range(2), 2)
    for shape, colour, paint, half in zip(shapes, colours, paints, halves, strict=False):
        radius = rng.uniform(5, 17 if count == 1 else 12)
        low, high = (0, SIDE) if count == 1 else (half * SIDE / 2, (half + 1) * SIDE / 2)
        x, y = rng.uniform(low + radius, high - radius), rng.uniform(radius, SIDE - radius)
        outline(canvas, rng, shape, x, y, radius, paint)
        size = "small" if radius < 9 else "large"
        place = "left" if x < SIDE / 3 else "right" if x > 2 * SIDE / 3 else "middle"
        figures.append(Figure(shape, colour, size, place))
    return Scene(picture, tuple(figures), "light" if light else "dark")


def outline(
    canvas: ImageDraw.ImageDraw, rng: random.Random, shape: str, x: float, y: float, r: float, paint: tuple[int, ...]
) -> None:
    """Draw one shape around (x, y)."""

    def around(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [(x + s * math.sin(a), y - s * math.cos(a)) for a, s in zip(angles, radii, strict=True)]

    turn = 2 * math.pi
    wide, high = r * rng.uniform(0.55, 1), r * rng.uniform(0.55, 1)
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=paint)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=paint, width=max(2, round(r / 3)))
    elif shape == "rectangle":
        canvas.rectangle((x - wide, y - high, x + wide, y + high), fill=paint)
    elif shape == "cross":
        canvas.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=paint)
        canvas.rectangle((x - r / 4, y - r, x + r / 4, y + r), fill=paint)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], fill=paint)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + 0.75 * r), (x - r, y + 0.75 * r)], fill=paint)
    else:
        points = around([turn * i / 10 for i in range(10)], [r if i % 2 == 0 else 0.45 * r for i in range(10)])
        canvas.polygon(points, fill=paint)


Asked = tuple[str, str]


def caption(scene: Scene, rng: random.Random) -> Asked:
    """A picture described."""
    said = " and ".join(f"a {f.colour} {f.shape}" for f in scene.figures)
    f = rng.choice(scene.figures)
    return rng.choice(
        [
            ("describe this .", f"{said} on a {scene.ground} ground ."),
            ("write a caption .", f"{said} ."),
            ("tell me about the picture .", f"i see {said} ."),
            ("say what was drawn here .", f"{said} ."),
            (f"describe the {f.shape} .", f"a {f.size} {f.colour} {f.shape} at the {f.place} ."),
            (f"describe the {f.colour} figure .", f"a {f.size} {f.colour} {f.shape} at the {f.place} ."),
        ]
    )


def colour(scene: Scene, rng: random.Random) -> Asked:
    """Which colour a figure has."""
    f = rng.choice(scene.figures)
    other = rng.choice([each for each in COLOURS if each != f.colour])
    one, two = rng.sample([f.colour, other], 2)
    which = "figure" if len(scene.figures) == 1 and rng.random() < 0.5 else f.shape
    return rng.choice(
        [
            (f"which colour has the {which} ?", f"it is {f.colour} ."),
            (f"tell me in which color someone painted the {which} .", f"the {which} is {f.colour} ."),
            (f"in which paint was the {which} drawn ?", f"in {f.colour} paint ."),
            (f"the {which} : {one} or {two} ?", f"it is {f.colour} ."),
            (f"what paint was used for the {which} ?", f"{f.colour} paint ."),
            (f"name the color of this {which} in one word .", f.colour),
        ]
    )


def shape(scene: Scene, rng: random.Random) -> Asked:
    """Which shape a figure has."""
    f = rng.choice(scene.figures)
    other = rng.choice([each for each in SHAPES if each != f.shape])
    one, two = rng.sample([f.shape, other], 2)
    which = "figure" if len(scene.figures) == 1 and rng.random() < 0.5 else f"{f.colour} figure"
    return rng.choice(
        [
            (f"which form has the {which} ?", f"it is a {f.shape} ."),
            (f"tell me what the {which} looks like .", f"the {which} is a {f.shape} ."),
            (f"the {which} : a {one} or a {two} ?", f"it is a {f.shape} ."),
            (f"what would you call the {which} ?", f"a {f.shape} ."),
            (f"name the shape of this {which} in one word .", f.shape),
        ]
    )


def presence(scene: Scene, rng: random.Random) -> Asked:
    """Whether something is there."""
    f = rng.choice(scene.figures)
    there = rng.random() < 0.5
    if rng.random() < 0.5:
        absent = [each for each in COLOURS if each not in {g.colour for g in scene.figures}]
        what = f"{f.colour if there else rng.choice(absent)} figure"
    else:
        absent = [each for each in SHAPES if each not in {g.shape for g in scene.figures}]
        what = f.shape if there else rng.choice(absent)
    seen = f"the {f.colour} {f.shape}"
    yes = f"yes , there is a {what} ." if there else f"no , i see {seen} ."
    return rng.choice(
        [
            (f"can you find a {what} ?", yes),
            (f"do you see any {what} here ?", yes),
            (f"look for a {what} .", yes),
            (f"i claim that someone drew a {what} . right or wrong ?", "right ." if there else "wrong ."),
            (f"true or false : a {what} was drawn .", "true ." if there else "false ."),
            (f"one of the figures is a {what} . correct ? one word .", "yes" if there else "no"),
        ]
    )


def absence(scene: Scene, rng: random.Random) -> Asked:
    """Whether something is missing."""
    asked, said = "", ""
    while not asked.startswith("true"):  # of a thing and whether it is there
        asked, said = presence(scene, rng)
    what = asked.removeprefix("true or false : a ").removesuffix(" was drawn .")
    absent = said == "false ."
    yes = f"yes , i see no {what} ." if absent else f"no , there is a {what} ."
    return rng.choice(
        [
            (f"is the picture without a {what} ?", yes),
            (f"did they leave out the {what} ?", yes),
            (f"i claim that a {what} is absent . right or wrong ?", "right ." if absent else "wrong ."),
            (f"true or false : nobody drew a {what} .", "true ." if absent else "false ."),
            (f"true or false : a {what} was not drawn .", "true ." if absent else "false ."),
            (f"a {what} is missing . correct ? one word .", "yes" if absent else "no"),
        ]
    )


def other(scene: Scene, rng: random.Random) -> Asked:
    """Size, place, number, ground."""
    f = rng.choice(scene.figures)
    return rng.choice(
        [
            (f"where was the {f.shape} put ?", f"at the {f.place} ."),
            (f"how large is the {f.shape} ?", f"it is {f.size} ."),
            ("how many figures were drawn ?", ("one ." if len(scene.figures) == 1 else "two .")),
            ("what lies behind the figures ?", f"a {scene.ground} ground ."),
            ("is it bright or dark ?", f"the ground is {scene.ground} ."),
        ]
    )


KINDS: dict[str, Callable[[Scene, random.Random], Asked]] = {
    "caption": caption,
    "colour": colour,
    "shape": shape,
    "presence": presence,
    "absence": absence,
    "other": other,
}


def questions(pictures: int) -> set[str]:
    """All that is asked of so many pictures, a few times."""
    return {
        ask(scene, random.Random(f"{number} {turn}"))[0]
        for number in range(pictures)
        for scene in [draw(number)]
        for ask in KINDS.values()
        for turn in range(3)
    }
