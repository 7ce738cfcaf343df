"""Names of saved tensors that older versions wrote, and what they are called now.

A saved tensor is named by the attributes that lead to it, so that the name of an attribute is part of the format.
"""

from collections.abc import Mapping

from torch import Tensor, nn

SINCE = 3
"""Tensors of this format and later ones have the names of today."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "Align": {"gaussians": "class_statistics"},
    "ClassStatistics": {"spreads": "covariances"},
    "ClassTable": {"kept": "features"},
    "DERPP": {"stored": "stored_logits"},
    "DRS": {"chosen": "selected"},
    "EWC": {"springs": "quadratic_penalty"},
    "FeatureDistill": {"names": "name_embeddings"},
    "FMLoRA": {"kept": "previous_prompts"},
    "GPM": {"spaces": "subspaces"},
    "InfLoRA": {"spaces": "subspaces", "collected": "running_moments"},
    "LowRank": {"settled": "merged"},
    "MAS": {"springs": "quadratic_penalty"},
    "Mixture": {"gateway": "task_identifier"},
    "OLoRA": {"rows": "past_rows"},
    "RanPAC": {"held": "regression"},
    "ReplayBuffer": {"kept": "references"},
    "SharedBasis": {"settled": "merged"},
    "SI": {"springs": "quadratic_penalty"},
    "TaskGaussians": {"kept": "gaussians"},
    "Teacher": {"kept": "weights"},
    "WeightAverage": {"kept": "average"},
}
"""Class of a method's module, or of one that it derives from -> an attribute's name until format 2 -> its name now.

No parameter is among them: what is stored by parameters' names, such as an optimizer's state, is as it was.
"""


def renamed(tensors: Mapping[str, Tensor], method: nn.Module) -> dict[str, Tensor]:
    """`tensors` of a learner with `method`, saved by a format before `SINCE`, by the names of today."""
    prefixes = [
        (f"{path}.{old}.", f"{path}.{new}.")
        for path, module in method.named_modules(prefix="method")  # outer ones first: inner paths have their new names
        for kind in type(module).__mro__
        for old, new in RENAMED.get(kind.__name__, {}).items()
    ]
    found = {}
    for key, tensor in tensors.items():
        for old, new in prefixes:
            if key.startswith(old):
                key = new + key.removeprefix(old)
        found[key] = tensor
    return found
