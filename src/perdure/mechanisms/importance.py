"""Importance of parameters to single examples, and the quadratic penalty that holds what is important."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.adapters.injection import updates
from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.objective import Competitors
from perdure.mechanisms.gradients import at_scale, gradients_of, or_zeros
from perdure.types import Batch, Data, Site, take

Of = Literal["parameters", "updates"]
Output = Callable[[Tensor, Batch, Competitors], Tensor]
"""(features of one example, batch of one, what it competes with) to a scalar."""
_CHUNK = 16  # examples whose gradients are held at once
_OTHERS = 64  # pairs that a pair competes with
_MOST = 2**30  # bytes of gradients held at once
_UPDATE = "update/"


def held(learner: Core, of: Of) -> dict[str, Tensor]:
    """What a penalty may hold, by name, as a function of the parameters.

    `parameters`: all that are trained and outlive the task. `updates`: the linear update (fan_out, fan_in) of each
    adapted layer in place of its factors, which are not unique: A B = (A G)(G⁻¹ B); and the other parameters.
    """
    parameters: dict[str, Tensor] = dict(learner.shared())
    if of == "parameters":
        return parameters
    merged: dict[str, Tensor] = {}
    factors: set[int] = set()
    for site, adapter, part in updates(learner.backbone):
        delta = adapter.delta(part, branches=True)
        if delta is not None:
            merged[_key(site)] = merged[_key(site)] + delta if _key(site) in merged else delta
            factors |= {id(p) for p in adapter.parameters()}
    return {name: p for name, p in parameters.items() if id(p) not in factors} | merged


def check_updates(learner: Core, name: str) -> None:
    """Raise `ValueError` when no layer has a linear update that the method `name` could hold."""
    if not any(adapter.delta(part, branches=True) is not None for _, adapter, part in updates(learner.backbone)):
        raise ValueError(
            f"of='updates': no part of {learner.method.spec!r} adds a linear update to a layer, so {name} would hold "
            "none; write of='parameters'"
        )


@torch.no_grad()  # torch.func differentiates all the same, but no graph of the other parameters is kept
def importance(
    learner: Core, data: Data, of: Of, samples: int, purpose: str, output: Output, power: int
) -> dict[str, Tensor]:
    """Mean over examples of |∂ output / ∂ value|^power for each value that `held` gives, scaled to mean 1.

    Gradients are of single examples: a batch's gradient is far smaller than its examples'.

    Args:
        learner: at the end of a task.
        data: the task's.
        of: see `held`.
        samples: number of examples, as training sees them.
        purpose: of the choice of examples.
        output: what is differentiated.
        power: 1 or 2.
    """
    learner.prepare()  # a branch that another part has just closed must stand in the weights
    values = held(learner, of)
    if not values:
        return {}
    sites = {_key(site): site for site, _, _ in updates(learner.backbone) if _key(site) in values}
    # the gradient of an update is that of one more update, which is nothing yet
    at = {name: torch.zeros_like(value) if name in sites else value.detach() for name, value in values.items()}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    size = max(1, min(_CHUNK, _MOST // sum(value.nbytes for value in values.values())))
    asked = _Asked(learner, output)
    objective, others = learner.objective, Batch()
    gradients = _at_once
    if not objective.vectorised:
        gradients, size = _in_turn, _OTHERS
        others = objective.competitors(
            learner, next(learner.training_views(data, _OTHERS, f"{purpose} company", _OTHERS))
        )
    with ExitStack() as after:
        for name, site in sites.items():
            layer = learner.backbone.get_submodule(site.layer)
            after.callback(layer.register_forward_hook(partial(asked.add, name, site.rows)).remove)
        for views in learner.training_views(data, samples, purpose, size):
            batch = learner.cache.complete(views)
            asked.rivals = Competitors(objective.only_task_classes(batch), others)
            spans = None if learner.sharded else learner.processes.spans(len(batch["label"]))
            own = spans[learner.processes.rank] if spans else range(len(batch["label"]))
            counts = spans is not None or learner.processes.first  # what all compute counts once
            with learner.undivided():
                for found in gradients(asked, at, batch, own):
                    for name, gradient in found.items():
                        total[name] += counts * gradient.abs().pow(power).sum(0)
    return mean_one({name: learner.processes.sum(value) for name, value in total.items()})


class _Asked(nn.Module):
    """The output as a module, for `functional_call`, and as a function of what is held."""

    def __init__(self, learner: Core, output: Output) -> None:
        super().__init__()
        self.learner, self.output = learner, output
        self.rivals = Competitors()
        self.added: dict[str, Tensor] = {}
        self.scale = learner.scaler.get_scale()  # of the output, lowered where an example's gradient does not bear it

    def forward(self, batch: Batch) -> Tensor:
        return self.output(self.learner.encode(batch), batch, self.rivals)

    def of(self, values: dict[str, Tensor], example: Batch) -> Tensor:
        """The output of one example, a batch of one."""
        self.added = {name: value for name, value in values.items() if name.startswith(_UPDATE)}
        named = {f"learner.{name}": value for name, value in values.items() if name not in self.added}
        out: Tensor = functional_call(self, named, (example,))
        return out * self.scale

    def of_row(self, values: dict[str, Tensor], row: Batch) -> Tensor:
        """The output of one example without its first dimension, as `vmap` gives it."""
        return self.of(values, {name: value.unsqueeze(0) for name, value in row.items()})

    def add(self, name: str, rows: tuple[int, int], _layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """A layer's output with one more update; its weight itself may not seem to be trained."""
        if name not in self.added:
            return y
        more = F.linear(args[0], self.added[name].to(args[0].dtype))
        return y + F.pad(more, (rows[0], y.shape[-1] - rows[1]))


