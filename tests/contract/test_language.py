"""What every method must honour that teaches a multimodal language model: tiny ones, saved and read by real loaders."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from perdure.backbones.language import Language
from perdure.backbones.mllm import mllm
from perdure.core.learner import Core
from perdure.core.method import METHODS as CATALOGUE
from perdure.objectives.generate import Generate
from perdure.streams import build_stream
from perdure.training.config import make_method, register
from perdure.training.loop import Quiet, TrainConfig, fit_task
from perdure.types import Batch, Task

OTHERS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
TRAIN = TrainConfig(epochs=2, batch_size=4, lr=1e-2)
WORDS = "tower='language'"
L = f"lora(rank=2, {WORDS})"
# Each trains and measures; sums, parted by |, are of what guards and what is guarded.
METHODS = [
    "probe",
    *(
        f"{name}(rank=2, {WORDS})"
        for name in ("lora", "inflora", "sd_lora", "o_lora", "c_lora", "route_lora", "adapter")
    ),
    f"fm_lora(rank=4, {WORDS})",
    f"prompt(tokens=2, {WORDS})",
    f"prompt(tokens=2, deep=True, {WORDS})",
    f"prefix(length=2, {WORDS})",
    f"finetune({WORDS})",
    f"joint({WORDS})",
    f"gpm({WORDS}, keep=0.5)",
    f"moe_adapters(rank=2, {WORDS})",
    "lora_experts(rank=2)",
    "head_gates",
    "hide_lora(rank=2)",
    "disco(rank=2)",
    "pnn(rank=2)",
    "modal_prompt(tokens=2)",
    "smolora(rank=2, experts=4)",
    f"moe_lora(rank=4, experts=2, {WORDS})",
    f"reg_lora(rank=2, {WORDS})",
    f"inflora(rank=2, {WORDS}, balance=0.5)",
    f"lora(rank=2, {WORDS}, at='qkvo,mlp', per_task=True)",
    "lora(rank=2, tower='vision')",
    "lora(rank=2, tower='projector', at='mlp')",
    "lora(rank=2, tower='projector+language', at='mlp')",
    "adapter(rank=2, tower='vision')",
    "inflora(rank=2, tower='vision+projector+language', at='mlp')",
    "finetune(tower='vision+projector')",
    "prompt(tokens=2, tower='vision')",
    "prefix(length=2, tower='vision')",
    "prefix(length=2, tower='vision+language')",
    *(
        f"{L} + {guard}"
        for guard in (
            "ewc",
            "mas",
            "si",
            "lwf",
            "expert_distillation(epochs=1)",
            "feature_distill(tower='language')",
            "replay(size=6)",
            *(f"replay(size=6, selection={how!r})" for how in ("class_balanced", "herding", "kmeans", "el2n")),
            "derpp(size=6)",
            "gem(size=6)",
            "agem(size=6)",
            "weight_average",
            "joint",
            "reptile",
            "maml",
            "fomaml",
            "lamaml(size=6)",
        )
    ),
]
THREE = [L, f"inflora(rank=2, {WORDS})", f"{L} + replay(size=6)"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tasks of 6 questions to learn and 6 to test, of one image, of none and of two, answers of unlike length."""
    folder, random = tmp_path_factory.mktemp("questions"), np.random.default_rng(0)
    asked = {"colour": ("Which colour?", ("red", "blue", "green")), "many": ("How many are there?", ("two", "11"))}
    for task, (question, said) in asked.items():
        for part in ("train", "test"):
            rows = []
            for i in range(6):
                names = [f"{task}-{part}{i}-{n}.png" for n in range((1, 1, 2, 1, 0, 1)[i])]
                for name in names:
                    Image.fromarray(random.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(folder / name)
                value = "<image>\n" * len(names) + question + " Now!" * (i % 3)
                turns = [{"from": "human", "value": value}, {"from": "gpt", "value": said[i % len(said)]}]
                rows.append({"id": i, "image": names, "conversations": turns})
            (folder / f"{task}.{part}.json").write_text(json.dumps(rows))
    return f"conversations(path={str(folder)!r})"


@pytest.fixture(scope="module")
def model(tiny_mllms: Callable[[str], Path]) -> Callable[[str], Language]:
    """A fresh model of a family, as its loader reads it."""

    @cache
    def loaded(family: str) -> Language:
        return mllm(str(tiny_mllms(family)))

    return lambda family: copy.deepcopy(loaded(family))


class Bench:
    """A family's learners and two tasks."""

    def __init__(self, model: Callable[[], Language], stream: str) -> None:
        self.model = model
        self.tasks = build_stream(stream, model().preprocess, 0).tasks

    def learner(self, method: str) -> Core:
        return Core(self.model(), Generate(tokens=5), make_method(method), "domain")


@pytest.fixture(scope="module")
def bench(model: Any, files: str) -> Callable[[str], Bench]:
    return cache(lambda family: Bench(lambda: model(family), files))


def rows(learner: Core, batch: Batch) -> Tensor:
    """Hidden states in front of answers, as training computes them."""
    learner.prepare()
    with torch.no_grad():
        return learner.encode(batch).clone()


def answers(learner: Core, task: Task, size: int) -> list[str]:
    with learner.inference():
        return [text for batch in learner.batches(task.test, size) for text in learner.objective.say(learner, batch)]


def logits(learner: Core, task: Task, size: int) -> Tensor:
    with learner.inference():
        found = [learner.objective.scores(learner.encode(batch)) for batch in learner.batches(task.test, size)]
        return torch.cat(found).clone()


def honours_the_contract(bench: Bench, method: str) -> None:
    """Two tasks: trains all that it says it trains, goes on after a stop, answers by itself, remembers by its state."""
    learner, saved = bench.learner(method), list[Any]()
    for task in bench.tasks:
        learner.grow(task)
        trained = {name: value.detach().clone() for name, value in learner.trainable().items()}
        seen: set[str] = set()

        def look(step: int, optimizer: Any, task: Task = task, seen: set[str] = seen) -> None:
            seen |= {name for name, p in learner.trainable().items() if p.grad is not None and p.grad.any()}
            if task.index == 1 and step == 2:
                saved.extend(copy.deepcopy([learner.learnt_state(), optimizer.state_dict()]))

        fit_task(learner, task, TRAIN, save_step=look)
        # an expert that no example takes has no gradient, nor has what CLIP makes of its class token
        named = {name for name in trained if ".learnt." not in name and "post_layernorm" not in name}
        assert named <= seen, "trained in name only"
    frozen = not trained
    assert frozen == (method == "probe")
    first = bench.tasks[0]
    # by itself: neither what is said nor how sure it is depends on who else is asked
    assert answers(learner, first, 1) == answers(learner, first, 8)
    torch.testing.assert_close(logits(learner, first, 1), logits(learner, first, 8), rtol=1e-4, atol=1e-4)
    measured = learner.objective.evaluate(learner, bench.tasks)
    assert all({"strict", "lenient"} <= each.keys() for each in measured)
    # its state is its whole memory
    fresh = bench.learner(method)
    for task in bench.tasks:
        fresh.grow(Task.described(task.describe()))
    _, unexpected = fresh.load_state_dict(learner.learnt_state(), strict=False)
    fresh.learnt = 2
    assert unexpected == []
    assert torch.equal(logits(fresh, first, 8), logits(learner, first, 8))
    if frozen:
        return
    # a stop in the middle of the second task
    resumed = bench.learner(method)
    for task in bench.tasks:
        resumed.grow(task)
    resumed.learnt = 1
    resumed.load_state_dict(saved[0], strict=False)
    fit_task(resumed, task, TRAIN, resumed=(2, lambda optimizer: optimizer.load_state_dict(saved[1])))
    wanted, found = learner.learnt_state(), resumed.learnt_state()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_llava_learns_with_every_method_goes_on_after_a_stop_and_answers_alike_alone_and_in_a_batch(
    method: str, bench: Callable[[str], Bench]
) -> None:
    honours_the_contract(bench("llava"), method)


def refuses(family: str, method: str) -> str:
    """What is said where a family's attention takes no more tokens; see the page's table of methods."""
    if family.startswith("qwen") and method.startswith(("prompt", "prefix")) and "vision" in method:
        return "nothing can join the keys" if method.startswith("prefix") else "no token can join those of an image"
    if family == "qwen3_vl" and method.startswith(("prompt", "modal_prompt", "fm_lora")) and "deep" not in method:
        return "no token can join those of a conversation"
    return ""


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if method in THREE else pytest.mark.slow)
        for family in OTHERS
        for method in METHODS
    ],
)
def test_every_family_learns_with_these_methods(family: str, method: str, bench: Callable[[str], Bench]) -> None:
    if why := refuses(family, method):
        with pytest.raises(ValueError, match=why):
            honours_the_contract(bench(family), method)
        return
    honours_the_contract(bench(family), method)


