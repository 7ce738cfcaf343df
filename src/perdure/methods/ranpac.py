"""RanPAC: random projections and ridge regression (McDonnell et al., NeurIPS 2023, arXiv:2307.02251).

`end_task` adds h = ReLU(f W) of the task's features to G = Σ hᵀh and to each class's Σ h (the columns of Q = Σ hᵀy);
`predict` scores by h (G + ridge·I)⁻¹ Q. Neither the order of classes nor their split into tasks matters.

Differs: W is of random signs instead of normal numbers, and 2,000 of them a feature instead of 10,000. The signs are
read from a hash of the seed: they need not be stored and are the same on every machine. The ridge is chosen on at most
2,000 of the task's training images. G is stored as one triangle in float32.
"""

import hashlib
import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict
from perdure.core.forgetting import Forgotten
from perdure.core.learner import Core
from perdure.core.method import Method
from perdure.formatting import room_for
from perdure.mechanisms.subspace import exact, pack_symmetric, unpack_symmetric
from perdure.options.ranges import Range
from perdure.types import Batch, Task

_RIDGES = tuple(10.0**k for k in range(-8, 9))  # as in the paper
_MOST = 2000  # images on which the ridge is chosen
_TRAIN = 0.8
_LEAST = 1e-7  # of the largest possible eigenvalue: below it, what float32 has rounded off G would decide


class RanPAC(Method, name="ranpac"):
    """Answers by one ridge regression for all classes seen. By itself it trains nothing.

    In a composition (`inflora + ranpac`) features are taken at the end of the task, with the encoder of that moment.

    Args:
        dim: number of random projections; 0 regresses on the features themselves, with a constant.
        ridge: how much the regression is held back (the paper's lambda); None chooses it for each task, on a fifth of
            its training images, as published; "first" chooses it on those of the first task and keeps it, which few
            shots need: a fifth of 25 images chooses by chance.
    """

    needs = ("classes",)
    unlabelled = "untaught"
    derived = ("_projection",)
    trains = False

    def __init__(
        self,
        dim: Annotated[int, Range(0, 10**5)] = 2000,
        ridge: Annotated[float, Range(0, 1e12, above=True)] | Literal["first"] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.ridge = dim, ridge
        self.regression = BufferDict()  # gram: packed G; ridge: (1,)
        self.sums = BufferDict()  # class -> sum of h
        self._projection: Tensor | None = None
        self._weights: Tensor | None = None  # made from the state when it is asked for

    def grow(self, learner: Core, task: Task) -> None:
        """Alone, freeze the heads: they would be trained in vain."""
        self._weights = None
        room_for(3 * 8 * self.dim**2, f"ranpac(dim={self.dim})")  # G, what is added to it, and its inverse
        if learner.method is self:
            learner.objective.requires_grad_(False)

    def end_task(self, learner: Core, task: Task) -> None:
        """Add the task's features to the regression."""
        if task.pretext:
            return
        # The task's own images: those that `joint` adds were counted when they came.
        features, labels = learner.features(task.train)
        gram = unpack_symmetric(self.regression["gram"]) if "gram" in self.regression else None
        for start in range(0, len(labels), _MOST):
            some = slice(start, start + _MOST)
            h = exact(self._expand(learner, features[some]))
            gram = h.T @ h if gram is None else gram + h.T @ h
            for c in torch.unique(labels[some]).tolist():
                mine = h[(labels[some] == c).to(h.device)].sum(0).float().to(features.device)
                self.sums[str(c)] = mine + self.sums.get(str(c), 0)
        assert gram is not None
        self.regression["gram"] = pack_symmetric(gram).to(features.device)
        least = max(_LEAST * float(gram.trace()), torch.finfo(torch.float32).tiny)
        given = self.ridge
        if given == "first" and "ridge" in self.regression:
            given = float(self.regression["ridge"])
        if given is None or given == "first":
            given = self._choose(learner, features, labels, least)
        self.regression["ridge"] = torch.tensor([max(given, least)], dtype=torch.float32)
        self._weights = None

    def measures(self, learner: Core) -> dict[str, float]:
        """The ridge in use."""
        return {"ridge": float(self.regression["ridge"])} if "ridge" in self.regression else {}

    def predict(self, learner: Core, batch: Batch) -> Tensor:
        """Regressed scores (B, seen classes); 0 for a class that was not learnt yet."""
        h = self._expand(learner, learner.encode(batch))
        if self._weights is None or self._weights.device != h.device:
            with torch.inference_mode(False), torch.no_grad():
                self._weights = self._solve(learner.objective.classes, h.shape[1]).to(h.device)
        return h @ self._weights

    def forget(self, left: Forgotten) -> None:
        """Let go of classes' sums; G stays what all images have made it, of which no class's share is known."""
        self._weights = None
        for c in left.classes:
            self.sums.pop(str(c), None)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._weights = None
        super()._load_from_state_dict(*args)

    def _expand(self, learner: Core, features: Tensor) -> Tensor:
        """ReLU of the projected features, (n, dim); without projections, the features and a constant."""
        if not self.dim:
            return F.pad(features, (0, 1), value=1.0)
        if self._projection is None or self._projection.device != features.device:
            with torch.inference_mode(False):
                self._projection = random_signs(features.shape[1], self.dim, learner.seed).to(features.device)
        return torch.relu(features @ self._projection)

    def _solve(self, classes: tuple[int, ...], width: int) -> Tensor:
        """(G + ridge·I)⁻¹ Q, (width, classes)."""
        nothing = torch.zeros(width, dtype=torch.float32)
        if "gram" not in self.regression:
            return nothing.unsqueeze(1).repeat(1, len(classes))
        gram = unpack_symmetric(self.regression["gram"])
        sums = torch.stack([exact(self.sums.get(str(c), nothing)).to(gram.device) for c in classes], dim=1)
        gram.diagonal().add_(float(self.regression["ridge"]))
        weights: Tensor = torch.linalg.solve(gram, sums)
        return weights.float()

    def _choose(self, learner: Core, features: Tensor, labels: Tensor, least: float = 0.0) -> float:
        """The ridge, at least `least`, with the smallest squared error on a fifth of the images after the others."""
        order = torch.randperm(len(labels), generator=learner.generator("ridge"))[:_MOST]
        cut = int(_TRAIN * len(order))
        h = exact(self._expand(learner, features[order]))
        target = F.one_hot(torch.unique(labels[order], return_inverse=True)[1]).to(h)
        if not cut:
            return max(float(h.square().mean()) or 1.0, least)
        # In the images' own space: one decomposition of at most 1,600 x 1,600 numbers serves all candidates.
        values, vectors = torch.linalg.eigh(h[:cut] @ h[:cut].T)
        inside, ahead = vectors.T @ target[:cut], h[cut:] @ h[:cut].T @ vectors
        ridges = sorted({max(ridge, least) for ridge in _RIDGES})
        answers = [ahead @ (inside / (values + ridge).unsqueeze(1)) for ridge in ridges]
        errors = [(answer - target[cut:]).square().mean() for answer in answers]
        return ridges[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]


def random_signs(rows: int, columns: int, seed: int) -> Tensor:
    """±1 float32 (rows, columns), from a hash of the seed."""
    digest = hashlib.shake_256(f"{seed}/ranpac".encode()).digest(math.ceil(rows * columns / 8))
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[: rows * columns]
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1).view(rows, columns)
