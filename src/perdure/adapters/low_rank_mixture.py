"""Mixtures of low-rank branches: what every token, or example, takes of each is said by gates."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.state import assigned
from perdure.types import Site


def mixed(x: Tensor, down: Tensor, up: Tensor, gates: Tensor) -> Tensor:
    """Σ_e g_e · up_e (down_e x), the branches one below the other: as many products as one branch of all their ranks.

    Args:
        x: (B, ..., fan_in).
        down: of all branches, (branches · rank, fan_in).
        up: of all branches, (fan_out, branches · rank).
        gates: of each token (B, ..., branches), or of each example (B, branches).
    """
    inner = F.linear(x, down.to(x.dtype))
    gates = gates.to(x.dtype).repeat_interleave(len(down) // gates.shape[-1], dim=-1)
    if gates.dim() < inner.dim():
        gates = gates.view(len(gates), *[1] * (inner.dim() - 2), -1)
    return F.linear(inner * gates, up.to(x.dtype))


class _Mixture(Adapter):
    """Branches of equal rank on one layer, which start as no change; no weight can hold what depends on the input."""

    folds = False

    def __init__(self, site: Site, branches: int, rank: int, scale: float) -> None:
        super().__init__()
        if rank > site.fan_in:
            raise ValueError(f"rank={branches * rank}: expected at most {branches * site.fan_in} at {site.layer}")
        self.branches, self.scale = branches, scale
        self.down = nn.Parameter(torch.cat([starting_rows(rank, site.fan_in) for _ in range(branches)]))
        self.up = nn.Parameter(torch.zeros(site.fan_out, branches * rank, dtype=torch.float32))

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """None: which update a layer gets depends on the input."""
        return None


class TokenMixture(_Mixture):
    """y + scale · Σ_e softmax(router x)_e · up_e (down_e x), for each token by itself.

    Args:
        site: the layer.
        branches: how many.
        rank: inner dimension of each.
        scale: factor of the mixture.
    """

    def __init__(self, site: Site, branches: int, rank: int, scale: float) -> None:
        super().__init__(site, branches, rank, scale)
        self.router = nn.Parameter(starting_rows(branches, site.fan_in))

    def gates(self, x: Tensor) -> Tensor:
        """What each token takes of each branch, (B, ..., branches) in float32."""
        return F.linear(x.float(), self.router).softmax(-1)

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with the mixture."""
        return torch.add(y, mixed(x, self.down, self.up, self.gates(x)), alpha=self.scale)


class SeparateMixtures(_Mixture):
    """y + scale · (a · v + b · w): v is of one branch of the first half, w of one of the second, for each example.

    Which one, a key says for each half: g = softmax(gates key), of which the largest is kept, so that gates learn.
    (a, b) = softmax(fusion_v · v, fusion_w · w) for each token. Without keys it adds nothing.

    Args:
        site: the layer.
        branches: how many, an even number.
        rank: inner dimension of each.
        scale: factor of what is added.
        width: of a key.
    """

    def __init__(self, site: Site, branches: int, rank: int, scale: float, width: int) -> None:
        super().__init__(site, branches, rank, scale)
        self.gates = nn.Parameter(torch.stack([starting_rows(branches // 2, width) for _ in range(2)]))
        self.fusion = nn.Parameter(starting_rows(2, site.fan_out))
        self.keys: Tensor | None = None  # (B, 2, width)

    def chosen(self, keys: Tensor) -> Tensor:
        """Shares (B, 2, branches / 2) of keys (B, 2, width): in each half one is not zero."""
        # sums, not products of matrices: their rounding would depend on who else is asked about
        shares = (keys.float().unsqueeze(2) * self.gates).sum(-1).softmax(-1)
        best = shares.max(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, best.indices, best.values)

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with what the two chosen branches give."""
        if self.keys is None:
            return y
        gates = self.chosen(self.keys)
        pairs = zip(self.down.chunk(2), self.up.chunk(2, dim=1), gates.unbind(1), strict=True)
        found = torch.stack([mixed(x, down, up, gate) for down, up, gate in pairs], dim=-2)
        shares = (found.float() * self.fusion).sum(-1).softmax(-1).to(found.dtype)
        return torch.add(y, (found * shares.unsqueeze(-1)).sum(-2), alpha=self.scale)


def keyed(mixtures: Sequence[SeparateMixtures], keys: Tensor) -> AbstractContextManager[None]:
    """Within, examples take the branches that their `keys` (B, 2, width) choose."""
    return assigned(mixtures, "keys", [keys] * len(mixtures))
