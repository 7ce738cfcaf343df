"""What a new learner is where that is left open: by its backbone, and by what it is taught."""

from typing import Any

from perdure.options.rates import SPEAKING
from perdure.options.spec import parse_one

_SPEAKING = {
    "objective": "generate()",
    "method": "lora(rank=16, at='qkvo,mlp', tower='language')",
    "lr": SPEAKING,
    "batch_size": 16,
}
"""Of language models: the sites and the rate of LLaVA's LoRA."""


def usual(backbone: str) -> dict[str, Any]:
    """Fields of the configuration of a new learner on `backbone` whose defaults would be of no use there."""
    from typing import get_type_hints

    from perdure.backbones import BACKBONES
    from perdure.backbones.language import Language

    made = BACKBONES.get(parse_one(backbone).name)
    of = get_type_hints(made).get("return") if made else None
    return dict(_SPEAKING) if isinstance(of, type) and issubclass(of, Language) else {}


LEARNT = "probe + align"
"""The method of learners that are taught classes by hand, where none is named: see `docs/choosing.md`."""


def for_lessons(backbone: str, objective: str | None = None) -> dict[str, Any]:
    """Fields of the configuration of a new learner that is taught by hand, where they are left open."""
    classes = objective is None or parse_one(objective).name == "classify"
    return usual(backbone) or ({"method": LEARNT} if classes else {})