Gradients = Iterator[dict[str, Tensor]]
"""For some examples at a time and each name, (examples, ...)."""


def _at_once(asked: _Asked, at: dict[str, Tensor], batch: Batch, own: range) -> Gradients:
    # vmap has no rule for the fused kernels and would run them one example at a time
    def scaled(scale: float) -> list[Tensor]:
        asked.scale = scale
        with sdpa_kernel(SDPBackend.MATH):
            return list(vmap(grad(asked.of_row), in_dims=(None, 0))(at, take(batch, own)).values())

    found, asked.scale = at_scale(asked.scale, scaled)
    yield dict(zip(at, found, strict=True))


def _in_turn(asked: _Asked, at: dict[str, Tensor], batch: Batch, own: range) -> Gradients:
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    for i in own:
        example = asked.learner.objective.example(batch, i)

        def scaled(scale: float, example: Batch = example) -> Sequence[Tensor]:
            asked.scale = scale
            with torch.enable_grad():
                out = asked.of(leaves, example)
                return or_zeros(gradients_of(out, [*leaves.values()]), [*leaves.values()])

        found, asked.scale = at_scale(asked.scale, scaled)
        yield {name: gradient[None] for name, gradient in zip(leaves, found, strict=True)}


def _key(site: Site) -> str:
    return f"{_UPDATE}{site.key}"


class QuadraticPenalty(nn.Module):
    """Energy ½ Σ Ω (θ - θ*)²: one `weights` tensor Ω and one `anchors` tensor θ* per name, whatever number of tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.anchors = BufferDict(), BufferDict()

    def move_anchor(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Ω ← decay · Ω + `weights`, θ* ← `values`: all pull to the new values; other names are let go."""
        self.restrict(weights)
        for name, weight in weights.items():
            if name in self.weights:
                weight = decay * self.weights[name] + weight
            self.weights[name], self.anchors[name] = weight.contiguous(), values[name].contiguous()

    def accumulate(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Add a penalty around `values`, and leave the old ones where they are; other names are let go.

        Two quadratics of one number are one, of strength Ω + Ω' at their weighted mean: only the energy's constant
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
