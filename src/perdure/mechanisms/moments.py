"""Second moments of what layers read: E[x xᵀ] over all tokens that count, or a sketch of it where layers are wide."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.adapters.state import BufferDict
from perdure.core.learner import Core
from perdure.core.processes import Processes
from perdure.options.ranges import without_effect
from perdure.types import Batch, Site

WIDE = 4096
"""Layers with more inputs than this are sketched where a sketch is asked for."""


def check_sketch(sketch: int | None, sites: Iterable[Site]) -> None:
    """Raise `ValueError` where a sketch is asked for and no layer is wide enough to be sketched."""
    if not any(site.fan_in > WIDE for site in sites):
        without_effect(f"where no layer has more than {WIDE:,} inputs", sketch=sketch)


@dataclass(frozen=True)
class Sketch:
    """Second moments R of a wide input by `rows` of its directions: RowsᵀRows ≼ R (Frequent Directions).

    Ghashami et al., SIAM J. Comput. 2016, arXiv:1501.01711. With ℓ rows, for any unit v and k < ℓ
    0 ≤ vᵀR v - |Rows v|² ≤ (what the k leading directions leave of R's trace) / (ℓ - k).
    A layer of 11,008 inputs takes 23 MB with 256 rows, its matrix 969 MB.

    Args:
        rows: float64 (ℓ, d).
        trace: of R, which the rows do not hold in full.
    """

    rows: Tensor
    trace: Tensor

    @classmethod
    def empty(cls, fan_in: int, size: int, device: torch.device | str = "cpu") -> "Sketch":
        """Of nothing; `size` rows."""
        zero = torch.zeros(size, fan_in, dtype=torch.float64, device="cpu" if _without_float64(device) else device)
        return cls(zero, zero.new_zeros(()))

    def taking(self, x: Tensor) -> "Sketch":
        """With the tokens (n, d) added, a few hundred at once; itself where there are none."""
        if not len(x):
            return self
        rows, size = self.rows, len(self.rows)
        x = exact(x.detach().float()).to(rows.device)
        for piece in torch.split(x, max(size, 1)):
            rows = _shrunk_to(size, torch.cat([rows, piece]))
        return Sketch(rows, self.trace + x.square().sum())

    def __add__(self, other: "Sketch") -> "Sketch":
        return Sketch(_shrunk_to(len(self.rows), torch.cat([self.rows, other.rows])), self.trace + other.trace)

    def __mul__(self, factor: float) -> "Sketch":
        return Sketch(self.rows * math.sqrt(factor), self.trace * factor)

    def __len__(self) -> int:
        """The inputs' width."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device


Moments = Tensor | Sketch
"""Second moments of a layer's inputs: the matrix (d, d), or a sketch of it."""


def _shrunk_to(size: int, rows: Tensor) -> Tensor:
    """`size` rows for more of them: all directions lose as much as the first one that is left out has."""
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # of (2ℓ, 2ℓ) in place of an SVD of (2ℓ, d)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = values[:size] - values[size]
    # rows = U S Vᵀ: the new ones are √(S² - s²) Vᵀ = √(S² - s²) / S · Uᵀ rows
    ratio = torch.where(values[:size] > 0, left / values[:size].clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    shrunk: Tensor = ratio.clamp_min(0).sqrt().unsqueeze(1) * (vectors[:, :size].T @ rows)
    return shrunk


class _Enough(Exception):
    """All watched layers have been reached; what lies above them need not be computed."""


@torch.no_grad()
def second_moments(
    encode: Callable[[Batch], object],
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    groups: Callable[[str], Sequence[Tensor] | None] = lambda _: None,
    balance: float | None = None,
    sketch: int | None = None,
    learner: Core | None = None,
) -> dict[str, Moments]:
    """E[x xᵀ] of the inputs of each layer, uncentred, over all tokens: float64 (fan_in, fan_in), or a `Sketch`.

    Products are formed in float32 outside autocast (in bfloat16 the subspaces are noise), as one flat xᵀx per batch,
    and summed in float64. A batch is not computed beyond the last watched layer.

    Args:
        encode: runs the model on a batch.
        layers: name -> layer to watch.
        batches: the data.
        groups: asked whenever a layer is reached: which tokens (n, L) of its input count, for each kind of them
            (images, words); None counts all, as one kind.
        balance: share of the first kind, whose tokens may be many more than the others; each kind's mean is taken by
            itself. None counts every token alike.
        sketch: rows of a `Sketch` in place of the matrix, of layers wider than `WIDE`; None takes no sketches.
        learner: whose `encode` it is: where several processes share its batches, what each has read is summed.
    """
    sums: dict[str, dict[int, _Sum]] = {name: {} for name in layers}
    reached: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            kinds = groups(name)
            pieces = [x.flatten(0, -2)] if kinds is None else [x[each.to(x.device)] for each in kinds]
            if learner is not None and learner.part is None and not learner.processes.first:
                pieces = [piece[:0] for piece in pieces]  # what all read counts once
            for kind, piece in enumerate([torch.cat(pieces)] if balance is None else pieces):
                wide = sketch is not None and x.shape[-1] > WIDE
                sums[name].setdefault(kind, _Sum(sketch if wide else None)).add(piece)
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
    if learner is not None:
        for kinds in sums.values():
            for kind in kinds.values():
                kind.add_others(learner.processes)
    shares = [1.0] if balance is None else [balance, 1 - balance]
    return {name: _mean([kinds[k] for k in sorted(kinds)], shares) for name, kinds in sums.items()}


class _Sum:
    """The sum of x xᵀ over tokens, as a matrix or a sketch of `rows` rows."""

    def __init__(self, rows: int | None) -> None:
        self.rows, self.tokens = rows, 0
        self.whole: Moments | None = None

    def add(self, x: Tensor) -> None:
        """More tokens, (n, d)."""
        if self.rows is None:
            product, _ = _product(x)
            self.whole = product if self.whole is None else self.whole.add_(product)  # type: ignore[union-attr]
        else:
            old = self.whole if isinstance(self.whole, Sketch) else Sketch.empty(x.shape[-1], self.rows, x.device)
            self.whole = old.taking(x)
        self.tokens += len(x)

    def add_others(self, processes: Processes) -> None:
        """The tokens that other processes have read."""
        if processes.world == 1 or self.whole is None:
            return
        self.tokens = int(processes.sum(torch.tensor(self.tokens)))
        if isinstance(self.whole, Sketch):
            rows, trace = self.whole.rows.unsqueeze(0), self.whole.trace.reshape(1)
            every = [
                Sketch(*each) for each in zip(processes.gather_all(rows), processes.gather_all(trace), strict=True)
            ]
            self.whole = sum(every[1:], start=every[0])
        else:
            self.whole = processes.sum(self.whole)


def _mean(kinds: Sequence[_Sum], shares: Sequence[float]) -> Moments:
    """The mean over tokens of each kind, weighted by `shares`; kinds without any token count for nothing."""
    there = [
        (each, share) for each, share in zip(kinds, shares, strict=False) if each.tokens and each.whole is not None
    ]
    of = sum(share for _, share in there)
    # those alone that are there count in full, whatever their share
    weights = [share / of if of else 1 / len(there) for _, share in there]
    means: list[Any] = [
        each.whole * (weight / each.tokens)  # type: ignore[operator]
        for (each, _), weight in zip(there, weights, strict=True)
    ]
    mean: Moments = sum(means[1:], start=means[0])
    return mean


def _product(x: Tensor) -> tuple[Tensor, int]:
    """The sum of x xᵀ over all tokens of (..., d), float64 (d, d), and how many these are."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().flatten(0, -2).float()
        product = x.T @ x
    # float64 holds sums of millions of tokens; MPS has none, so it is kept on the CPU there.
    return product.cpu().double() if x.device.type == "mps" else product.double(), len(x)


class RunningMoments(BufferDict):
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
    def add(self, images: Tensor, processes: Processes, among: int) -> None:
        """Count `images` (rows of a batch of `among`) of what was heard, and listen no more.

        Where several `processes` share the batch, each has heard its own rows.
        """
        for handle in self._handles:
            handle.remove()
        spans, own = processes.spans(among), images
        if spans is not None:
            mine = spans[processes.rank]
            own = images[(images >= mine.start) & (images < mine.stop)] - mine.start
        for name, x in self._heard.items():
            product, tokens = _product(x[own])
            counted = torch.tensor(tokens)
            if spans is not None:
                product, counted = processes.sum(product), processes.sum(counted)
            for key, value in ((f"sum/{name}", product), (f"tokens/{name}", counted)):
                self[key] = self[key] + value if key in self else value
        self["images"] = torch.tensor(self.images + len(images))
        self._handles, self._heard = [], {}

    def finish(self) -> dict[str, Tensor]:
        """E[x xᵀ] of each layer, as `second_moments` gives it; the sums begin anew."""
        names = [key.removeprefix("sum/") for key in self if key.startswith("sum/")]
        found = {name: self[f"sum/{name}"] / self[f"tokens/{name}"] for name in names}
        self.clear()
        return found


def exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none (MPS)."""
    return tensor.cpu().double() if _without_float64(tensor.device) else tensor.double()


def _without_float64(device: torch.device | str) -> bool:
    return torch.device(device).type == "mps"
