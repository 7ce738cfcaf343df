"""Second moments of the inputs that reach given layers: in one forward pass for all layers, or while training."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.adapters.buffer_dict import BufferDict
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
            product, tokens = _product(x)
            total[name] = total[name].add_(product) if name in total else product
            count[name] += tokens
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


def _product(x: Tensor) -> tuple[Tensor, int]:
    """The sum of x xᵀ over all tokens of (..., d), float64 (d, d), and how many these are."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().flatten(0, -2).float()
        product = x.T @ x
    # float64 holds sums of millions of tokens; MPS has none, so it is kept on the CPU there.
    return product.cpu().double() if x.device.type == "mps" else product.double(), len(x)


class Collected(BufferDict):
    """Second moments of what layers read in training steps: no pass of their own, but of weights that still move.

    Sums are part of the state, so that a run stopped in between goes on with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def images(self) -> int:
        """How many were counted."""
        return int(self["images"]) if "images" in self else 0

    @property
    def listening(self) -> bool:
        """Whether something is held for `add`."""
        return bool(self._handles)

    def listen(self, layers: Mapping[str, nn.Module]) -> None:
        """Hold what each of `layers` reads in the next forward pass that is trained on, until `add`."""

        def hear(name: str, _layer: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():  # a teacher's pass is none of them
                self._heard.setdefault(name, args[0].detach())

        self._handles = [layer.register_forward_pre_hook(partial(hear, name)) for name, layer in layers.items()]

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Count `images` (rows of the batch) of what was heard, and listen no more."""
        for handle in self._handles:
            handle.remove()
        for name, x in self._heard.items():
            product, tokens = _product(x[images])
            for key, value in ((f"sum/{name}", product), (f"tokens/{name}", torch.tensor(tokens))):
                self[key] = self[key] + value if key in self else value
        self["images"] = torch.tensor(self.images + len(images))
        self._handles, self._heard = [], {}

    def finish(self) -> dict[str, Tensor]:
        """E[x xᵀ] of each layer, as `second_moments` gives it; the sums begin anew."""
        names = [key.removeprefix("sum/") for key in self if key.startswith("sum/")]
        found = {name: self[f"sum/{name}"] / self[f"tokens/{name}"] for name in names}
        self.clear()
        return found
