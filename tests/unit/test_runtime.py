"""What is found out about the machine, and that finding out leaves no trace."""

import pytest
import torch

from perdure.backbones.tiny import tiny
from perdure.training.runtime import Runtime, fastest_attention, native_bf16, resolve


def test_what_is_asked_for_is_not_measured() -> None:
    runtime = resolve(tiny(), "bf16", "eager", 8, "cpu")
    assert (runtime.device, runtime.precision, runtime.attention) == ("cpu", "bf16", "eager")
    assert runtime.dtype == torch.bfloat16
    assert resolve(tiny(), "fp32", "sdpa", 8, "cpu").dtype == torch.float32


def test_auto_chooses_native_precision_and_a_measured_attention() -> None:
    runtime = resolve(tiny(), "auto", "auto", 8, "cpu")
    assert runtime.precision == ("bf16" if native_bf16("cpu") else "fp32")
    assert runtime.attention in ("eager", "sdpa")


def test_measuring_leaves_no_gradient_and_thaws_nothing() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert fastest_attention(model, torch.float32, 4, rounds=1) in ("eager", "sdpa")
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
        resolve(tiny(), "fp32", "sdpa", 8, device)
