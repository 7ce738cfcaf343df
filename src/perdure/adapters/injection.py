"""Injection: an adapter sees a layer's input and output and returns a new output.

The pre-trained model's code and names stay as they are, adapters belong to the method, and `detach` gives the
pre-trained weights back bit for bit. Linear updates that are finished are folded into the layer's weight, so a step
and a prediction cost the same after any number of tasks. Where weights cannot be written (quantised, or shared by
several processes), or a second copy of them is too much, updates stay beside the layer: `Backbone.folds` is False.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from perdure.types import Site


class Adapter(nn.Module):
    """What is added to one or more layers that read the same input."""

    folded: bool = False
    """True while all of the update stands in the layers' weights, so that there is nothing left to add."""
    folds: bool = True
    """Whether weights can hold it: False when what is added depends on the image."""
    gate: Tensor | None = None
    """Weights (rank,) of the inner dimensions of the branch in training, while a rank is being chosen."""

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """Input (..., fan_in) and output (..., fan_out) of the adapted layer number `part` to its new output."""
        raise NotImplementedError

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """The linear update as a matrix (fan_out, fan_in), None when there is none.

        Args:
            part: which of the adapted layers.
            branches: with the branch in training, not only what is merged.
        """
        raise NotImplementedError

    def past(self, x: Tensor, part: int) -> Tensor | None:
        """What is merged, applied to the layer's input, where weights do not hold it; None when there is none."""
        update = self.delta(part, branches=False)
        return None if update is None else F.linear(x, update.to(x.dtype))

    def factors(self, part: int) -> tuple[Tensor, Tensor] | None:
        """All of the update as (up (fan_out, k), down (k, fan_in)), exact; None when there is none."""
        update = self.delta(part, branches=True)
        if update is None:
            return None
        return update, torch.eye(update.shape[1], dtype=update.dtype, device=update.device)


def starting_rows(rank: int, fan_in: int) -> Tensor:
    """Input factor (rank, fan_in) of a new branch: Kaiming uniform, as in LoRA; its output factor starts at zero."""
    rows = torch.empty(rank, fan_in, dtype=torch.float32)
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
    return rows


A = TypeVar("A", bound=Adapter)


class Adapters(nn.ModuleList, Generic[A]):
    """A method's adapters, one per layer; empty until they are placed."""

    def place(
        self, backbone: nn.Module, sites: Iterable[Site], make: Callable[[Site], A], fold: bool | None = None
    ) -> None:
        """Make an adapter for each site and put it there, `fold` as in `attach`; nothing when that has been done."""
        if len(self):
            return
        for site in sites:
            adapter = make(site)
            self.append(adapter)
            attach(backbone, [site], adapter, fold)

    def __iter__(self) -> Iterator[A]:
        return super().__iter__()  # type: ignore[return-value]


@dataclass
class _AdaptedLayer:
    """What stands on one layer. Kept on the layer as a plain attribute: it is no part of any state."""

    pretrained: Tensor | None
    """The weight that updates are folded into; None where they stay beside it."""
    adapters: list[tuple[Adapter, int, Site]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)


_ADAPTED_LAYER = "perdure_adapted_layer"
_HOOKS = "perdure_hooks"
_BEHIND = "perdure_adapters_behind"


def attach(model: nn.Module, sites: Sequence[Site], adapter: Adapter, fold: bool | None = None) -> None:
    """Put `adapter` on `sites`, which read the same input; part i of the adapter goes to site i.

    Args:
        model: the backbone.
        sites: where.
        adapter: what.
        fold: whether finished updates are written into the layers' weights, for which a copy of these is kept; else
            they are computed beside them in every step. None is as the model has it (`folds`).
    """
    fold = getattr(model, "folds", True) if fold is None else fold
    for part, site in enumerate(sites):
        layer = _linear(model.get_submodule(site.layer), site.layer)
        adapted_layer = getattr(layer, _ADAPTED_LAYER, None)
        if adapted_layer is None:
            # a copy, in the precision the model came in: what is folded is always computed from it
            adapted_layer = _AdaptedLayer(layer.weight.detach().clone() if fold else None)
            setattr(layer, _ADAPTED_LAYER, adapted_layer)
        whole = site.rows == (0, layer.out_features)
        # partial, not a closure: a copied learner must call its own adapters.
        hook = partial(_adapt, adapter, part, None if whole else site.rows, adapted_layer.pretrained is None)
        adapted_layer.adapters.append((adapter, part, site))
        adapted_layer.handles.append(layer.register_forward_hook(hook))


def attach_behind(block: nn.Module, adapter: Adapter) -> None:
    """Put `adapter`, which no weight can hold, behind a whole block, whose input and output it sees as part 0."""
    handle = before_recorders(block, partial(_behind, adapter))
    setattr(block, _BEHIND, [*getattr(block, _BEHIND, ()), handle])


