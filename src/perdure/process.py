"""The caller's process and thread: what perdure needs of them for a while, and how they are given back.

torch keeps some things for the whole process (its generators, the number of threads) and others for a thread (grad and
inference mode, autocast, the default device). Nothing of it stays changed once a call into perdure has returned.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

ALONE = threading.RLock()
"""Held by the one thread that switches something of the whole process."""


class Turn:
    """A re-entrant lock: threads take turns. A copy of its owner has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0  # how often the thread whose turn it is has taken it

    def __enter__(self) -> None:
        self._lock.acquire()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


@contextmanager
def plain() -> Iterator[None]:
    """Within, torch computes in this thread as it does in a new one, whatever mode the caller has entered.

    What is made under `torch.inference_mode` could never be trained, and autocast or a default device would change
    answers.
    """
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        accelerator = torch.accelerator.current_accelerator()
        for kind in ("cpu", *([accelerator.type] if accelerator else [])):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's own generators start from `seed`; other threads wait, and the generators go on as they were."""
    with ALONE:
        put_back = _generators()
        torch.manual_seed(seed)
        try:
            yield
        finally:
            put_back()


@contextmanager
def as_found(threads: int | None = None) -> Iterator[None]:
    """Within, torch's generators may be seeded, and it computes with `threads`; then all is as it was.

    Of several who are within at once, in nested calls or in other threads, the last one puts back what the first found.

    Args:
        threads: of this thread's operations; as many as it has when None.
    """
    with ALONE:
        before = torch.get_num_threads()
        if not _guests.count:
            _guests.threads, _guests.put_back = before, _generators()
        _guests.count += 1
        if threads is not None:
            torch.set_num_threads(threads)
    try:
        yield
    finally:
        with ALONE:
            _guests.count -= 1
            last = not _guests.count
            if (then := _guests.threads if last else before) != torch.get_num_threads():
                torch.set_num_threads(then)
            if last:
                _guests.put_back()


@dataclass
class _Guests:
    """Who is within `as_found`, and what the first one found."""

    count: int = 0
    threads: int = 1
    put_back: Callable[[], None] = lambda: None


_guests = _Guests()


def _generators() -> Callable[[], None]:
    """What puts torch's own generators back to where they are now."""
    seed = torch.initial_seed()
    back: list[Callable[[], object]] = [partial(torch.set_rng_state, torch.get_rng_state())]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            back.append(partial(device.set_rng_state_all, device.get_rng_state_all()))
        else:  # whenever it is used first, it starts from the seed of the CPU's
            back.append(partial(device.manual_seed_all, seed))
    if torch.backends.mps.is_available():
        back.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def put_back() -> None:
        for each in back:
            each()

    return put_back
