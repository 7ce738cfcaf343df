"""What every method must honour when one learner is asked by many threads, and while it learns."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from perdure.api.learner import Learner
from perdure.core.method import METHODS
from perdure.core.shared_copy import twin_of
from perdure.training.config import register
from perdure.training.loop import Quiet
from perdure.types import Task

register()
THREADS, QUESTIONS = 8, 4
TEXTS = ("zscl", "mod_x")  # these read some
SPEAKS = ("smolora",)  # of conversations only
NAMED = [name if not method.protects else f"lora(rank=2) + {name}" for name, method in sorted(METHODS.items())]
PLACES = [(spec, "classify()") for spec in NAMED if not spec.endswith((*TEXTS, *SPEAKS))] + [
    ("lora(rank=2, tower='both') + zscl + weight_average", "zeroshot()"),
    ("inflora(rank=2, tower='both')", "zeroshot()"),
    ("sd_lora(rank=2) + replay(size=4)", "classify()"),
    ("coda_prompt(tower='both')", "zeroshot()"),
    ("l2p(tower='both')", "zeroshot()"),
    ("moe_adapters(tower='both')", "zeroshot()"),
    ("dualprompt(tower='both')", "retrieve()"),
    ("prefix(tower='both')", "retrieve()"),
    ("lora(rank=2, tower='both') + mod_x", "retrieve()"),
]
every_place = pytest.mark.parametrize(
    ("spec", "objective"),
    [pytest.param(*place, marks=[pytest.mark.slow] * (i % 2)) for i, place in enumerate(PLACES)],  # CI runs a half
)


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Asks(Quiet):
    """Asks while the task is learnt, and learns on once all threads have their answers."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.answers = learner, []

    def task(self, task: Task, tasks: int | None, epochs: int, steps: int) -> None:
        if not steps:
            self.answers += together(self.learner)

    def step(self, step: int, loss: torch.Tensor, images: int) -> None:
        if step == 1:
            self.answers += together(self.learner)


def pictures(seed: int, count: int = 8) -> torch.Tensor:
    noise = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return noise.to(torch.uint8)


def create(spec: str, objective: str) -> Learner:
    backbone = f"tiny(dim=16, text={objective != 'classify()'})"
    plain = {"precision": "fp32", "attention": "sdpa", "device": "cpu", "epochs": 1, "lr": 1e-2, "batch_size": 4}
    return Learner.create(backbone, spec, objective, **plain)


def teach(learner: Learner, lesson: int, progress: Any = None) -> None:
    names = [f"thing {lesson}{letter}" for letter in "abab" * 2]
    given = {"labels": names} if "classes" in learner.objective.asks else {"captions": names}
    learner.learn(pictures(lesson), progress=progress, **given)


def answer(learner: Learner, seed: int) -> Any:
    images = pictures(100 + seed, 3 + seed)
    return learner.predict(images) if "classes" in learner.objective.asks else learner.search(images, f"thing {seed}")


def together(learner: Learner) -> list[Any]:
    """The answers that many threads get at once, each question asked by two of them."""
    with ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(answer, learner, number % QUESTIONS) for number in range(THREADS)]
        return [each.result(timeout=60) for each in asked]


@every_place
def test_answers_of_eight_threads_are_those_of_one_and_wait_for_no_step_of_a_task(spec: str, objective: str) -> None:
    learner = create(spec, objective)
    teach(learner, 0)
    before = [answer(learner, seed) for seed in range(QUESTIONS)] * 2
    assert together(learner) == before
    asks = Asks(learner)
    teach(learner, 1, asks)
    assert asks.answers == before
    after = [answer(learner, seed) for seed in range(QUESTIONS)] * 2
    assert together(learner) == after


def test_a_core_is_asked_by_many_threads(lab: Any) -> None:
    learner = lab.taught("coda_prompt")
    images = lab.stream().tasks[0].test.__getitems__(range(8))

    def asked(count: int) -> torch.Tensor:
        with learner.inference():
            return learner({name: value[:count] for name, value in images.items()}).clone()

    one = [asked(count) for count in range(1, 9)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(asked, range(1, 9)), one, strict=True))


