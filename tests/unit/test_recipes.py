"""Presets: they can be built, say where their scores are from, and never mix two backbones."""

import inspect
import math
import re
import shlex
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import timm
import tyro

from perdure.backbones import BACKBONES
from perdure.cli.commands import COMMANDS, Run
from perdure.experiments.published import FAMILIES, PRESETS, TABLES, Preset, Table
from perdure.experiments.recipes import RECIPES, expand, flags
from perdure.options.spec import build, parse, parse_one
from perdure.streams import STREAMS
from perdure.training.config import RunConfig, make_method, make_objective

PAGE = Path(__file__).parents[2] / "docs/published.md"
EACH = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def typed(line: str) -> RunConfig:
    """The configuration that a command line makes."""
    words = expand(shlex.split(line)[1:])
    run = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=words, config=(tyro.conf.OmitArgPrefixes,))
    assert isinstance(run, Run)
    return RunConfig(**{f.name: getattr(run, f.name) for f in fields(RunConfig)})


def written(preset: Preset) -> str:
    return inspect.getdoc(RECIPES[preset.name]) or ""


@pytest.mark.parametrize("name", RECIPES)
def test_every_part_of_a_recipe_exists_with_its_options(name: str) -> None:
    config = RECIPES[name]()
    assert parse(make_method(config.method).spec) == parse(config.method)
    make_objective(config.objective)
    build(parse_one(config.stream), STREAMS, "stream")
    spec = parse_one(config.backbone)  # not built: that would read weights
    inspect.signature(BACKBONES[spec.name]).bind(**dict(spec.kwargs))


