"""Low-rank updates of linear layers: one branch in training, what past tasks learnt merged beside it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, Adapters, starting_rows
from perdure.adapters.state import BufferDict
from perdure.types import Site


def scale_of(alpha: float | None, rank: int) -> float:
    """Factor of a branch: alpha / rank, as in the LoRA paper; 1 where alpha is None."""
    return 1.0 if alpha is None else alpha / rank


class LowRank(Adapter):
    """y + scale · up (down x), for one or more layers that read the same input.

    `down` (rank, fan_in) is shared by the layers, each has its own `up` (fan_out, rank): in the letters of the LoRA
    paper, A and B. Settled branches are kept as factors while that is smaller than the dense update, else dense.

    Args:
        sites: the layers, which read the same input.
        rank: inner dimension of a branch.
        scale: factor of a branch (alpha / rank in PEFT).
    """

    def __init__(self, sites: Sequence[Site], rank: int, scale: float = 1.0) -> None:
        super().__init__()
        if rank < 1 or rank > sites[0].fan_in:
            raise ValueError(f"rank={rank}: expected 1 to {sites[0].fan_in}, the inputs of {sites[0].layer}")
        self.rank, self.scale, self.fan_in = rank, scale, sites[0].fan_in
        self.fan_outs = [site.fan_out for site in sites]
        self.down: nn.Parameter | None = None
        self.up = nn.ParameterList()
        self.merged = BufferDict()

    def open(self, train_down: bool = True) -> None:
        """Start a branch that changes nothing yet: `down` as in LoRA (Kaiming uniform), `up` zero."""
        self.down = nn.Parameter(starting_rows(self.rank, self.fan_in), requires_grad=train_down)
        self.up = nn.ParameterList(torch.zeros(fan_out, self.rank, dtype=torch.float32) for fan_out in self.fan_outs)

    def cut(self, rank: int) -> None:
        """Keep the first `rank` inner dimensions of the open branch."""
        if self.down is not None:
            self.down = nn.Parameter(self.down.detach()[:rank].clone(), self.down.requires_grad)
            self.up = nn.ParameterList(up.detach()[:, :rank].clone() for up in self.up)

    @torch.no_grad()
    def merge(self) -> None:
        """Close the branch: its update becomes part of the past."""
        if self.down is None:
            return
        whole = [self.factors(part) for part in range(len(self.up))]
        self.merged.clear()
        for part, (up, down) in enumerate(filter(None, whole)):
            if len(down) * (self.fan_in + sum(self.fan_outs)) <= self.fan_in * sum(self.fan_outs):
                self.merged["down"], self.merged[f"up/{part}"] = down, up
            else:
                self.merged[f"dense/{part}"] = up @ down
        self.down, self.up = None, nn.ParameterList()

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with the branch in training; merged branches stand in the layer's weight."""
        if self.down is None:
            return y
        # the master copies are float32, the encoder may compute in bfloat16
        inner = F.linear(x, self.down.to(x.dtype))
        if self.gate is not None:
            inner = inner * self.gate.to(x.dtype)
        update = F.linear(inner, self.up[part].to(x.dtype))
        return y + (update if self.scale == 1 else self.scale * update)

    def past(self, x: Tensor, part: int) -> Tensor | None:
        """See `Adapter.past`; through the factors while they are kept."""
        if f"up/{part}" not in self.merged:
            return super().past(x, part)
        down, up = self.merged["down"], self.merged[f"up/{part}"]
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        known = any(key.startswith(prefix) for key in state_dict)  # else it is missing, which must be noticed
        if known and f"{prefix}down" not in state_dict:  # saved between tasks, when no branch was open
            self.down, self.up = None, nn.ParameterList()
        elif known:
            self.cut(len(state_dict[f"{prefix}down"]))  # the rank may have been chosen from data
        super()._load_from_state_dict(state_dict, prefix, *args)

    def factors(self, part: int) -> tuple[Tensor, Tensor] | None:
        """All of the update as (up (fan_out, k), down (k, fan_in)), exact; None when there is none."""
        ups, downs = [], []
        if f"dense/{part}" in self.merged:
            dense = self.merged[f"dense/{part}"]
            ups.append(dense)
            downs.append(torch.eye(self.fan_in, dtype=dense.dtype, device=dense.device))
        elif f"up/{part}" in self.merged:
            ups.append(self.merged[f"up/{part}"])
            downs.append(self.merged["down"])
        if self.down is not None:
            ups.append(self.scale * self.up[part].detach())
            downs.append(self.down.detach())
        return (torch.cat(ups, 1), torch.cat(downs)) if ups else None

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """See `Adapter.delta`."""
        past: Tensor | None = None
        if f"dense/{part}" in self.merged:
            past = self.merged[f"dense/{part}"]
        elif f"up/{part}" in self.merged:
            past = self.merged[f"up/{part}"] @ self.merged["down"]
        if not branches or self.down is None:
            return past
        new: Tensor = self.scale * (self.up[part] @ self.down)
        return new if past is None else past + new


class LowRankSet(Adapters[LowRank]):
    """One `LowRank` for each layer, opened and merged together."""

    def open(self, backbone: nn.Module, sites: Iterable[Site], rank: int, scale: float = 1.0) -> None:
        """A fresh branch on each of `sites`, where the first call puts the adapters."""
        self.place(backbone, sites, lambda site: LowRank([site], rank, scale))
        for adapter in self:
            adapter.open()

    def merge(self) -> None:
        """Close all branches."""
        for adapter in self:
            adapter.merge()
