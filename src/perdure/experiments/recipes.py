"""Presets: what is run, with which command, and what came out, here or in the literature (`recipes.toml`)."""

import functools
import inspect
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from perdure.formatting import meant
from perdure.training.config import RunConfig, flags

DEMO_METHODS = ("lora(rank=10)", "inflora(rank=10)")
_FIRST_HAND = "first-hand: read in the paper's tables as the authors' repository has them"
_NO_SCORE = "no score with a source was found"
_COMMON: dict[str, Any] = {"batch_size": 128, "augment": "zoom"}  # of all that is published here


@dataclass(frozen=True)
class Recipe:
    """What `--recipe NAME` stands for, and what is written about it."""

    config: RunConfig
    about: str


def demo() -> RunConfig:
    """Coloured shapes, 24 classes in 6 tasks, the embedded CLIP: sequential LoRA beside InfLoRA.

    Command: `perdure demo`. No network. Needs the extra `demo`, whose package easy-vqa carries the images. Two minutes
    on two virtual cores with avx512_bf16; final accuracy 32.1 % (lora) and 38.1 % (inflora), forgetting 51.8 and 38.0
    points.
    """
    return RunConfig(
        stream="easy_vqa(tasks=6, per_class=60, test_per_class=20)",
        backbone="pocket()",
        epochs=5,
        batch_size=32,
        lr=1e-3,
    )


@functools.cache
def published() -> dict[str, Any]:
    """The content of recipes.toml, which says what its fields mean."""
    found: dict[str, Any] = tomllib.loads(
        resources.files("perdure.experiments").joinpath("recipes.toml").read_text("utf-8")
    )
    return found


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All by name: the demo, `FAMILY_DATA` for each published row, and where to adapt a language model."""
    found = {"demo": Recipe(demo(), inspect.cleandoc(demo.__doc__ or ""))}
    for name, family in published()["families"].items():
        for data in family["rows"]:
            found[f"{name}_{data}"] = _recipe(f"{name}_{data}", family, data)
    return found | {name: _where(name, row) for name, row in published()["sites"]["rows"].items()}


def recipe(name: str) -> Recipe:
    """One by name.

    Raises:
        ValueError: when there is none, with a near name; or says why there is none any more.
    """
    if name in (found := recipes()):
        return found[name]
    if name in published()["gone"]:
        raise ValueError(
            f"recipe {name!r} is gone, for neither its settings nor a score had a source: start from "
            "'--recipe fm_lora_imagenet_r_20' with another --stream"
        )
    near = meant(name, found) or "; 'perdure list recipes' names them"
    raise ValueError(f"there is no recipe {name!r}{near}")


def expand(arguments: Sequence[str]) -> list[str]:
    """A command line with the flags that `run --recipe NAME` stands for; those typed come after them, and so win.

    Raises:
        ValueError: when there is no such recipe, or not exactly one is named.
    """
    named = [
        word.partition("=")[2] or (list(arguments[i + 1 : i + 2]) or [""])[0]
        for i, word in enumerate(arguments)
        if word.partition("=")[0] == "--recipe"
    ]
    if arguments[:1] != ["run"] or not named or "--help" in arguments or "-h" in arguments:
        return list(arguments)
    if not named[0] or named[0].startswith("-"):
        raise ValueError("--recipe needs a name; 'perdure list recipes' has them")
    if len(named) > 1:
        raise ValueError(f"--recipe is given {len(named)} times ({', '.join(named)}): keep one")
    config = recipe(named[0]).config
    if any(word.partition("=")[0] == "--schedule" for word in arguments):  # milestones belong to the recipe's own
        config = config.but(schedule=RunConfig.schedule)
    return ["run", *flags(asdict(config)), *arguments[1:]]


def _recipe(name: str, family: Mapping[str, Any], data: str) -> Recipe:
    """A published setting; its text has the command, the score, its source and all that differs."""
    every, row = published(), family["rows"][data]
    table, where, training = (
        every["tables"][family["table"]],
        every["data"][data],
        dict(every["training"][row["training"]]),
    )
    differs = [*training.pop("differs", ()), *row.get("differs", ()), *family.get("differs", ()), *every["differs"]]
    differs += [*every["streams"].get(where["stream"], ()), *table.get("differs", ())]
    config = RunConfig(
        stream=f"{where['stream']}({', '.join(filter(None, (where['options'], table.get('order'))))})",
        backbone=f'timm(name="{table["tag"]}", input_norm="none")',
        method=row.get("method", family["method"]),
        **(_COMMON | training),
    )
    claim, source = "no published score", _NO_SCORE
    if score := row.get("score"):
        claim = f"{score} ({table['measures']}) {'derived' if score.startswith('≈') else 'published'}"
        known = _FIRST_HAND if data in family.get("first_hand", ()) else family.get("evidence", table["evidence"])
        source = f"{score}, {family.get('paper', table['paper'])} ({known})"
    listed = "\n".join(f"- {each}" for each in differs)
    about = f"""{family["label"]}, {where["title"]}, {table["tag"].partition(".")[2]}: {claim}, not run by us.

Command: `perdure run --recipe {name} --out DIR`, in full

    perdure run {shlex.join(flags(asdict(config)))} --out DIR

Backbone: `{table["tag"]}` (timm), input_norm="none": raw pixels in [0, 1], as the published code.
Published: {source}.
Settings: {family["settings"]}.
Run by us: no; it needs the weights of the ViT-B/16 and the full data set.
Differs:
{listed}"""
    return Recipe(config, about)


def _where(name: str, row: Mapping[str, str]) -> Recipe:
    """Layers by which a language model learns and keeps what it knows; its text has the command and the source."""
    of = published()["sites"]
    config = RunConfig(stream=of["stream"], backbone=of["backbone"], method=row["method"], **of["training"])
    differs = "\n".join(f"- {each}" for each in of["differs"])
    about = f"""{row["title"]}: {row["score"]} published (learnt / held out, in points), not run by us.

Command: `perdure run --recipe {name} --out DIR`, in full

    perdure run {shlex.join(flags(asdict(config)))} --out DIR

Published: {row["score"]}; the whole language model: {of["whole"]}; {of["paper"]} ({of["evidence"]}).
Run by us: no; it needs a model of 7 billion weights.
Differs:
{differs}"""
    return Recipe(config, about)