JUMPS = ("prompt", "modal_prompt", "prefix", "fm_lora", "finetune", "gpm", "head_gates")  # which draws gates
"""What begins with more than adapters at zero (fm_lora by its prompts), or has none."""


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if family == "llava" or method in THREE else pytest.mark.slow)
        for family in ("llava", *OTHERS)
        for method in METHODS
        if "+ " not in method and not method.startswith(JUMPS)
    ],
)
def test_adapters_that_have_learnt_nothing_leave_logits_as_they_were(family: str, method: str, bench: Any) -> None:
    setting = bench(family)
    learner = setting.learner(method)
    (batch,) = learner.batches(setting.tasks[0].train, 8)
    with torch.no_grad():
        before = learner.backbone(batch)
    learner.grow(setting.tasks[0])
    assert torch.equal(rows(learner, batch), before)


@pytest.mark.parametrize("method", [L, f"{L} + replay(size=6)"])
def test_answers_of_unlike_length_weigh_the_same_in_a_batch_that_is_encoded_in_parts(method: str, bench: Any) -> None:
    found = []
    for parts in (1, 4):
        setting = bench("llava")
        learner = setting.learner(method)
        for task in setting.tasks:
            learner.grow(task)
            fit_task(learner, task, replace(TRAIN, accumulate=parts, optimizer="sgd"))
        found.append(learner.learnt_state())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


