"""Steps with compiled blocks learn what plain ones learn, but for rounding; where they cannot, one line says why.

But for one, tests trace blocks and their gradients as the compiler has them, and compute the graphs with torch:
compiling C++ takes half a minute.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

from perdure.adapters.injection import attach
from perdure.adapters.low_rank import LowRank
from perdure.backbones.tiny import tiny
from perdure.core import compiling
from perdure.training.loop import fit_task
from perdure.training.run import run

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @cache
    def without_compiler(kind: Any) -> Any:
        return torch.compile(kind.forward, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(compiling, "_compiled", without_compiler)
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    torch._dynamo.utils.counters.clear()
    yield
    compiling.begin(tiny())


def learnt(lab: Any, spec: str, compile: bool, **how: Any) -> dict[str, torch.Tensor]:
    learner = lab.learner(spec)
    learner.compiles = compile
    for task in lab.stream().tasks[:2]:
        learner.grow(task)
        fit_task(learner, task, lab.train_config(optimizer="sgd", **how))
    return dict(learner.learnt_state())


def check_same(lab: Any, spec: str, **how: Any) -> None:
    plain, compiled = (learnt(lab, spec, compile, **how) for compile in (False, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}")


SPECS = (
    "lora(rank=2, blocks='0') + replay(size=6) | lora(rank=2, blocks='1') | inflora(rank=2) | "
    "inflora(ranks=(1, 2, 4)) | finetune + ewc(samples=8) | l2p(pool=4, top=2) | dualprompt | prefix | "
    "sd_lora(rank=2) | moe_adapters | adapter | fm_lora(rank=4) | lora(rank=2) + gem(size=8) | pnn | head_gates"
)


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=pytest.mark.slow if i > 2 else ()) for i, s in enumerate(SPECS.split(" | "))]
)
def test_compiled_steps_learn_what_plain_ones_learn(spec: str, lab: Any, traced: None) -> None:
    check_same(lab, spec)


def test_a_batch_in_parts_too(lab: Any, traced: None) -> None:
    check_same(lab, "lora(rank=2)", accumulate=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_the_compiler_itself(lab: Any) -> None:
    try:
        compiling.check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    torch._dynamo.utils.counters.clear()
    check_same(lab, "lora(rank=2, blocks='0') + replay(size=6)")


def test_a_block_computes_with_its_own_adapters_and_not_with_those_of_the_one_compiled_first(traced: None) -> None:
    backbone = tiny(depth=3)
    for block, word in enumerate("kvv"):
        site = backbone.sites(word, str(block))[0]
        adapter = LowRank([site], 2)
        adapter.open()
        with torch.no_grad():
            adapter.up[0].fill_(block + 1)
        attach(backbone, [site], adapter)
    batch = {"image": torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)}
    with compiling.compiled(backbone):
        found = backbone(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found, backbone(batch), rtol=1e-5, atol=1e-5)


def test_outside_a_step_blocks_are_plain_whatever_became_of_it() -> None:
    backbone = tiny()
    within = []
    with suppress(ZeroDivisionError), compiling.compiled(backbone):
        within += ["forward" in vars(block) for block in backbone.vision.blocks]
        within.append(1 / 0)
    assert within == [True, True]
    assert not any("forward" in vars(block) for block in backbone.vision.blocks)


@pytest.mark.parametrize(
    ("spec", "more", "said"),
    [
        ("probe", {}, "--compile has no effect where no part trains the encoder"),
        ("lora(rank=2) + oml", {}, "oml cannot learn with --compile"),
        ("lora(rank=2)", {"shard": "blocks"}, "shard='blocks'"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_learnt(
    spec: str, more: dict[str, Any], said: str, lab: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        run(lab.config(spec, compile=True, **more), tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_without_a_compiler_one_line_says_what_is_missing(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand much more")

    compiling.check_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: .* \(No working C\+\+ compiler found\): install") as error:
        run(lab.config("lora(rank=2)", compile=True), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "run.json").exists()


def test_too_many_graphs_are_one_line() -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with pytest.raises(ValueError, match="more than 64 times in one task"), compiling.compiled(tiny()):
        raise FailOnRecompileLimitHit("limit")
