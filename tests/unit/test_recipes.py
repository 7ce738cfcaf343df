"""Presets: they can be built, say where their scores are from, and never mix two backbones."""

import math
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import timm
import tyro

from perdure.adapters.injection import updates
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.cli.commands import COMMANDS, Run
from perdure.core.learner import Core
from perdure.experiments.recipes import expand, published, recipe, recipes
from perdure.options.spec import build, parse, parse_one
from perdure.streams import STREAMS
from perdure.training.config import RunConfig, flags, make_method, make_objective
from perdure.types import Task

PAGE = (Path(__file__).parents[2] / "docs/published.md").read_text(encoding="utf-8")
EVERY = published()


def typed(line: str) -> RunConfig:
    """The configuration that a command line makes."""
    words = expand(shlex.split(line)[1:])
    run = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=words, config=(tyro.conf.OmitArgPrefixes,))
    assert isinstance(run, Run)
    return RunConfig(**{f.name: getattr(run, f.name) for f in fields(RunConfig)})


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_can_be_built_and_its_text_says_what_it_is(name: str) -> None:
    config, text = recipe(name).config, recipe(name).about
    assert parse(make_method(config.method).spec) == parse(config.method)
    make_objective(config.objective)
    build(parse_one(config.stream), STREAMS, "stream")
    options = dict(parse_one(config.backbone).kwargs)  # not built: that would read weights
    if name == "demo" or name in EVERY["sites"]["rows"]:
        return
    family, data = next((f, d) for n, f in EVERY["families"].items() for d in f["rows"] if f"{n}_{d}" == name)
    table, score = EVERY["tables"][family["table"]], family["rows"][data].get("score", "")
    assert options == {"name": table["tag"], "input_norm": "none"}
    assert f'Backbone: `{table["tag"]}` (timm), input_norm="none"' in text
    assert (config.batch_size, config.augment, config.objective) == (128, "zoom", "classify()")
    for command in (r"^Command: `(perdure run --recipe .*?)`", r"^    (perdure run .*)$"):
        (line,) = re.findall(command, text, re.M)
        assert typed(line) == config
    (published,) = re.findall(r"^Published: (.*)$", text, re.M)
    assert "Run by us: no;" in text
    assert re.search(f": {re.escape(score) or 'no published score'}.*, not run by us.$", text.splitlines()[0])
    source = (
        r"arXiv:\d{4}\.\d{5} \((first-hand|second-hand|derived, second-hand): " if score else "no score with a source"
    )
    assert published.startswith(score)
    assert re.search(source, published)
    assert re.search(r"^Differs:\n- ", text, re.M)
    row = [f"`{name}`", f"`{config.method}`", score or "none"]
    (listed,) = (
        line
        for line in PAGE.partition(f"Block {family['table']}:")[2].partition("\n## ")[0].splitlines()
        if f"`{name}`" in line
    )
    cells = [cell.strip() for cell in listed.strip("|").split("|")]
    assert cells[:3] + cells[-1:] == [*row, "no"]


@pytest.mark.parametrize(("name", "layers"), [("attention_only", "qkvo"), ("gate_up_only", ("gate", "fc1"))])
def test_a_preset_of_sites_adapts_these_layers_of_a_language_model_alone(name: str, layers: Any) -> None:
    config, text = recipe(name).config, recipe(name).about
    for command in (r"^Command: `(perdure run --recipe .*?)`", r"^    (perdure run .*)$"):
        (line,) = re.findall(command, text, re.M)
        assert typed(line) == config
    row = EVERY["sites"]["rows"][name]
    assert f"Published: {row['score']}; the whole" in text
    assert f"| `{name}` | `{config.method}` | {row['score']} |" in PAGE
    learner = Core(tiny_mllm(), make_objective(config.objective), make_method(config.method), "domain")
    learner.grow(Task(0, "a", (0,), ("a",)))
    sites = [site.key.rpartition(":") for site, _, _ in updates(learner.backbone)]
    assert {word for _, _, word in sites} == set(layers)
    assert {block for block, _, _ in sites} == set(learner.backbone.blocks("language"))


