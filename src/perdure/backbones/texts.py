"""Texts as tensors: UTF-8 bytes padded with zeros, so that captions travel in a batch like everything else."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_texts(texts: Sequence[Sequence[str]]) -> Tensor:
    """Texts of each example as uint8 (n, most texts, most bytes); what is missing is zero.

    Raises:
        ValueError: for a text with a zero character, which could not be read back.
    """
    coded = [[text.encode() for text in each] for each in texts]
    for line in (line for each in coded for line in each):
        if b"\0" in line:
            raise ValueError(f"text {line.decode()[:40]!r} holds a zero character: remove it")
    most = max((len(each) for each in coded), default=0)
    longest = max((len(line) for each in coded for line in each), default=0)
    packed = np.zeros((len(coded), most, longest), dtype=np.uint8)
    for row, each in enumerate(coded):
        for place, line in enumerate(each):
            packed[row, place, : len(line)] = np.frombuffer(line, dtype=np.uint8)
    return torch.from_numpy(packed)


def unpack_texts(packed: Tensor) -> list[str]:
    """Texts of uint8 (n, most bytes), as `pack_texts` wrote them; an empty one where nothing stands."""
    return [bytes(row).rstrip(b"\0").decode() for row in packed.cpu().numpy()]


def present(packed: Tensor) -> Tensor:
    """Where a text stands: bool (...) for uint8 (..., most bytes)."""
    return (
        packed[..., 0] > 0
        if packed.shape[-1]
        else torch.zeros(packed.shape[:-1], dtype=torch.bool, device=packed.device)
    )
