"""Presets as functions: what is run, with which command, and what came out, here or in the literature."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from perdure.experiments.published import DATA, PRESETS, Preset
from perdure.formatting import meant
from perdure.training.config import RunConfig

Recipe = Callable[[], RunConfig]

DEMO_METHODS = ("lora(rank=10)", "inflora(rank=10)")


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


def published(preset: Preset) -> Recipe:
    """The recipe of a published setting; its docstring has the command, the score and its source."""

    def recipe() -> RunConfig:
        return RunConfig(
            stream=preset.stream,
            backbone=preset.family.table.backbone,
            method=preset.row.method,
            **preset.row.training,  # type: ignore[arg-type]
        )

    recipe.__name__ = recipe.__qualname__ = preset.name
    recipe.__doc__ = _docstring(preset, recipe())
    return recipe


def flags(config: RunConfig) -> list[str]:
    """The flags of `perdure run` that make `config`: those whose values are not the defaults."""
    words = []
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            words += [f"--{f.name.replace('_', '-')}", str(value)]
    return words


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
    if named[0] not in RECIPES:
        near = meant(named[0], RECIPES) or "; 'perdure list recipes' names them"
        raise ValueError(f"there is no recipe {named[0]!r}{near}")
    config = RECIPES[named[0]]()
    if any(word.partition("=")[0] == "--schedule" for word in arguments):  # milestones belong to the recipe's own
        config = config.but(schedule=RunConfig.schedule)
    return ["run", *flags(config), *arguments[1:]]


def _docstring(preset: Preset, config: RunConfig) -> str:
    family, score = preset.family, preset.row.score
    title, tag = DATA[preset.data][0], family.table.tag
    differs = "\n".join(f"- {each}" for each in preset.differs)
    return f"""{family.label}, {title}, {tag.partition(".")[2]}: {preset.claim}, not run by us.

Command: `perdure run --recipe {preset.name} --out DIR`, in full

    perdure run {shlex.join(flags(config))} --out DIR

Backbone: `{tag}` (timm), input_norm="none": raw pixels in [0, 1], as the published code.
Published: {score}{", " if score else ""}{preset.source}.
Settings: {family.settings}.
Run by us: no; it needs the weights of the ViT-B/16 and the full data set.
Differs:
{differs}"""


RECIPES: Mapping[str, Recipe] = {"demo": demo} | {preset.name: published(preset) for preset in PRESETS}
