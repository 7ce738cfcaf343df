"""What two processes learn together is what one learns alone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from perdure.core.method import METHODS
from perdure.training.config import register

register()
ROOT = Path(__file__).parents[2]
CLASSIFY = sorted(n for n, m in METHODS.items() if not m.protects and (not m.needs or "classes" in m.needs))
SUMS = (
    "lora(rank=2) + oml | lora(rank=2) + reptile | lora(rank=2) + lamaml(size=12) | lora(rank=2) + maml | "
    "inflora(rank=2) + replay(size=12) | finetune + ewc(samples=8) | lora(rank=2) + lwf | inflora(rank=2) + lwf | "
    "lora(rank=2) + gem | finetune + agem | inflora(ranks=(1, 2, 4)) | lora(rank=2) + mas(samples=8) | "
    "inflora(rank=2, end_moments='training', moments=9) | lora(rank=2) + feature_distill | finetune + si | "
    "finetune + weight_average | fm_lora(rank=4) + mas(of='updates') | inflora(rank=2) + ranpac(dim=64) | "
    "lora(rank=2) + align + derpp(size=12, selection='grand') | coda_prompt(strength=0.1) + replay(size=12) | "
    "moe_adapters + replay(size=12) | inflora(rank=2) + icarl(size=12) | lora(rank=2) + ewc(of='updates') | "
    "probe + replay(size=12, selection='kmeans', augment='flip') | lora(rank=2) + joint + align | "
    "lora(rank=2) + expert_distillation(epochs=1) | lora(rank=2) + expert_distillation(form='logits', epochs=1)"
)
ELSEWHERE = {
    "classify": SUMS,
    "zeroshot": (
        "lora(rank=2, tower='both') + lwf(text_temperature=1.0) | finetune(tower='both') + zscl + weight_average | "
        "moe_adapters(tower='both') | gpm(keep=0.5, tower='both') | l2p(tower='both') | dualprompt(tower='both') | "
        "ewc(samples=8) + moe_adapters(tower='text') | "
        "finetune + zscl(reference='captions_synthetic()', images=4, texts=5, size=20)"
    ),
    "retrieve": (
        "lora(rank=2, tower='both') | finetune(tower='both') + ewc(samples=8) | inflora(rank=2, tower='both') | "
        "lora(rank=2, tower='both') + mod_x | lora(rank=2, tower='both') + gem(size=6) | l2p(tower='both') | "
        "lora(rank=2, tower='both') + replay(size=6) | moe_adapters + mod_x | prefix(tower='both')"
    ),
    "generate(tokens=2)": (
        "smolora(rank=2) | modal_prompt(tokens=2) | disco(rank=2) | hide_lora(rank=2) | lora_experts(rank=2) | "
        "moe_lora(rank=4, experts=2, tower='language') | reg_lora(rank=2, tower='language') | pnn(rank=2) | "
        "head_gates | inflora(rank=2, tower='language') | lora(rank=2, tower='language') + ewc(samples=8) | "
        "lora(rank=2, tower='language') + lwf | lora(rank=2, tower='language') + replay(size=12) | "
        "lora(rank=2, tower='language') + derpp(size=12) | lora(rank=2, tower='language') + gem(size=12)"
    ),
    "task": "lora | inflora | l2p | finetune + si",
    "domain": "lora | inflora | finetune + ewc",
}
# Adam makes whole steps of gradients that are nothing but rounding, as of a teacher's divergence from itself.
ROUNDING = ("lwf", "mod_x", "zscl")
Asked = tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]


def asked(spec: str, words: str = "classify", **together: Any) -> Asked:
    where = {"scenario" if words in ("task", "domain") else "objective": words}
    return spec, where, {"optimizer": "sgd"} if any(name in spec for name in ROUNDING) else {}, together


EVERY = [asked(spec) for spec in CLASSIFY]
EVERY += [asked(spec, words) for words, specs in ELSEWHERE.items() for spec in specs.split(" | ")]
IN_PARTS = ["lora(rank=2)", "inflora(rank=2) + replay(size=12)", "finetune + ewc(samples=8)", "lora(rank=2) + gem"]
EVERY += [asked(spec, accumulate=3) for spec in IN_PARTS]
EVERY += [asked("lora(rank=2, tower='both')", "retrieve", accumulate=2)]
HELD_IN_PARTS = "lora(rank=2) | inflora(rank=2) + replay(size=12) | l2p | lora(rank=2) + ewc(samples=8) | prefix"
EVERY += [asked(spec, shard="blocks") for spec in HELD_IN_PARTS.split(" | ")]
EVERY += [asked("lora(rank=2, tower='both') + ewc(samples=8)", "retrieve", shard="blocks")]
SAMPLE = EVERY[::3]  # what CI asks one pair of processes for
SINGLE = EVERY[::7]


def place(each: Asked) -> str:
    return " ".join([each[0], *each[1].values(), *(f"{name}={value}" for name, value in each[3].items())])


@pytest.fixture(scope="session")
def pair(tmp_path_factory: Any) -> Callable[[str, str], list[Any]]:
    """What a pair of gloo processes says of each of a list, all of which it learns in one start."""

    @cache
    def started(every: str, precision: str) -> list[Any]:
        folder = tmp_path_factory.mktemp("pair")
        (folder / "asked.json").write_text(every)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # finds its port
        words += [str(ROOT / "tests/fixtures/pair.py"), "asked.json", "found.json"]
        there = os.environ | {"PERDURE_PAIR": precision, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=folder, env=there, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return list(json.loads((folder / "found.json").read_text()))

    return lambda every, precision: started(every, precision)


def found(pair: Any, each: Asked, of: list[Asked], precision: str) -> dict[str, Any]:
    said = pair(json.dumps(of), precision)[of.index(each)]
    assert isinstance(said, dict), said
    return said


def test_every_method_is_among_them() -> None:
    assert METHODS.keys() <= {part for each in EVERY for part in re.findall(r"\w+", each[0])}


@pytest.mark.parametrize("each", SAMPLE, ids=place)
def test_in_double_precision_two_processes_learn_what_one_learns(each: Asked, pair: Any) -> None:
    said = found(pair, each, SAMPLE, "float64")
    assert said["state"] <= 1e-8, said
    assert said["scores"] == 0, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("each", EVERY, ids=place)
def test_so_it_is_for_all(each: Asked, pair: Any) -> None:
    said = found(pair, each, EVERY, "float64")
    assert said["state"] <= 1e-8, said
    assert said["scores"] == 0, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("each", SINGLE, ids=place)
def test_in_single_precision_gradients_of_a_step_and_scores_are_the_same_but_for_rounding(
    each: Asked, pair: Any
) -> None:
    said = found(pair, each, SINGLE, "float32")
    assert said["gradients"] <= 1e-5, said
    assert said["scores"] <= 1 / 8, said  # one test image
