"""What is found out about the machine, and what is chosen by it, the same way every time."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from perdure.backbones.tiny import tiny
from perdure.core.checkpoint import read_record
from perdure.training.config import make_backbone
from perdure.training.loop import Quiet
from perdure.training.record import elsewhere, recorded_runtime
from perdure.training.run import run
from perdure.training.runtime import Runtime, resolve


def test_what_is_asked_for_is_what_is_taken() -> None:
    runtime = resolve(tiny(), "bf16", "eager", "cpu")
    assert (runtime.device, runtime.precision, runtime.attention) == ("cpu", "bf16", "eager")
    assert runtime.dtype == torch.bfloat16
    assert resolve(tiny(), "fp32", "sdpa", "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("backbone", "precision", "chosen"),
    [
        ("tiny(size=16)", "fp32", "sdpa"),
        ("tiny(size=16)", "bf16", "eager"),
        ("tiny(size=128)", "bf16", "sdpa"),
        ("tiny(size=128)", "fp32", "sdpa"),
        ("tiny_mllm()", "fp32", "sdpa"),
        ("tiny_mllm()", "bf16", "eager"),
        ("tiny_mllm(size=224)", "bf16", "sdpa"),
    ],
)
def test_two_starts_choose_alike_however_busy_the_machine_is(
    backbone: str, precision: Literal["fp32", "bf16"], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_backbone(backbone)

    def read() -> float:
        raise AssertionError("a clock is read")

    for clock in ("time", "perf_counter", "process_time", "monotonic"):
        monkeypatch.setattr(time, clock, read)
    assert [resolve(model, precision, "auto", "cpu").attention for _ in range(2)] == [chosen] * 2


@pytest.mark.parametrize(
    ("name", "amx", "avx", "chosen"),
    [
        ("Intel Xeon", True, True, "bf16"),
        ("Intel Xeon", False, True, "fp32"),
        ("AMD EPYC", False, True, "bf16"),
        ("AMD EPYC", False, False, "fp32"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(
    name: str, amx: bool, avx: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    for backbone in ("tiny()", "tiny_mllm()"):
        assert resolve(make_backbone(backbone), "auto", "auto", "cpu").precision == chosen


def test_a_resumed_run_computes_as_it_recorded_whatever_auto_would_choose_now(lab: Any, tmp_path: Path) -> None:
    config = replace(lab.but(tasks=1, epochs=1).config("probe"), attention="auto", precision="fp32")
    run(config, tmp_path / "run", runtime=Runtime("cpu", "fp32", "eager", 1))
    assert resolve(tiny(), "fp32", "auto", "cpu").attention == "sdpa"
    assert recorded_runtime(tmp_path / "run", read_record(tmp_path / "run")).attention == "eager"


def test_a_record_gives_the_same_runtime_back() -> None:
    runtime = Runtime("cpu", "bf16", "eager", 3)
    assert Runtime(**runtime.describe()) == runtime


def test_applying_a_runtime_sets_attention_and_leaves_the_process_alone() -> None:
    model, before = tiny(), torch.get_num_threads()
    Runtime("cpu", "fp32", "eager", before + 1).apply(model)
    assert torch.get_num_threads() == before
    assert {m.implementation for m in model.modules() if hasattr(m, "implementation")} == {"eager"}


@pytest.mark.parametrize("device", ["nonsense", "xpu:7", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used here .*; use auto$"):
        resolve(tiny(), "fp32", "sdpa", device)


def test_another_number_of_processes_is_told_and_noted_in_the_manifests_that_follow(lab: Any, tmp_path: Path) -> None:
    lab.run("probe", tmp_path / "run")
    began = recorded_runtime(tmp_path / "run", read_record(tmp_path / "run"))
    assert began.processes == 1
    said: list[str] = []

    class Hears(Quiet):
        def note(self, text: str) -> None:
            said.append(text)

    assert elsewhere(tmp_path / "run", began, Hears()) == {}
    assert elsewhere(tmp_path / "run", replace(began, processes=2), Hears()) == {"processes": 2}
    assert said == [
        "with processes=2 instead of 1 numbers are rounded differently: the result is not to the bit what it would "
        "have been"
    ]