@EACH
def test_input_normalisation_is_written_out_in_the_backbone(preset: Preset) -> None:
    options = dict(parse_one(RECIPES[preset.name]().backbone).kwargs)
    assert options == {"name": preset.family.table.tag, "input_norm": "none"}
    assert 'input_norm="none"' in written(preset)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_timm_has_weights_of_that_tag_and_resizes_as_the_page_says(table: Table) -> None:
    facts = timm.get_pretrained_cfg(table.tag)
    assert facts is not None
    assert facts.tag == table.tag.partition(".")[2]
    assert (facts.input_size, int(224 / facts.crop_pct), facts.mean, facts.std) == (
        *((3, 224, 224), 248),
        *((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )


@EACH
def test_both_commands_in_the_docstring_make_the_recipes_configuration(preset: Preset) -> None:
    text = written(preset)
    short = re.search(r"^Command: `(perdure run --recipe .*?)`", text, re.M)
    full = re.search(r"^    (perdure run .*)$", text, re.M)
    assert short
    assert full
    for line in (short[1], full[1]):
        assert typed(line) == RECIPES[preset.name]()


@EACH
def test_the_docstring_says_backbone_score_source_and_that_we_did_not_run_it(preset: Preset) -> None:
    text = written(preset)
    assert f"Backbone: `{preset.family.table.tag}` (timm)" in text
    assert "Run by us: no;" in text
    assert text.splitlines()[0].endswith(" not run by us.")
    published = re.search(r"^Published: (.*)$", text, re.M)
    assert published
    if preset.row.score:
        assert published[1].startswith(preset.row.score)
        assert re.search(
            r"arXiv:\d{4}\.\d{5} \((first-hand|second-hand|unverified|derived, second-hand): ", published[1]
        )
        assert preset.row.score in text.splitlines()[0]
    else:
        assert published[1].startswith("no published score")
    assert re.search(r"^Differs:\n- ", text, re.M)


@EACH
def test_images_are_zoomed_and_batches_are_those_of_the_publications(preset: Preset) -> None:
    config = RECIPES[preset.name]()
    assert (config.batch_size, config.augment, config.objective) == (128, "zoom", "classify()")


def test_names_are_unique_and_every_published_data_set_has_a_preset() -> None:
    assert not [name for name, count in Counter(p.name for p in PRESETS).items() if count > 1]
    found = {(p.family.prefix, p.data) for p in PRESETS}
    lengths = {"imagenet_r_5", "imagenet_r_10", "imagenet_r_20"}
    for prefix, data in (
        ("inflora", {*lengths, "cifar100", "domainnet"}),
        ("inflora_b5", {*lengths, "cifar100", "domainnet"}),
        ("inflora_ca", {"imagenet_r_10", "cifar100"}),
        ("inflora_in1k", {*lengths, "cifar100", "cub200", "domainnet"}),
        *((name, {*lengths, "cifar100", "cub200", "domainnet"}) for name in ("sd_lora", "sd_lora_rr", "sd_lora_kd")),
        ("fm_lora", {*lengths, "cifar100", "cub200", "domainnet_domains"}),
    ):
        assert {d for p, d in found if p == prefix} == data


def test_a_published_table_has_one_backbone_and_a_family_one_table() -> None:
    assert len({table.key for table in TABLES}) == len(TABLES)
    for table in TABLES:
        backbones = {RECIPES[p.name]().backbone for p in PRESETS if p.family.table is table}
        assert backbones == {table.backbone}
    assert len({family.prefix for family in FAMILIES}) == len(FAMILIES)


def test_both_protocols_of_domainnet_are_told_apart() -> None:
    by_class = STREAMS["domainnet"]
    assert "protocol" in inspect.signature(by_class).parameters
    protocols = {p.data: dict(parse_one(p.stream).kwargs)["protocol"] for p in PRESETS if "domainnet" in p.data}
    assert protocols == {"domainnet": "class", "domainnet_domains": "domain"}


def test_fm_lora_has_no_score_but_the_derived_one() -> None:
    scores = {p.data: p.row.score for p in PRESETS if p.family.prefix == "fm_lora" and p.row.score}
    assert scores == {"imagenet_r_20": "≈ 76.3 / ≈ 80.9"}
    (preset,) = (p for p in PRESETS if p.name == "fm_lora_imagenet_r_20")
    assert "derived" in written(preset).splitlines()[0]
    assert "2501.13198" not in preset.source
    assert "not a replication" in written(preset)


def test_options_typed_besides_a_recipe_override_it_wherever_they_stand() -> None:
    recipe = RECIPES["inflora_cifar100"]()
    for line in (
        "perdure run --recipe inflora_cifar100 --lr 0.5 --seed 3 --out x",
        "perdure run --lr=0.5 --out x --seed 3 --recipe=inflora_cifar100",
    ):
        assert asdict(typed(line)) == asdict(recipe) | {"lr": 0.5, "seed": 3}
    # a value that is the default of the flag, not of the recipe
    assert typed("perdure run --augment none --recipe inflora_cifar100 --out x").augment == "none"


def test_another_schedule_than_a_recipes_leaves_its_milestones_behind() -> None:
    typed_over = typed("perdure run --recipe sd_lora_domainnet --schedule constant --out x")
    assert typed_over == RECIPES["sd_lora_domainnet"]().but(schedule="constant")
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
    config = RECIPES[name]()
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
    assert flags(RunConfig(stream="a(b=1)", weight_decay=0.5)) == ["--weight-decay", "0.5", "--stream", "a(b=1)"]


def _tables() -> dict[str, list[list[str]]]:
    """Rows below each heading that names a table."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        if key := re.match(r"Block (\w):", section):
            lines = re.findall(r"^\| `.*$", section, re.M)
            found[key[1]] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return found


def test_the_page_has_every_preset_with_its_score_below_its_backbone() -> None:
    expected: dict[str, Any] = {table.key: [] for table in TABLES}
    for p in PRESETS:
        expected[p.family.table.key].append([f"`{p.name}`", f"`{p.row.method}`", p.row.score or "none", "no"])
    assert {key: [row[:3] + row[-1:] for row in rows] for key, rows in _tables().items()} == expected
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    for table in TABLES:
        (section,) = (s for s in sections if s.startswith(f"Block {table.key}:"))
        assert set(re.findall(r"`(vit_\w+\.\w+)`", section)) == {table.tag}
        assert table.measures in section