def test_the_page_has_no_other_presets() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == sorted(recipes().keys() - {"demo"})
    assert not recipes().keys() & set(EVERY["gone"])


@pytest.mark.parametrize("table", EVERY["tables"].values(), ids=EVERY["tables"])
def test_timm_has_weights_of_that_tag_and_resizes_as_the_page_says(table: dict[str, Any]) -> None:
    facts = timm.get_pretrained_cfg(table["tag"])
    assert facts is not None
    assert facts.tag == table["tag"].partition(".")[2]
    assert (facts.input_size, int(224 / facts.crop_pct), facts.mean, facts.std) == (
        *((3, 224, 224), 248),
        *((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )


def test_options_typed_besides_a_recipe_override_it_wherever_they_stand() -> None:
    config = recipe("inflora_cifar100").config
    for line in (
        "perdure run --recipe inflora_cifar100 --lr 0.5 --seed 3 --out x",
        "perdure run --lr=0.5 --out x --seed 3 --recipe=inflora_cifar100",
    ):
        assert asdict(typed(line)) == asdict(config) | {"lr": 0.5, "seed": 3}
    # a value that is the default of the flag, not of the recipe
    assert typed("perdure run --augment none --recipe inflora_cifar100 --out x").augment == "none"


def test_another_schedule_than_a_recipes_leaves_its_milestones_behind() -> None:
    typed_over = typed("perdure run --recipe sd_lora_domainnet --schedule constant --out x")
    assert typed_over == recipe("sd_lora_domainnet").config.but(schedule="constant")
    own = typed("perdure run --recipe sd_lora_domainnet --milestones 2 --out x")
    assert (own.schedule, own.milestones, own.decay) == ("step", "2", 0.005)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("sd_lora_domainnet", [2e-2] * 4 + [1e-4] * 2 + [5e-7] * 2 + [2.5e-9] * 2),
        ("inflora_domainnet", [5e-3] * 4 + [5e-4]),
        ("inflora_ca_cifar100", [1e-3] * 18 + [1e-4] * 2),
        ("sd_lora_cifar100", [8e-3] * 20),
        ("inflora_cifar100", [5e-4 * math.cos(99 * math.pi * e / (200 * 19)) for e in range(20)]),
        ("inflora_ca_imagenet_r_10", [5e-4 * (1 + math.cos(math.pi * e / 50)) for e in range(50)]),
    ],
)
def test_the_rate_falls_as_in_the_official_configuration(name: str, rates: list[float]) -> None:
    config = recipe(name).config
    assert [config.rate(epoch, config.epochs) for epoch in range(config.epochs)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "run --recipe inflora_cifar10 --out x",
            "there is no recipe 'inflora_cifar10'; did you mean 'inflora_cifar100'",
        ),
        ("run --recipe --out x", "--recipe needs a name; 'perdure list recipes' has them"),
        ("run --out x --recipe", "--recipe needs a name"),
        ("run --recipe ? --out x", "there is no recipe '?'; 'perdure list recipes' names them"),
        (
            "run --recipe fm_lora_cub200 --out x",
            "recipe 'fm_lora_cub200' is gone, for neither its settings nor a score had",
        ),
        ("run --recipe demo --recipe=demo --out x", "--recipe is given 2 times (demo, demo): keep one"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        expand(line.split())


@pytest.mark.parametrize("line", ["run --recipe --help", "run --out x", "compare --recipe demo", "list recipes", ""])
def test_other_command_lines_stay_as_they_are(line: str) -> None:
    assert expand(line.split()) == line.split()


def test_flags_are_those_that_differ_from_the_defaults() -> None:
    assert flags(RunConfig(stream="a(b=1)", weight_decay=0.5).describe()) == [
        "--weight-decay",
        "0.5",
        "--stream",
        "a(b=1)",
    ]
