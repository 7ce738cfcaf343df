"""What a command says, as JSON for programs."""

import json
import math
from typing import Any

from perdure.formatting import printable


def json_line(content: Any) -> str:
    """One line; None for what is not a finite number."""
    text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)
    # What JSON lets through may steer a terminal too; within its strings, its own escapes mean the same.
    return printable(text, lambda character: json.dumps(character)[1:-1])


def _finite(value: Any) -> Any:
    """JSON has no word for what is not a finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
