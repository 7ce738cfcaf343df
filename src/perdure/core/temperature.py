"""A temperature that makes scores as sure as they are right (Guo et al., ICML 2017, arXiv:1706.04599)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.state import BufferDict

_LEAST, _MOST = math.log(1e-4), math.log(1e4)
_BINS = 15


class Temperature(BufferDict):
    """One temperature for all scores, averaged over tasks; empty until it has been fitted.

    Each task gives the temperature that suits its own held-out images best, among all classes seen then. Kept is the
    mean of their logarithms, weighted by the number of images: of old tasks no image is left to fit anything to anew.
    """

    @property
    def value(self) -> float:
        """What scores are divided by."""
        return math.exp(float(self["log"]))

    def learn(self, scores: Tensor, target: Tensor) -> None:
        """Take in the held-out images of one more task.

        Args:
            scores: (n, columns).
            target: column of the right answer, (n,).
        """
        if not len(target):
            return
        new, before = torch.tensor(float(len(target))), self.get("images", torch.zeros(()))
        old = self.get("log", torch.zeros(()))
        self["log"] = (before * old + new * fitted(scores, target)) / (before + new)
        self["images"] = before + new


def fitted(scores: Tensor, target: Tensor) -> float:
    """The logarithm of the temperature with the least cross-entropy.

    One image more, which might be anything, is counted in: a few images that are all right would else be a reason to be
    sure of everything.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # here: it takes longer than the package

    scores, target = scores.double().cpu(), target.cpu()
    known = torch.isfinite(scores).all(0)

    def loss(log: float) -> float:
        logits = F.log_softmax(scores / math.exp(log), dim=1)
        return float(F.nll_loss(logits, target, reduction="sum") - logits[:, known].mean())

    return float(minimize_scalar(loss, bounds=(_LEAST, _MOST), method="bounded", options={"xatol": 1e-6}).x)


def calibration_error(scores: Tensor, target: Tensor) -> float:
    """Expected calibration error: mean distance of sureness and rightness, over bins of equal width in sureness.

    Args:
        scores: (n, columns), of which the softmax says how sure each is.
        target: column of the right answer, (n,).
    """
    sure, answer = scores.double().softmax(1).max(1)
    right = (answer == target).double()
    place = (sure * _BINS).ceil().long().clamp(1, _BINS) - 1
    apart = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place.cpu(), (right - sure).cpu())
    return float(apart.abs().sum() / len(target))