def before_recorders(block: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a forward hook that changes what `block` gives: behind others, but before those of transformers.

    These record what blocks give, which some models (LLaVA) go on with; the model's first call puts them there, whether
    it comes before the hook or after.
    """
    handle, hooks = block.register_forward_hook(hook), block._forward_hooks
    for key, other in [*hooks.items()]:
        if getattr(other, "__module__", "").startswith("transformers."):
            hooks[key] = hooks.pop(key)  # to the end
    return handle


def _behind(adapter: Adapter, _block: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    changed: Tensor = adapter.forward(args[0], y, 0)
    return changed


def overhear(model: nn.Module, site: Site, module: nn.Module, listener: Callable[[Tensor], None]) -> None:
    """Tell `listener`, a bound method of an adapter on `site`, what `module` reads; until `detach`.

    A bound method and no closure: in a deep copy of a learner it belongs to the copied adapter.
    """
    adapted_layer: _AdaptedLayer = getattr(model.get_submodule(site.layer), _ADAPTED_LAYER)
    adapted_layer.handles.append(module.register_forward_pre_hook(partial(_overheard, listener)))


def _overheard(listener: Callable[[Tensor], None], _module: nn.Module, args: tuple[Any, ...]) -> None:
    listener(args[0])


def _adapt(
    adapter: Adapter,
    part: int,
    rows: tuple[int, int] | None,
    beside: bool,
    _layer: nn.Module,
    args: tuple[Any, ...],
    y: Tensor,
) -> Tensor | None:
    if adapter.folded:
        return None
    own = y if rows is None else y[..., rows[0] : rows[1]]
    new = adapter.forward(args[0], own, part)
    if beside and (past := adapter.past(args[0], part)) is not None:
        new = new + past
    if rows is None:
        return new
    # In place: no backward needs the output of a linear layer, and copying a fused one costs more than the update.
    y[..., rows[0] : rows[1]] = new
    return y


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__}: only nn.Linear can be adapted; choose other sites")
    return layer


def _adapted_layers(model: nn.Module) -> Iterator[tuple[nn.Linear, _AdaptedLayer]]:
    for layer in model.modules():
        adapted_layer = getattr(layer, _ADAPTED_LAYER, None)
        if isinstance(layer, nn.Linear) and adapted_layer is not None:
            yield layer, adapted_layer


def folded_into(model: nn.Module) -> Iterator[tuple[nn.Linear, Tensor]]:
    """The layers that carry adapters, whose weights `fold` writes; and their pre-trained weights, which stay."""
    return (
        (layer, adapted_layer.pretrained)
        for layer, adapted_layer in _adapted_layers(model)
        if adapted_layer.pretrained is not None
    )


def adapted(model: nn.Module) -> bool:
    """Whether any layer or block of `model` carries an adapter, or any block takes other tokens."""
    behind = any(hasattr(module, _BEHIND) for module in model.modules())
    return behind or next(_adapted_layers(model), None) is not None or prompted(model)


def prompted(model: nn.Module) -> bool:
    """Whether any block of `model` reads or gives more than its weights say."""
    return any(hasattr(module, _HOOKS) for module in model.modules())


def hold(block: nn.Module, handles: Sequence[RemovableHandle]) -> None:
    """Remember hooks that make `block` read or give something else, for `adapted` and `detach`."""
    setattr(block, _HOOKS, [*getattr(block, _HOOKS, ()), *handles])


@torch.no_grad()
def fold(model: nn.Module, branches: bool) -> None:
    """Write the linear updates of all adapters into the weights of their layers.

    Always computed anew from the pre-trained weight, so it can be repeated and undone without drift.

    Args:
        model: the module whose layers carry adapters.
        branches: fold what is in training too (for prediction), or only what is merged (for training).
    """
    for layer, adapted_layer in _adapted_layers(model):
        weight = layer.weight
        if adapted_layer.pretrained is None:
            continue
        if weight.requires_grad:
            raise ValueError(
                "a layer is both adapted and fine-tuned: the adapter's update would be lost. Use one of the two"
            )
        folded = adapted_layer.pretrained.to(weight.device, torch.float32, copy=True)
        for adapter, part, site in adapted_layer.adapters:
            update = adapter.delta(part, branches)
            if update is not None:
                folded[site.rows[0] : site.rows[1]] += update
        weight.copy_(folded)
    for _, adapted_layer in _adapted_layers(model):
        for adapter, _, _ in adapted_layer.adapters:
            adapter.folded = branches and adapter.folds and adapted_layer.pretrained is not None


def detach(model: nn.Module) -> None:
    """Take all adapters off and restore the pre-trained weights bit for bit."""
    for layer, adapted_layer in list(_adapted_layers(model)):
        for handle in adapted_layer.handles:
            handle.remove()
        if adapted_layer.pretrained is not None:
            layer.weight.data.copy_(adapted_layer.pretrained)
        delattr(layer, _ADAPTED_LAYER)
    for block in model.modules():
        for name in (_HOOKS, _BEHIND):
            for handle in vars(block).pop(name, ()):
                handle.remove()


def updates(model: nn.Module) -> Iterator[tuple[Site, Adapter, int]]:
    """All (site, adapter, part) of `model`, for export."""
    for _, adapted_layer in _adapted_layers(model):
        for adapter, part, site in adapted_layer.adapters:
            yield site, adapter, part