@pytest.mark.parametrize("spec", ["lora(rank=2)", "l2p", "coda_prompt", "moe_adapters"])
def test_learners_that_learn_at_once_learn_what_each_does_alone(spec: str) -> None:
    def learnt(seed: int) -> dict[str, torch.Tensor]:
        learner = create(spec, "classify()")
        for lesson in (seed, seed + 1):
            teach(learner, lesson)
        return learner.learnt_state()

    alone = [learnt(seed) for seed in range(4)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(learnt, range(4)))
    assert torch.equal(torch.get_rng_state(), before)
    for mine, its in zip(found, alone, strict=True):
        assert [key for key in its if not torch.equal(mine[key], its[key])] == []


def test_a_lesson_that_fails_leaves_the_learner_as_it_was() -> None:
    class Stops(Quiet):
        def step(self, step: int, loss: torch.Tensor, images: int) -> None:
            raise KeyboardInterrupt

    learner, calm = create("lora(rank=2)", "classify()"), create("lora(rank=2)", "classify()")
    for each in (learner, calm):
        teach(each, 0)
    before = answer(learner, 1), learner.known
    with pytest.raises(KeyboardInterrupt):
        teach(learner, 1, Stops())
    assert (answer(learner, 1), learner.known) == before
    for each in (learner, calm):
        teach(each, 2)
    assert answer(learner, 1) == answer(calm, 1)


def test_a_lesson_within_a_lesson_is_refused() -> None:
    class Nested(Quiet):
        def step(self, step: int, loss: torch.Tensor, images: int) -> None:
            teach(learner, 1)

    learner = create("lora(rank=2)", "classify()")
    with pytest.raises(ValueError, match=r"^this learner is learning: .*; call it after$"):
        teach(learner, 0, Nested())


def test_what_is_saved_while_it_learns_is_what_it_knew_before(tmp_path: Any) -> None:
    class Saves(Quiet):
        def step(self, step: int, loss: torch.Tensor, images: int) -> None:
            learner.save(tmp_path / "saved")

    learner = create("finetune", "classify()")
    teach(learner, 0)
    before = answer(learner, 1)
    teach(learner, 1, Saves())
    assert answer(Learner.load(tmp_path / "saved"), 1) == before != answer(learner, 1)
    learner.save(tmp_path / "saved")
    assert answer(Learner.load(tmp_path / "saved"), 1) == answer(learner, 1)


@pytest.mark.parametrize("spec", ["lora(rank=2)", "finetune", "gpm", "coda_prompt"])
def test_an_answer_between_a_step_s_forward_and_backward_pass_disturbs_neither(spec: str) -> None:
    learner = create(spec, "classify()")
    teach(learner, 0)
    before, twin = answer(learner, 1), twin_of(learner)
    twin.train()
    twin.requires_grad_(True)
    batch = twin.tasks[0].train.__getitems__(range(8))
    loss = twin.loss(batch)
    assert answer(learner, 1) == before
    loss.backward()


def test_frozen_weights_are_not_copied_while_a_task_is_learnt() -> None:
    learner = create("lora(rank=2, blocks='1')", "classify()")
    teach(learner, 0)
    twin = twin_of(learner)
    mine, its = (dict(each.backbone.named_parameters()) for each in (learner, twin))
    apart = {name for name in mine if mine[name].data_ptr() != its[name].data_ptr()}
    assert apart == {"vision.blocks.1.attn.qkv.weight"}
    assert all(twin.tasks[0] is task for task in learner.tasks)


@every_place
def test_the_default_dtype_changes_nothing(spec: str, objective: str) -> None:
    def made() -> tuple[Any, dict[str, torch.Tensor]]:
        learner = create(spec, objective)
        for lesson in (0, 1):
            teach(learner, lesson)
        return answer(learner, 1), learner.learnt_state()

    said, known = made()
    torch.set_default_dtype(torch.float64)
    try:
        found, its = made()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {key: value.dtype for key, value in its.items()} == {key: value.dtype for key, value in known.items()}
    assert [key for key in known if not torch.equal(its[key], known[key])] == []
    assert found == said
