"""Who of several members is asked: a score for each, for every example by itself, on features of one frozen encoder.

`ClassRouter`: the nearest class mean, or a Gaussian a class with one covariance (linear discriminant analysis, as in
RanPAC, McDonnell et al., NeurIPS 2023, arXiv:2307.02251). `SubspaceRouter`: the error of reconstruction by a linear
code (Expert Gate, Aljundi et al., CVPR 2017, arXiv:1611.06194, learns an autoencoder a task). `TextRouter`: the most
similar text (CLIP, Radford et al., ICML 2021, arXiv:2103.00020). `LinUCB` (Li et al., WWW 2010, arXiv:1003.0146) knows
of each answer only what it was worth.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adapters.state import BufferDict
from perdure.mechanisms.experience_pool import ExperiencePool
from perdure.mechanisms.subspace import exact, shrunk

Route = Literal["gaussian", "nearest", "subspace", "text", "linucb", "uniform"]
_KNOWN = 0.95
"""Share of the examples that a router was made from that it takes for known."""
_ALPHA = 0.5
"""Of `LinUCB`: how much what is unsure counts."""


class Router(nn.Module):
    """Base of all: members have scores; of what seems none of theirs the best score lies below `limit`.

    Products are taken in double precision: so rounded, what ties does so in every batch.

    Args:
        judged: members that it has something to judge by; the score of others is -inf.
    """

    def __init__(self, judged: Iterable[int]) -> None:
        super().__init__()
        self.limit, self.judged = -torch.inf, frozenset(judged)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (n, members) of unit features (n, d)."""
        raise NotImplementedError

    def bounds(self, features: Tensor, scores: Tensor) -> Tensor:
        """What `choose` goes by, (n, members): the scores, and where rewards have to be found out more than these."""
        return scores

    def settle(self, features: Tensor) -> None:
        """Set the limit by examples (n, d) that are known."""
        self.limit = float(torch.quantile(self(features).amax(1), 1 - _KNOWN))

    def choose(self, features: Tensor, among: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For each of `features` (n, d) the best member of some, int64 (n,), and whether it seems known, bool (n,)."""
        scores: Tensor = self(features)
        best = self.bounds(features, scores)[:, list(among)].argmax(1)
        known = scores[:, list(among)].amax(1) >= self.limit  # not by bounds, which are higher for what is unknown
        return torch.tensor(among, device=features.device)[best], known


class ClassRouter(Router):
    """A member's score is that of its likeliest class: -½ (f - μ_c)ᵀ Σ⁻¹ (f - μ_c) + ln π_c, or -½ |f - μ_c|².

    Args:
        pool: with statistics of classes.
        owners: the member of each class, in the order of their numbers.
        members: how many there are.
        gaussian: whether Σ (shrunk towards a multiple of the identity) and π count.
    """

    def __init__(self, pool: ExperiencePool, owners: Sequence[int], members: int, gaussian: bool) -> None:
        statistics = pool.statistics
        super().__init__(owners[c] for c in statistics.classes)
        means = exact(torch.stack([statistics.mean(c) for c in statistics.classes]))
        self.owners, self.members = torch.tensor([owners[c] for c in statistics.classes]), members
        self.root, self.prior = torch.eye(means.shape[1], dtype=means.dtype), torch.zeros(len(means))
        if gaussian:
            covariance = shrunk(statistics.pooled(), max(statistics.freedom, 1)).cpu()
            even = covariance.diagonal().mean() * 1e-4 + torch.finfo(torch.float32).eps
            self.root = torch.linalg.inv(torch.linalg.cholesky(covariance + even * torch.eye(len(covariance)))).T
            counts = torch.tensor([float(statistics.counts[str(c)]) for c in statistics.classes])
            self.prior = (counts / counts.sum()).log()
        self.means = means.cpu() @ self.root

    def forward(self, features: Tensor) -> Tensor:
        """See `Router.forward`."""
        # not by products of matrices: their rounding would depend on who else is asked about
        near = torch.cdist(exact(features).cpu() @ self.root, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        return best_of(self.prior - near.square() / 2, self.owners, self.members).to(features.device)


class SubspaceRouter(Router):
    """A member's score is -|r - B Bᵀ r|², r = f - μ: what of an example its basis does not explain."""

    def __init__(self, bases: BufferDict, members: int) -> None:
        super().__init__(map(int, bases))
        self.bases, self.members = bases, members

    def forward(self, features: Tensor) -> Tensor:
        """See `Router.forward`."""
        known = exact(features)
        scores = features.new_full((len(features), self.members), -torch.inf)
        for key, basis in self.bases.items():
            rest, rows = known - basis[0].to(known), basis[1:].to(known)
            scores[:, int(key)] = -(rest - rest @ rows.T @ rows).square().sum(1).to(features)
        return scores


class TextRouter(Router):
    """A member's score is the cosine to the most similar of its texts: class names, captions or questions."""

    def __init__(self, texts: BufferDict, members: int) -> None:
        super().__init__(map(int, texts))
        owners = [torch.full((len(rows),), int(key)) for key, rows in sorted(texts.items())]
        self.texts, self.owners = torch.cat([rows for _, rows in sorted(texts.items())]), torch.cat(owners)
        self.members = members

    def forward(self, features: Tensor) -> Tensor:
        """See `Router.forward`."""
        known = exact(features)
        return best_of((known @ self.texts.to(known).T).to(features), self.owners, self.members)


class LinUCB(Router):
    """For each member a ridge regression of the reward on the features; chosen is the largest upper confidence bound.

    A_a = I + Σ x xᵀ, b_a = Σ r x over the examples that member a was asked, x = (f, 1); its score is θ_aᵀ x, θ_a =
    A_a⁻¹ b_a, its bound α · √(xᵀ A_a⁻¹ x) more: rewards of who is never asked would never come. A⁻¹ is updated by
    Sherman and Morrison.
    """

    @staticmethod
    def nbytes(members: int, dim: int) -> int:
        """Of its matrices and vectors."""
        return 8 * members * (dim + 1) * (dim + 2)

    def __init__(self, members: int, dim: int) -> None:
        super().__init__(range(members))
        self.register_buffer("inverse", torch.eye(dim + 1, dtype=torch.float64).repeat(members, 1, 1))
        self.register_buffer("reward", torch.zeros(members, dim + 1, dtype=torch.float64))
        self.inverse: Tensor
        self.reward: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """See `Router.forward`."""
        scores: Tensor = _with_one(features) @ torch.einsum("aij,aj->ai", self.inverse, self.reward).T
        return scores.to(features)

    def bounds(self, features: Tensor, scores: Tensor) -> Tensor:
        """Upper confidence bounds (n, members)."""
        x = _with_one(features)
        unsure = torch.einsum("ni,aij,nj->na", x, self.inverse, x).clamp_min(0).sqrt()
        return scores + _ALPHA * unsure.to(features)

    def learn(self, feature: Tensor, member: int, reward: float) -> None:
        """What asking `member` about one example (d,) was worth."""
        x = _with_one(feature.unsqueeze(0))[0]
        turned = self.inverse[member] @ x
        self.inverse[member] -= turned.outer(turned) / (1 + x @ turned)
        self.reward[member] += reward * x


def best_of(scores: Tensor, owners: Tensor, members: int) -> Tensor:
    """Each member's best (n, members) of `scores` (n, k), of which `owners` (k,) says whose they are."""
    best = scores.new_full((len(scores), members), -torch.inf)
    found: Tensor = best.scatter_reduce(1, owners.to(scores.device).expand(len(scores), -1), scores, "amax")
    return found


def _with_one(features: Tensor) -> Tensor:
    x = exact(features).cpu()
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def router_of(route: Route, pool: ExperiencePool, owners: Sequence[int], members: int, dim: int) -> Router | None:
    """The router called `route`; None where all members are asked.

    Raises:
        ValueError: when what it judges by is not in the pool.
    """
    if route == "uniform":
        return None
    if route == "linucb":
        return LinUCB(members, dim)
    if route == "text":
        if not pool.texts:
            raise ValueError("route 'text' needs a gate that reads texts: give --gate 'pocket()', or another CLIP")
        return TextRouter(pool.texts, members)
    if route == "subspace":
        return SubspaceRouter(pool.bases, members)
    if not pool.statistics.classes:
        raise ValueError(f"route {route!r} looks at images, and no member was taught any: use --route text")
    return ClassRouter(pool, owners, members, gaussian=route == "gaussian")
