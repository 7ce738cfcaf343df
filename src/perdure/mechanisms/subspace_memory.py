"""The input spaces of former tasks, input by input, as tensors that are saved: GPM's and InfLoRA's memory."""

import torch
from torch import Tensor

from perdure.adapters.buffer_dict import BufferDict
from perdure.mechanisms.linear_algebra import exact
from perdure.mechanisms.subspace import Subspace


class SubspaceMemory(BufferDict):
    """`<input>/taken` or `<input>/free` -> basis (fan_in, k) in float32, the smaller of the two."""

    def of(self, key: str, fan_in: int, device: torch.device | str = "cpu") -> Subspace:
        """What is taken, or free, in float64 on `device`; an input that was never kept is free as a whole."""
        if f"{key}/free" in self:
            return Subspace(exact(self[f"{key}/free"]).to(device), "free")
        if f"{key}/taken" in self:
            return Subspace(exact(self[f"{key}/taken"]).to(device))
        return Subspace.empty(fan_in, device)

    def keep(self, key: str, space: Subspace) -> None:
        """Put `space` in the place of what was kept of this input."""
        for kind in ("taken", "free"):
            self.pop(f"{key}/{kind}", None)
        # in the order of memory in which it would be loaded: another one rounds otherwise
        self[f"{key}/{space.kind}"] = space.basis.float().contiguous()

    def outside(self, key: str, rows: Tensor) -> Tensor:
        """The part of each row (n, fan_in) that lies in the free directions, in the precision of `rows`."""
        if f"{key}/free" in self:
            basis = self[f"{key}/free"]
            return rows @ basis @ basis.T
        if f"{key}/taken" in self:
            basis = self[f"{key}/taken"]
            return rows - rows @ basis @ basis.T
        return rows
