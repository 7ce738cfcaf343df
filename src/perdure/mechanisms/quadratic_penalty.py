"""Springs: what is learnt is held at old values, each number with a strength of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters.buffer_dict import BufferDict


class QuadraticPenalty(nn.Module):
    """Energy ½ Σ Ω (θ - θ*)²: one `weights` tensor Ω and one `anchors` tensor θ* per name, whatever number of tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.anchors = BufferDict(), BufferDict()

    def move_anchor(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Ω ← decay · Ω + `weights`, θ* ← `values`: all springs are hung on the new values; other names are let go."""
        self.restrict(weights)
        for name, weight in weights.items():
            if name in self.weights:
                weight = decay * self.weights[name] + weight
            self.weights[name], self.anchors[name] = weight.contiguous(), values[name].contiguous()

    def accumulate(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Add springs from `values`, and leave the old ones where they hang; other names are let go.

        Two springs on one number are one, of strength Ω + Ω' at their weighted mean: only the energy's constant
        changes, no force. So this stores no more after any number of tasks.
        """
        self.restrict(weights)
        for name, weight in weights.items():
            anchor = values[name].detach()
            if name in self.weights:
                old, weight = self.weights[name], self.weights[name] + weight
                # where nothing pulls, any anchor will do
                share = torch.where(weight > 0, old / weight, 0.0)
                anchor = torch.lerp(anchor, self.anchors[name], share)
            self.weights[name], self.anchors[name] = weight.contiguous(), anchor.contiguous()

    def restrict(self, names: Mapping[str, object]) -> None:
        """Let go of all but these."""
        for name in list(self.weights):
            if name not in names:
                del self.weights[name], self.anchors[name]

    def value(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """½ Σ Ω (θ - θ*)² over those of `values` that are held and depend on what is trained; 0.0 for none."""
        held = [(v, self.weights[k], self.anchors[k]) for k, v in values.items() if k in self.weights]
        held = [each for each in held if each[0].requires_grad]
        if not held:
            return 0.0
        moving, weights, anchors = (list(each) for each in zip(*held, strict=True))
        value: Tensor = _Energy.apply(weights, anchors, *moving)
        return value

    @torch.no_grad()
    def gradient(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of the energy, Ω (θ - θ*), for those of `values` that are held."""
        return {k: (v - self.anchors[k]) * self.weights[k] for k, v in values.items() if k in self.weights}


class _Energy(torch.autograd.Function):
    """The energy with its known gradient: two passes over the numbers, and no graph of small operations to go back."""

    @staticmethod
    def forward(ctx: Any, weights: list[Tensor], anchors: list[Tensor], *values: Tensor) -> Tensor:
        offsets = torch._foreach_sub(values, anchors)
        gradient = torch._foreach_mul(offsets, weights)
        ctx.gradient = gradient
        pairs = zip(offsets, gradient, strict=True)
        return 0.5 * torch.stack([torch.dot(offset.flatten(), force.flatten()) for offset, force in pairs]).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradient, outer[0])


def mean_one(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` over their common mean, so that a strength means the same for every model; all zero stays so."""
    total = torch.stack([weight.sum() for weight in weights.values()]).sum()
    mean = total / sum(weight.numel() for weight in weights.values())
    return {name: weight / mean.clamp_min(torch.finfo(mean.dtype).tiny) for name, weight in weights.items()}
