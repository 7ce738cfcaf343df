"""The seven families of continual learning, each by its best measured method; how much code it is, and when to take it.

Imports nothing that computes. A row counts for a family when its parts are the family's, beside those that only carry
them: what a classifier of statistics (`align`, `ranpac`, `ncm`) adds is no merit of the family it is added to.
"""

import ast
import functools
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from perdure.formatting import human_bytes, percent_with_spread
from perdure.options.spec import parse
from perdure.reporting.advise import Advice, RankedMethod

_ROOT = Path(__file__).parents[1]
_CARRIERS = frozenset({"lora", "finetune", "adapter", "prompt", "prefix", "probe"})
_BRICKS = ("perdure.mechanisms.", "perdure.adapters.")


@dataclass(frozen=True)
class Family:
    """A family: its methods by name, where it comes from, and when to choose it."""

    name: str
    methods: frozenset[str]
    source: str
    choose: str
    files: tuple[str, ...] = ()
    """Modules of what is no method, for its size."""


def _of(name: str, methods: str, source: str, choose: str, *files: str) -> Family:
    return Family(name, frozenset(methods.split()), source, choose, files)


FAMILIES = (
    _of(
        "growing structure",
        "pnn moe_adapters lora_experts hide_lora disco moe_lora smolora modal_prompt dualprompt coda_prompt",
        "Rusu et al. 2016 (arXiv:1606.04671), Yu et al. 2024 (arXiv:2403.11549)",
        "tasks differ much, and memory may grow with them",
    ),
    _of(
        "replay",
        "replay derpp icarl gem agem",
        "Chaudhry et al. 2019 (arXiv:1902.10486), Buzzega et al. 2020 (arXiv:2004.07211)",
        "some old examples may be kept",
    ),
    _of(
        "isolation and regularisation",
        "inflora gpm o_lora c_lora sd_lora fm_lora route_lora reg_lora ewc si mas weight_average",
        "Kirkpatrick et al. 2017 (arXiv:1612.00796), Liang and Li 2024 (arXiv:2404.00228)",
        "no old example may be kept, and tasks are related",
    ),
    _of(
        "distillation",
        "lwf feature_distill zscl mod_x expert_distillation",
        "Li and Hoiem 2016 (arXiv:1606.09282), Zhang et al. 2020 (arXiv:1903.07864)",
        "a learner in use is brought up to date, and answers must not jump",
    ),
    _of(
        "elastic representations",
        "head_gates",
        "Louizos et al. 2018 (arXiv:1712.01312), Zhang et al. 2024 (arXiv:2403.15378)",
        "images become larger, texts longer",
    ),
    _of(
        "meta-learning",
        "reptile fomaml maml lamaml oml",
        "Finn et al. 2017 (arXiv:1703.03400), Gupta et al. 2020 (arXiv:2007.13904)",
        "tasks have few examples, and there are many tasks",
    ),
    _of(
        "cooperating specialists",
        "",
        "parts are known ones, see docs/specialists.md",
        "learners were taught apart, on backbones of their own",
        "api/specialists.py",
        "api/combine.py",
        "mechanisms/routing.py",
        "mechanisms/experience_pool.py",
    ),
)


def family_of(method: str) -> Family | None:
    """The family whose parts a method's spec has, and no other's; None for controls and sums of several."""
    names = {spec.name for spec in parse(method)} - _CARRIERS
    return next((family for family in FAMILIES if names and names <= family.methods), None)


def best_of_families(answer: Advice) -> list[tuple[Family, RankedMethod | str]]:
    """Each family with its best choice of an answer, or why it has none.

    `not measured`, `left out` by constraints, or `measured apart`: what is no method has no row in these tables; its
    figures stand in docs/choosing.md.
    """
    found: dict[str, RankedMethod] = {}
    for choice in answer.choices:
        family = family_of(choice.method)
        if family is not None:
            found.setdefault(family.name, choice)
    others = [method for methods in (*answer.left_out.values(), *answer.unknown.values()) for method in methods]
    measured = {family.name for family in map(_family_told, others) if family is not None}
    return [(family, found.get(family.name) or _why_not(family, measured)) for family in FAMILIES]


def _why_not(family: Family, measured: Collection[str]) -> str:
    if not family.methods:
        return "measured apart"
    return "left out" if family.name in measured else "not measured"


def _family_told(method: str) -> Family | None:
    """The family of a method that stands with the number by which it was left out."""
    for text in (method, method.rpartition(" (")[0]):
        with suppress(ValueError):
            return family_of(text)
    return None


def family_cells(family: Family, choice: RankedMethod | str) -> tuple[str, ...]:
    """A row for people: family, method, accuracy, new task, forgetting, stored, lines of code."""
    if isinstance(choice, str):
        size = str(sum(map(_lines, family.files))) if family.files else ""
        return family.name, choice, "", "", "", "", size
    stored = "?" if choice.stored_bytes is None else human_bytes(choice.stored_bytes)
    shares = map(percent_with_spread, (choice.share, choice.new_task_acc, choice.forgetting))
    return family.name, choice.method, *shares, stored, str(code_lines(choice.method))


TITLES = ("family", "best of it", "accuracy", "new task", "forgetting", "stored", "lines")


def code_lines(method: str) -> int:
    """Lines of a method's files, and of the adapters and mechanisms that they are made of."""
    modules: set[str] = set()
    for spec in parse(method):
        modules |= _made_of(f"methods/{spec.name}.py")
    return sum(map(_lines, modules))


@functools.cache
def _made_of(file: str) -> frozenset[str]:
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path in found or not (_ROOT / path).is_file():
            continue
        found.add(path)
        for line in ast.walk(ast.parse((_ROOT / path).read_text("utf-8"))):
            if isinstance(line, ast.ImportFrom) and line.module and line.module.startswith(_BRICKS):
                waiting.append(line.module.removeprefix("perdure.").replace(".", "/") + ".py")
    return frozenset(found)


@functools.cache
def _lines(file: str) -> int:
    return len((_ROOT / file).read_text("utf-8").splitlines())
