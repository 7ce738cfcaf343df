"""What a learner of a method on a backbone can be asked for, by their texts alone: exported, searched in words.

Imports nothing that computes. Tests hold it to what export and search do.
"""

from perdure.options.spec import parse

NOT_EXPORTABLE = frozenset(
    {
        "adapter",
        "coda_prompt",
        "disco",
        "dualprompt",
        "head_gates",
        "hide_lora",
        "icarl",
        "l2p",
        "lora_experts",
        "modal_prompt",
        "moe_adapters",
        "moe_lora",
        "pnn",
        "prefix",
        "prompt",
        "ranpac",
        "smolora",
    }
)
"""Parts that no weights and no classifier of rows can hold; a language model's experts go to PEFT all the same."""
_WITH_TEXTS = frozenset({"chinese_clip", "clip", "dual", "open_clip", "pocket"})
"""Backbones whose image and text encoders share a space."""


def exportable(method: str, backbone: str) -> bool:
    """Whether `perdure export` writes it for other libraries; features of several blocks it does not."""
    parts = parse(method)
    prompted = any(part.name == "fm_lora" and dict(part.kwargs).get("prompts", 1) for part in parts)
    return not (_takes_layers(backbone) or prompted) and NOT_EXPORTABLE.isdisjoint(part.name for part in parts)


def searchable(backbone: str) -> bool:
    """Whether `perdure search` finds images by words with it."""
    return not _takes_layers(backbone) and any(part.name in _WITH_TEXTS for part in parse(backbone))


def _takes_layers(backbone: str) -> bool:
    return any(dict(part.kwargs).get("layers") for part in parse(backbone))
