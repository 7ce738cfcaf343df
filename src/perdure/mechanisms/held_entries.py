"""The largest entries of low-rank updates, held: a bit for each entry of a layer, however many tasks there were."""

import torch
from torch import Tensor, nn

from perdure.adapters.state import BufferDict

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class HeldEntries(nn.Module):
    """For each layer the union of the entries that mattered to former tasks, and what new updates do to them.

    Args:
        share: of a task's entries, those largest by absolute value.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.bits = BufferDict()  # layer -> uint8 (entries / 8,), rounded up: row by row, the lowest bit first

    def __bool__(self) -> bool:
        return bool(self.bits)

    def add(self, key: str, update: Tensor) -> None:
        """Hold the largest entries of `update` (fan_out, fan_in) too; those that are zero never matter."""
        entries = update.abs().flatten()
        count = max(1, round(self.share * len(entries)))
        largest = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
        largest[entries.topk(count).indices] = True
        largest &= entries > 0
        if key in self.bits:
            largest |= self.mask(key, entries.numel())
        eights = nn.functional.pad(largest, (0, -len(largest) % 8)).view(-1, 8)
        self.bits[key] = (eights * eights.new_tensor(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)

    def mask(self, key: str, entries: int) -> Tensor:
        """Which of a layer's `entries` are held, bool (entries,), row by row."""
        bits = self.bits[key]
        return (bits.unsqueeze(1) & bits.new_tensor(_BITS)).ne(0).flatten()[:entries]

    def size(self, key: str, up: Tensor, down: Tensor) -> Tensor:
        """Mean over the held entries of |up down|, a scalar; no product as large as the layer is kept for backward.

        The derivative by the product is its sign over the number of entries, where they are held: S. So the mean is
        ⟨S, up down⟩, and its derivatives S downᵀ and upᵀ S are all that backward needs.

        Args:
            key: of the layer.
            up: (fan_out, rank).
            down: (rank, fan_in).
        """
        with torch.no_grad():
            product = up @ down
            held = self.mask(key, product.numel()).view_as(product)
            slope = product.sign() * held / held.sum().clamp_min(1)
            by_up, by_down, value = slope @ down.T, up.T @ slope, (slope * product).sum()
        # zero, with those derivatives
        steps = (by_up * (up - up.detach())).sum() + (by_down * (down - down.detach())).sum()
        return value + steps
