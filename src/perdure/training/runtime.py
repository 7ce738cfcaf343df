"""Device, precision, attention, threads, memory: what the machine is good at, recorded with the run."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from accelerate import PartialState
from torch import distributed

from perdure.backbones.base import Backbone
from perdure.backbones.language import Language
from perdure.core.learner import Core
from perdure.core.processes import PATIENCE, Processes
from perdure.process import ALONE
from perdure.training.config import Attention, Precision

if sys.platform != "win32":
    import resource

FEW_TOKENS = 256
"""Up to so many, eager attention in bfloat16 is taken on a CPU."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """How a run computes. Written to run.json, and taken from there by `resume`: other kernels round differently."""

    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    attention: Literal["eager", "sdpa"]
    threads: int
    processes: int = 1

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
    backbone: Backbone, precision: Precision, attention: Attention, device: str = "auto", processes: int = 1
) -> Runtime:
    """Choose what `auto` leaves open, for a run of so many `processes`.

    Raises:
        ValueError: for another number of processes, or a device that is not there.
    """
    if launched() != processes:
        raise ValueError(
            f"{launched()} processes were launched; only 'perdure run' and 'perdure resume' learn in several: start it "
            "without a launcher"
        )
    name = (_found() if processes == 1 else PartialState().device.type) if device == "auto" else device
    check_device(name, f"device {device!r}", "use auto")
    chosen: Literal["fp32", "bf16", "fp16"] = "bf16" if native_bf16(name) else "fp32"
    if precision != "auto":
        chosen = precision
    backbone.to(name)
    best = attention if attention != "auto" else attention_for(backbone, name, chosen)
    return Runtime(name, chosen, best, torch.get_num_threads(), processes)


def launched() -> int:
    """How many processes a launcher has started (torchrun, accelerate, `perdure run --processes`), this one too."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Within, the processes that a launcher has started learn together, on `device`; without one, this one alone.

    A process whose launcher has ended asks itself to stop: nobody would end it, and it holds the run's folder.
    """
    if launched() == 1:
        yield Processes()
        return
    theirs = bool(PartialState._shared_state)  # a caller's, or an outer one of ours
    if not theirs:  # before it waits for the others
        watch = threading.Thread(target=_end_with, args=(os.getppid(),), name="perdure-launcher", daemon=True)
        watch.start()
    # unless it is told, Accelerate joins no processes where there is nothing but the CPU
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.num_processes != launched():
        raise ValueError(
            f"WORLD_SIZE={launched()}, but {state.num_processes} processes are there: start them by torchrun"
        )
    gloo = distributed.get_backend() == "gloo"
    control = None if gloo else distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Processes(state.process_index, state.num_processes, control)
    finally:
        if not theirs:
            PartialState._reset_state()
            with suppress(RuntimeError):  # of those that have ended already
                distributed.destroy_process_group()


def shard(learner: Core) -> None:
    """Let each process hold a part of every block of the frozen encoder, which it gathers while it is computed with.

    Blocks by themselves, so that some can be computed without the others. Updates then stay beside the weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(learner.device.type, (learner.processes.world,))
    learner.sharded, learner.backbone.folds = True, False
    for tower in learner.backbone.towers():
        for block in learner.backbone.blocks(tower):
            fully_shard(learner.backbone.get_submodule(block), mesh=mesh, reshard_after_forward=True)


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _found() -> str:
    """The device that Accelerate finds (CUDA, MPS, XPU, NPU, CPU)."""
    with ALONE:
        theirs = bool(PartialState._shared_state)
        found: str = PartialState().device.type
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
        why = str(error).splitlines()[0]
        if why.startswith("Expected one of"):  # and torch lists all that it was ever built for
            why = "devices are called cuda, cpu, mps, ..."
        raise ValueError(f"{given} cannot be used here ({why}); {remedy}") from error


def native_bf16(device: str) -> bool:
    """Whether the processor multiplies bfloat16 natively, and faster than float32.

    Of CPUs those with AMX do: 1.6 to 2.2 times as fast; and AMD's with avx512_bf16: twice. With these instructions and
    no AMX a Xeon takes 1.5 to 1.8 times as long as in float32 (`benchmarks/attention.py`). Without either, bfloat16 is
    emulated.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        tell = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch that is allowed
        told: dict[str, object] = tell()
        amd = str(told.get("cpu_name")).startswith("AMD")
        return bool(torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported()))
    return device in ("xpu", "npu")


def attention_for(backbone: Backbone, device: str, precision: str) -> Literal["eager", "sdpa"]:
    """The kernel that `auto` takes: by a rule, so that two starts of a run compute alike, however busy the machine is.

    It is fused attention, which writes no matrix of all pairs of tokens. In float32 neither is faster on a CPU: eager
    takes 0.96 to 1.04 of sdpa's time, at 17 to 577 tokens (`benchmarks/attention.py`). In bfloat16 on a CPU eager is:
    0.56 to 0.88 of sdpa's time at 37 to 400 tokens, and 0.83 in a step of a language model on 90. It is taken where
    tokens are few, for its matrices take memory.
    """
    few = device == "cpu" and precision == "bf16" and 0 < _tokens(backbone) <= FEW_TOKENS
    return "eager" if few else "sdpa"


def _tokens(backbone: Backbone) -> int:
    """Of an image, as the first vision block reads it, or of a short question about one; 0 where it is not known."""
    if isinstance(backbone, Language):
        [question] = backbone.tokens(backbone.sample())
        return len(question)
    if not backbone.has_blocks():
        return 0
    side = backbone.preprocess.size
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=next(backbone.parameters()).device)
    with torch.inference_mode():
        return backbone.before(0, {"image": image}).shape[1]


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
