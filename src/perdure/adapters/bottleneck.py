"""Bottlenecks: a small nonlinear network after a layer (Houlsby adapters) or beside the MLP (AdaptFormer)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.types import Site


class Bottleneck(Adapter):
    """y + scale · (up gelu(down y + down_bias) + up_bias), with y the layer's output.

    It starts as no change: `up` and the biases are zero. No weight can hold it.

    Args:
        site: the layer.
        rank: number of units in the middle.
        scale: factor of what is added.
        fan_in: how many numbers it reads; None for as many as the layer gives.
    """

    folds = False

    def __init__(self, site: Site, rank: int, scale: float = 1.0, fan_in: int | None = None) -> None:
        super().__init__()
        fan_in = fan_in or site.fan_out
        most = min(fan_in, site.fan_out)
        if rank < 1 or rank > most:
            raise ValueError(f"rank={rank}: expected 1 to {most}, the width at {site.layer}")
        self.scale = scale
        down = starting_rows(rank, fan_in)
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(down.new_zeros(rank))
        self.up = nn.Parameter(down.new_zeros(site.fan_out, rank))
        self.up_bias = nn.Parameter(down.new_zeros(site.fan_out))

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` (..., fan_out) with what the bottleneck makes of `x` (..., fan_in)."""
        # the master copies are float32, the encoder may compute in bfloat16
        down, down_bias, up, up_bias = (p.to(x.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return torch.add(y, F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias), alpha=self.scale)

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with what the bottleneck makes of it."""
        # rows of a fused layer are overwritten with the sum, and backward needs what they were: those are copied
        return self.added(y, y.contiguous())

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """None: there is no linear update."""
        return None


class Beside(Bottleneck):
    """The same from the MLP's input to its output: part 0 stands on its first layer, part 1 on its last.

    Args:
        sites: the first and the last layer of the MLP.
        rank: number of units in the middle.
        scale: factor of what is added.
    """

    def __init__(self, sites: Sequence[Site], rank: int, scale: float = 1.0) -> None:
        first, last = sites
        super().__init__(last, rank, scale, first.fan_in)
        self._read: Tensor | None = None  # the MLP's input, on its way from the first layer to the last

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The first layer's output as it is; the last one's with what the bottleneck makes of the MLP's input."""
        if part == 0:
            self._read = x
            return y
        assert self._read is not None
        x, self._read = self._read, None
        return self.added(y, x)
