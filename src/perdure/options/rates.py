"""The learning rate that each method is trained with where none is given: Adam, half a cosine, batches of 32 or 64.

Imports nothing that computes. Rates that were measured are those of `docs/benchmarks.md`, chosen on a development class
order with `pocket()`.
"""

from dataclasses import dataclass

from perdure.options.spec import parse

USUAL = 1e-3
"""Of methods that have none of their own, and where heads alone are trained."""
SPEAKING = 2e-4
"""Of language models, whatever the method: LLaVA's."""
RETRIEVING = 2e-4
"""Where images and captions find each other, whatever the method: measured."""


@dataclass(frozen=True)
class OwnRate:
    """A method's learning rate.

    Args:
        rate: at the start of a task.
        source: where it is from.
    """

    rate: float
    source: str


_CHOSEN = "measured: the best of 1e-3, 3e-3 and 8e-3 for lora and inflora"
_ALIKE = "measured at lora's, with which it was compared"
_UNCOMPARED = "not compared with others"
RATES = {
    "adapter": OwnRate(3e-3, "measured: 15.5 %, at 1e-3 11.7"),
    "c_lora": OwnRate(3e-3, _ALIKE),
    "coda_prompt": OwnRate(3e-3, "measured: 19.5 %, at 2e-2 17.1"),
    "disco": OwnRate(USUAL, _UNCOMPARED),
    "dualprompt": OwnRate(3e-3, "measured: 19.7 %, at 2e-2 16.8"),
    "finetune": OwnRate(1e-3, "measured: the encoder learns at backbone_lr of it, 1e-4"),
    "fm_lora": OwnRate(3e-3, _ALIKE),
    "gpm": OwnRate(1e-3, "measured: the encoder learns at backbone_lr of it, 1e-4"),
    "head_gates": OwnRate(USUAL, _UNCOMPARED),
    "hide_lora": OwnRate(USUAL, _UNCOMPARED),
    "inflora": OwnRate(3e-3, _CHOSEN),
    "joint": OwnRate(1e-3, "as finetune"),
    "l2p": OwnRate(3e-2, "measured: 11.1 %, at 3e-3 8.5"),
    "lora": OwnRate(3e-3, _CHOSEN),
    "lora_experts": OwnRate(USUAL, _UNCOMPARED),
    "modal_prompt": OwnRate(USUAL, _UNCOMPARED),
    "moe_adapters": OwnRate(1e-3, "measured at this rate, zero-shot kept"),
    "moe_lora": OwnRate(USUAL, _UNCOMPARED),
    "o_lora": OwnRate(3e-3, _ALIKE),
    "pnn": OwnRate(USUAL, _UNCOMPARED),
    "prefix": OwnRate(3e-3, "measured: 20.1 %, at 2e-2 16.8"),
    "probe": OwnRate(3e-3, _ALIKE),
    "prompt": OwnRate(3e-3, "measured: 18.9 %, at 3e-2 16.7"),
    "reg_lora": OwnRate(USUAL, _UNCOMPARED),
    "route_lora": OwnRate(3e-3, _ALIKE),
    "sd_lora": OwnRate(3e-3, _ALIKE),
    "smolora": OwnRate(USUAL, _UNCOMPARED),
}
"""By method; parts that train nothing of their own take their partner's."""


def own_rate(method: str) -> float:
    """The rate of a sum of methods: the lowest of its parts'."""
    return min((RATES[part.name].rate for part in parse(method) if part.name in RATES), default=USUAL)
