"""Updates through one pair of bases: W + up · core · down, where tasks change the small core (FM-LoRA, C-LoRA)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import Adapter, starting_rows
from perdure.adapters.state import BufferDict
from perdure.types import Site


class SharedBasis(Adapter):
    """y + up · (core + branch) · down x, with `core` (rank, rank) merged and `branch` in training.

    A branch is the product of the matrices of `open`: one (rank, rank), or two, M (rank, k) and Nᵀ
    (k, rank). While bases and branch are trained, gradients reach them through the branch only (Zhang et al., 3.2);
    once they are `fixed`, what is merged stands in the layer's weight.

    Args:
        site: the layer.
        rank: dimension of the shared space.
    """

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        if rank < 1 or rank > min(site.fan_in, site.fan_out):
            raise ValueError(
                f"rank={rank}: expected 1 to {min(site.fan_in, site.fan_out)}, the smaller side of {site.layer}"
            )
        self.rank = rank
        self.down = nn.Parameter(starting_rows(rank, site.fan_in))
        self.up = nn.Parameter(torch.zeros(site.fan_out, rank, dtype=torch.float32))
        self.branch = nn.ParameterList()
        self.merged = BufferDict()  # "core"

    @property
    def fixed(self) -> bool:
        """Whether the bases are frozen."""
        return not self.down.requires_grad

    def open(self, *factors: Tensor, train: bool = True) -> None:
        """A new branch, the product of `factors`."""
        self.branch = nn.ParameterList(nn.Parameter(factor.to(self.down.device), train) for factor in factors)

    @property
    def core(self) -> Tensor:
        """What is merged (rank, rank)."""
        return self.merged["core"] if "core" in self.merged else self.down.new_zeros(self.rank, self.rank)

    def step(self) -> Tensor | None:
        """The branch as a matrix (rank, rank); None when none is open."""
        factors: list[Tensor] = list(self.branch)
        if len(factors) == 2:
            left, right = factors
            return (left if self.gate is None else left * self.gate) @ right
        return factors[0] if factors else None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the branch to the core."""
        step = self.step()
        if step is not None:
            self.merged["core"] = self.core + step
            self.branch = nn.ParameterList()

    @torch.no_grad()
    def fix(self) -> None:
        """Freeze the bases, made orthonormal; the core takes over what they lose, so the update stays as it is."""
        left, right = torch.linalg.qr(self.up), torch.linalg.qr(self.down.T)
        self.merged["core"] = left.R @ self.core @ right.R.T
        self.up.copy_(left.Q)
        self.down.copy_(right.Q.T)
        self.freeze()

    def freeze(self) -> None:
        """Train the bases no more."""
        for base in (self.up, self.down):
            base.requires_grad_(False)
            base.grad = None

    def cut(self, rank: int) -> None:
        """Keep the first `rank` inner dimensions of a branch of two factors."""
        if len(self.branch) == 2:
            left, right = (factor.detach() for factor in self.branch)
            self.open(left[:, :rank].clone(), right[:rank].clone())

    def forward(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        """The layer's output with the branch, and with the merged core while it cannot be folded."""
        step = self.step()
        if self.fixed:
            return y if step is None else y + self._through(x, step, self.down, self.up)
        paths: list[tuple[Tensor, Tensor]] = [] if step is None else [(self.down, self.up @ step)]
        if "core" in self.merged:
            # between tasks nothing is trained, but importances (EWC) are asked of what the bases do through the core
            down, up = (self.down, self.up) if step is None else (self.down.detach(), self.up.detach())
            paths.append((down, up @ self.core))
        if not paths:
            return y
        # both paths through one pair of factors: passing over the tokens costs more than the doubled rank
        downs, ups = zip(*paths, strict=True)
        return y + F.linear(F.linear(x, torch.cat(downs).to(x.dtype)), torch.cat(ups, 1).to(x.dtype))

    def delta(self, part: int, branches: bool) -> Tensor | None:
        """See `Adapter.delta`; while the bases are trained, nothing is merged for good."""
        if not branches:
            return self.up @ self.core @ self.down if self.fixed and "core" in self.merged else None
        step = self.step()
        return self.up @ (self.core if step is None else self.core + step) @ self.down

    def factors(self, part: int) -> tuple[Tensor, Tensor] | None:
        """All of the update as (up (fan_out, rank), down (rank, fan_in))."""
        step = self.step()
        return self.up @ (self.core if step is None else self.core + step), self.down

    @staticmethod
    def _through(x: Tensor, core: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = F.linear(F.linear(x, down.to(x.dtype)), core.to(x.dtype))
        return F.linear(inner, up.to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [key for key in state_dict if key.startswith(f"{prefix}branch.")]
        if any(key.startswith(prefix) for key in state_dict):  # else it is missing, which must be noticed
            # between tasks no branch is open, and the size of one may have been chosen from data
            train = all(factor.requires_grad for factor in self.branch)
            self.open(*(torch.empty_like(state_dict[name]) for name in sorted(names)), train=train)
        super()._load_from_state_dict(state_dict, prefix, *args)
