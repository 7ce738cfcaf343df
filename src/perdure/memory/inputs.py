"""Second moments of the inputs that reach given layers: one forward pass for all layers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perdure.types import Batch


class _Enough(Exception):
    """All watched layers have been reached; what lies above them need not be computed."""


@torch.no_grad()
def second_moments(
    encode: Callable[[Batch], object],
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    mask: Callable[[], Tensor | None] = lambda: None,
) -> dict[str, Tensor]:
    """E[x xᵀ] of the inputs of each layer, uncentred, over all tokens: float64 (fan_in, fan_in).

    Products are formed in float32 outside autocast (in bfloat16 the subspaces are noise), as one flat xᵀx per batch,
    and summed in float64. A batch is not computed beyond the last watched layer.

    Args:
        encode: runs the model on a batch.
        layers: name -> layer to watch.
        batches: the data.
        mask: asked whenever a layer is reached: which tokens (n, L) of its input count; None counts all.
    """
    total: dict[str, Tensor] = {}
    count = dict.fromkeys(layers, 0)
    reached: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if (counts := mask()) is not None:
                x = x[counts.to(x.device)]
            with torch.autocast(x.device.type, enabled=False):
                x = x.detach().flatten(0, -2).float()
                product = x.T @ x
            # float64 holds sums of millions of tokens; MPS has none, so it is kept on the CPU there.
            product = product.cpu().double() if x.device.type == "mps" else product.double()
            total[name] = total[name].add_(product) if name in total else product
            count[name] += len(x)
            reached.add(name)
            if len(reached) == len(layers):
                raise _Enough

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            reached.clear()
            try:
                encode(batch)
            except _Enough:
                continue
            raise ValueError(f"the inputs of {sorted(layers.keys() - reached)} are never computed: choose other sites")
    finally:
        for handle in handles:
            handle.remove()
    return {name: total[name] / count[name] for name in layers}
