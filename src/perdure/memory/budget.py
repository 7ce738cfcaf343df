"""A number of bytes as people write it: 50e6, or "50MB"."""

import math
import re

_UNITS = ("b", "kb", "mb", "gb", "tb")


def count_bytes(text: float | str) -> int:
    """The number of bytes that `text` means; units are powers of 1000, as in what the console shows.

    Raises:
        ValueError: when it is no positive number with one of the units B, kB, MB, GB, TB.
    """
    count = _counted(text) if isinstance(text, str) else text
    if not (math.isfinite(count) and count >= 1):
        raise ValueError(f"bytes={text!r}: expected a positive number of bytes, such as 50e6 or '50MB'")
    return int(count)


def _counted(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?) *([kmgt]?b)", text.strip().lower())
    return float(found[1]) * 1000 ** _UNITS.index(found[2]) if found else math.nan
