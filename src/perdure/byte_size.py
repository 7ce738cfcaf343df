"""A number of bytes as people write it (50e6, or "50MB"), and whether so many are free."""

import math
import re

from perdure.formatting import human_bytes

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}


def count_bytes(text: float | str, named: str = "bytes=") -> int:
    """The number of bytes that `text` means; kB is 1000, as in what the console shows, and KiB 1024.

    Raises:
        ValueError: when it is no positive number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, or none.
    """
    count = _counted(text) if isinstance(text, str) else text
    if not (math.isfinite(count) and count >= 1):
        raise ValueError(f"{named}{text!r}: expected a positive number of bytes, such as 50e6, 50MB or 50MiB")
    return int(count)


def _counted(text: str) -> float:
    found = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\d+)?) *([a-z]*)", text.strip().lower())
    return float(found[1]) * _UNITS.get(found[2], math.nan) if found else math.nan


def room_for(count: float, what: str) -> None:
    """Raise a `ValueError` when `what` would need more than this machine has free: before anything is allocated.

    An allocation that is too large may seem to succeed, and the process be killed when the memory is used.
    """
    import psutil  # here: advice, which reads numbers of bytes too, needs it not

    free = psutil.virtual_memory().available
    if count > free:
        raise ValueError(f"{what} takes {human_bytes(count)} of memory, and {human_bytes(free)} are free: give less")
