"""What several finished learners share: statistics of their classes, bases of their images, examples, texts; in bytes.

No published algorithm stands behind it: `docs/specialists.md`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from perdure.adapters.state import BufferDict
from perdure.formatting import human_bytes
from perdure.mechanisms.class_statistics import ClassStatistics
from perdure.mechanisms.subspace import exact
from perdure.storage.schema import SPECIALISTS, Damaged


class ExperiencePool(nn.Module):
    """Means and one shared covariance of classes, a basis and texts a member, and as many examples as bytes allow.

    Features are of unit length, all of one frozen encoder, so that members with other backbones can be compared.

    Args:
        limit: most bytes; examples give way first, nothing else does.
        rank: directions of a member's basis.
    """

    def __init__(self, limit: int, rank: int = 16) -> None:
        super().__init__()
        self.limit, self.rank = limit, rank
        self.statistics = ClassStatistics("shared")
        self.bases = BufferDict()  # member -> (k + 1, d): the mean, and orthonormal rows below it
        self.texts = BufferDict()  # member -> (n, d)
        self.exemplars = BufferDict()  # class -> uint8 (n, 3, side, side)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(value.nbytes for value in self.state_dict().values())

    def add(self, member: int, images: Sequence[Tensor], features: Sequence[Tensor], classes: Sequence[int]) -> None:
        """What a member was taught; to be added once.

        Args:
            member: its number.
            images: for each of its classes uint8 (n, 3, side, side), in the order in which they are given up last.
            features: for each of its classes (n, d), of unit length.
            classes: their numbers in the pool, which no other member has.

        Raises:
            ValueError: when the statistics alone take more bytes than there may be.
        """
        for c, pictures, mine in zip(classes, images, features, strict=True):
            self.statistics.add(mine, torch.full((len(mine),), c, device=mine.device))
            self.exemplars[str(c)] = pictures
        every = exact(torch.cat(list(features)))
        mean = every.mean(0)
        rank = min(self.rank, len(every) - 1, every.shape[1] // 2)
        rows = torch.linalg.svd(every - mean, full_matrices=False).Vh[:rank]
        self.bases[str(member)] = torch.cat([mean.unsqueeze(0), rows]).float().to(features[0].device)
        self.evict()

    def evict(self) -> None:
        """Give examples up, of the classes that have most, until the rest fits."""
        counts = {key: len(images) for key, images in self.exemplars.items()}
        each = next((images[0].nbytes for images in self.exemplars.values() if len(images)), 1)
        rest = self.nbytes - each * sum(counts.values())
        if rest > self.limit:
            raise ValueError(
                f"statistics of {len(counts)} classes take {human_bytes(rest)}, and the pool may take "
                f"{human_bytes(self.limit)}: give more with --pool-bytes"
            )
        level = even_share(list(counts.values()), (self.limit - rest) // each)
        for key, images in list(self.exemplars.items()):
            self.exemplars[key] = images[:level]

    def sample(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """At most `size` random examples: uint8 (n, 3, side, side), and the class of each, int64 (n,)."""
        keys = sorted(self.exemplars, key=int)
        if not keys:
            return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        images = torch.cat([self.exemplars[key] for key in keys])
        classes = torch.cat([torch.full((len(self.exemplars[key]),), int(key)) for key in keys])
        chosen = torch.randperm(len(images), generator=generator)[:size]
        return images[chosen], classes[chosen]


def pool_file(folder: Path, digest: str) -> Path:
    """Where the pool of that sha256 lies, with what a router has learnt."""
    return folder / f"pool-{digest[:16]}.safetensors"


def read_pool(folder: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of the pool that was written with that sha256.

    Raises:
        Damaged: when it is missing, or another.
    """
    path = pool_file(folder, digest)
    if not path.is_file():
        raise Damaged(f"{path} is missing: restore it, or combine again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise Damaged(f"{path} is damaged: its sha256 is not the one in {SPECIALISTS}; restore it, or combine again")
    tensors: dict[str, Tensor] = load(content)
    return tensors


def even_share(counts: Sequence[int], most: int) -> int:
    """The largest number that each of `counts` may be cut to, so that together they are `most` at most."""
    left = len(counts)
    for count in sorted(counts):
        if count * left >= most:
            return most // left
        most, left = most - count, left - 1
    return max(counts, default=0)