class Stepless(Quiet):
    """No step may be taken."""

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        raise AssertionError("it has learnt")


PAGE = (Path(__file__).parents[2] / "docs" / "mllm.md").read_text(encoding="utf-8")
REFUSED = re.findall(r"^\| `(.+)` \| (.+) \|$", PAGE.split("| refused | because |")[1].split("\n\n")[0], flags=re.M)


@pytest.mark.parametrize(("method", "why"), REFUSED)
def test_what_the_page_says_is_refused_is_refused_before_a_step(method: str, why: str, bench: Any) -> None:
    setting = bench("llava")

    def build() -> None:
        learner = setting.learner(method)
        learner.grow(setting.tasks[0])
        fit_task(learner, setting.tasks[0], TRAIN, Stepless())

    with pytest.raises(ValueError, match=re.escape(why)):
        build()


def test_every_method_is_either_taught_here_or_refused_on_the_page() -> None:
    named = {
        name for spec in (*METHODS, *(method for method, _ in REFUSED)) for name in re.findall(r"[a-z_0-9]+", spec)
    }
    register()
    ours = {name for name, method in CATALOGUE.items() if method.__module__.startswith("perdure.")}
    assert ours - named == set()


@pytest.mark.parametrize("guard", [each.split(" + ")[1] for each in METHODS if "+ " in each])
def test_a_guard_changes_what_is_learnt(guard: str, bench: Any, plain: Tensor) -> None:
    if guard.startswith(("gem", "agem")):
        pytest.skip("changes a step only where it would do harm")
    setting = bench("llava")
    learner = taught(setting, f"{L} + {guard}")
    assert not torch.equal(logits(learner, setting.tasks[0], 8), plain)


def test_a_specialist_and_the_former_learner_are_asked_for_every_token(bench: Any) -> None:
    setting = bench("llava")
    learner = setting.learner(f"{L} + expert_distillation(strength=3, temperature=1.5, epochs=9, lr=0.01)")
    learner.grow(setting.tasks[0])
    fit_task(learner, setting.tasks[0], TRAIN)
    learner.grow(setting.tasks[1])
    learner.train()
    learner.method.begin_task(learner, setting.tasks[1])
    part = list(learner.method)[-1]
    (batch,) = learner.batches(setting.tasks[1].train, 8)
    with torch.no_grad():
        features = learner.encode(batch)
        (given,) = learner.objective.distributions(features, batch)
        by_hand = []
        for teacher in (part.expert, part.teacher):
            (wanted,) = teacher.distributions(learner, batch)
            places = wanted.topk(64, 1).indices  # fewer than the vocabulary has
            logs = [(scores / 1.5).log_softmax(1) for scores in (wanted, given)]
            near = [torch.cat([each.gather(1, places), _rest(each, places)], 1) for each in logs]
            by_hand.append(1.5**2 * (near[0].exp() * (near[0] - near[1])).sum(1).mean())
        found = part.penalty(learner, batch, features)
        known = batch | part.precompute(learner, batch)
        torch.testing.assert_close(part.penalty(learner, known, features), found)
    torch.testing.assert_close(found, 3 * (by_hand[0] + by_hand[1]), rtol=1e-3, atol=1e-5)
    assert by_hand[1].abs() < 1e-5 < by_hand[0]  # nothing has moved yet, and the specialist has


def _rest(logs: Tensor, places: Tensor) -> Tensor:
    return logs.scatter(1, places, -torch.inf).logsumexp(1, keepdim=True)


def taught(setting: Bench, method: str) -> Core:
    learner = setting.learner(method)
    for task in setting.tasks:
        learner.grow(task)
        fit_task(learner, task, TRAIN)
    return learner


@pytest.fixture(scope="module")
def plain(bench: Any) -> Tensor:
    """What sequential LoRA makes of the first task in the end."""
    setting = bench("llava")
    return logits(taught(setting, L), setting.tasks[0], 8)
