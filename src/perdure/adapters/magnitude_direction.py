"""Low-rank updates kept apart as directions, each with a magnitude that stays trainable (SD-LoRA)."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.state import BufferDict
from perdure.types import Site


class Magnitudes(Protocol):
    """Who holds the magnitudes (t,) that the adapters of all layers share."""

    magnitudes: nn.Parameter


class MagnitudeDirection(Adapter):
    """y + Σ_k magnitude_k · up_k (down_k x), the last branch in training, the former frozen.

    The cost of a step grows with the number of directions; prediction folds all of them into the weight.

    Args:
        site: the layer.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.fan_in, self.fan_out = site.fan_in, site.fan_out
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        # down (K, fan_in) and up (fan_out, K) of all directions side by side; owner (K,): which magnitude is a row's
        self.frozen = BufferDict()
        self._holder: tuple[Magnitudes, ...] = ()  # in a tuple: it is the method, and no part of us

    def open(self, rank: int, holder: Magnitudes) -> None:
        """Start a branch of `rank` that changes nothing yet; the last magnitude of `holder` is its own."""
        if rank < 1 or rank > self.fan_in:
            raise ValueError(f"rank={rank}: expected 1 to {self.fan_in}, the inputs of the layer")
        self.down = nn.Parameter(starting_rows(rank, self.fan_in))
        self.up = nn.Parameter(torch.zeros(self.fan_out, rank, dtype=torch.float32))
        self._holder = (holder,)

    @torch.no_grad()
    def close(self, keep: bool) -> None:
        """Freeze the branch as a direction, or forget it."""
        assert self.down is not None
        assert self.up is not None
        if keep:
            down, up, owner = self._frozen()
            mine = torch.full((len(self.down),), len(self._holder[0].magnitudes) - 1, device=self.down.device)
            self.frozen["down"] = torch.cat([down, self.down])
            self.frozen["up"] = torch.cat([up, self.up], dim=1)
            self.frozen["owner"] = torch.cat([owner, mine])
        self.down, self.up = None, None

    @torch.no_grad()
    def normalise(self, index: int, length: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Divide the direction whose magnitude is number `index` by its `length` (of up and down), where there is one.

        A direction of length 0 stays as it is.
        """
        if (found := self.direction(index)) is not None:
            up = self.frozen["up"].clone()  # others may hold the tensor: a state that is being written, a copy
            up[:, self.frozen["owner"] == index] /= length(*found).clamp_min(torch.finfo(torch.float32).tiny)
            self.frozen["up"] = up

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with all directions."""
        found = self.factors(part)
        if found is None:
            return y
        up, down = found
        return y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def factors(self, part: int) -> tuple[Tensor, Tensor] | None:
        """All of the update as (up (fan_out, k), down (k, fan_in)), magnitudes in `up`."""
        down, up, owner = self._frozen()
        if not self._holder:
            return None
        magnitudes = self._holder[0].magnitudes  # looked up each time: a step may compute with others in their place
        scales = magnitudes[owner]
        if self.down is not None and self.up is not None:
            down, up = torch.cat([down, self.down]), torch.cat([up, self.up], dim=1)
            scales = torch.cat([scales, magnitudes[-1:].expand(len(self.down))])
        return up * scales, down

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """See `Adapter.delta`; nothing is merged, since all magnitudes go on changing."""
        found = self.factors(part) if branches else None
        return None if found is None else found[0] @ found[1]

    def direction(self, index: int) -> tuple[Tensor, Tensor] | None:
        """(up, down) of the frozen direction whose magnitude is number `index`; None when there is none."""
        down, up, owner = self._frozen()
        mine = owner == index
        return (up[:, mine], down[mine]) if mine.any() else None

    def owners(self) -> list[int]:
        """Which magnitudes have a frozen direction here."""
        owners: list[int] = torch.unique(self._frozen()[2]).tolist()
        return owners

    def _frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.frozen:
            return self.frozen["down"], self.frozen["up"], self.frozen["owner"]
        like = self.down if self.down is not None else torch.empty(0, dtype=torch.float32)
        empty = like.new_zeros
        return empty(0, self.fan_in), empty(self.fan_out, 0), torch.zeros(0, dtype=torch.int64, device=like.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        known = any(key.startswith(prefix) for key in state_dict)
        if known and f"{prefix}down" not in state_dict:  # saved between tasks
            self.down, self.up = None, None
        super()._load_from_state_dict(state_dict, prefix, *args)
