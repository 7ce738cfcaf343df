"""Device, precision, attention, threads, memory: what the machine is good at, recorded with the run."""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import PartialState
from torch import nn

from perdure.backbones.base import Backbone
from perdure.process import ALONE
from perdure.training.settings import Attention, Precision

if sys.platform != "win32":
    import resource

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """How a run computes. Written to run.json, and taken from there by `resume`: other kernels round differently."""

    device: str
    precision: Literal["fp32", "bf16"]
    attention: Literal["eager", "sdpa"]
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's matrix products."""
        return _DTYPES[self.precision]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def apply(self, backbone: Backbone) -> None:
        """Prepare the backbone; what is learnt is computed with the run's threads, see `process.as_found`."""
        backbone.to(self.device)
        backbone.set_attention(self.attention)


def resolve(
    backbone: Backbone, precision: Precision, attention: Attention, batch_size: int, device: str = "auto"
) -> Runtime:
    """Choose what `auto` leaves open.

    Raises:
        ValueError: for several processes, or a device that is not there.
    """
    there, processes = _found(device == "cpu")
    if processes > 1:
        raise ValueError(f"{processes} processes were launched; perdure trains in one: start it without a launcher")
    name = there if device == "auto" else device
    check_device(name, f"device {device!r}", "use auto")
    chosen = precision if precision != "auto" else ("bf16" if native_bf16(name) else "fp32")
    backbone.to(name)
    best = attention if attention != "auto" else fastest_attention(backbone, _DTYPES[chosen], batch_size)
    return Runtime(name, chosen, best, torch.get_num_threads())


def _found(cpu: bool) -> tuple[str, int]:
    """The device that Accelerate finds (CUDA, MPS, XPU, NPU, CPU), and the number of the launcher's processes."""
    with ALONE:
        theirs = bool(PartialState._shared_state)
        state = PartialState(cpu=cpu)
        found = state.device.type, state.num_processes
        if not theirs:  # its state is one for the process: the caller's own use of Accelerate would get ours
            PartialState._reset_state()
        return found


def check_device(name: str, given: str, remedy: str) -> None:
    """Refuse a device that this machine lacks.

    Args:
        name: of the device.
        given: what asked for it, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: when it cannot be computed on.
    """
    try:
        torch.ones(1, device=name).item()  # a number that comes back: "meta" makes tensors, but keeps none
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"{given} cannot be used here ({str(error).splitlines()[0]}); {remedy}") from error


def native_bf16(device: str) -> bool:
    """Whether the processor multiplies bfloat16 natively; emulation would be slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device in ("xpu", "npu")


def fastest_attention(
    backbone: Backbone, dtype: torch.dtype, batch_size: int, rounds: int = 3
) -> Literal["eager", "sdpa"]:
    """Time a training step with both implementations on this machine. Off the CPU, SDPA's fused kernels always win."""
    device = next(backbone.parameters()).device
    if device.type != "cpu" or not backbone.has_blocks():
        return "sdpa"
    side = backbone.preprocess.size
    image = torch.zeros(min(batch_size, 32), 3, side, side, dtype=torch.uint8, device=device)
    best: dict[Literal["eager", "sdpa"], float] = {}
    watched = backbone.get_submodule(backbone.blocks()[0])
    before = {p: p.requires_grad for p in watched.parameters()}
    try:
        watched.requires_grad_(True)  # so that the backward pass runs through all blocks
        for name in ("eager", "sdpa"):
            backbone.set_attention(name)
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    features = backbone({"image": image})
                features.float().sum().backward()
                times.append(time.perf_counter() - start)
            best[name] = min(times[1:])
    finally:
        _clear(watched, before)
    return min(best, key=lambda name: best[name])


def _clear(module: nn.Module, before: dict[nn.Parameter, bool]) -> None:
    for p in module.parameters():
        p.grad = None
        p.requires_grad_(before[p])


def peak_memory() -> int:
    """Bytes this process has held at most."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started us
        high = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
