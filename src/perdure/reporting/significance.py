"""Whether a difference between two methods is one: paired bootstrap over test images (Efron & Tibshirani, 1993)."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perdure.evaluation.per_class import Answers
from perdure.reporting.runs import RunResults

ORDERS = 5
"""Fewest repetitions from which a p-value says anything about the next one."""
_RESAMPLES = 10_000
_MANY = 20_000
"""Answers from which drawing single images takes too long, and says nothing else."""
Classes = Mapping[tuple[int, int], str]
"""(task, class) of a run -> what its test images are called, whatever number they have in a class order."""


@dataclass(frozen=True)
class Difference:
    """How much better one method ends than another, on the same test images in the same orders.

    Args:
        mean: of final average accuracy, over the orders that both have.
        low, high: between which it lies in 95 % of resamples of the test images.
        p: two-sided, with orders resampled too; None below five orders.
        orders: how many both have.
    """

    mean: float
    low: float
    high: float
    p: float | None
    orders: int


def difference(
    one: Mapping[int, Answers], other: Mapping[int, Answers], classes: Mapping[int, Classes]
) -> Difference | None:
    """Of two methods' answers after their last tasks, by seed; None where no order's test images are the same.

    A test image is drawn, or not, in all orders at once: it is the same image, and answers to it are alike. It is known
    by its class and its place among the images of that class. Of each class as many are drawn as it has. Of very many
    images the sums are drawn from the normal distribution that resamples have.

    Args:
        one: by seed.
        other: by seed.
        classes: by seed, of `one` and `other`.
    """
    seeds = [seed for seed in sorted(set(one) & set(other)) if _alike(one[seed], other[seed])]
    if not seeds:
        return None
    generator = np.random.default_rng(0)
    means, drawn = np.zeros(len(seeds)), np.zeros((len(seeds), _RESAMPLES))
    found: dict[tuple[str, int], dict[int, np.ndarray]] = {}  # class, images -> order -> what each adds to its mean
    for place, seed in enumerate(seeds):
        for task, (labels, mine) in one[seed].items():
            better = (mine == labels).int() - (other[seed][task][1] == labels).int()
            adds = better.numpy() / (len(labels) * len(one[seed]))
            means[place] += adds.sum()
            for c in np.unique(labels.numpy()).tolist():
                own = adds[labels.numpy() == c]
                called = classes[seed].get((task, c), f"{task}/{c}")
                found.setdefault((called, len(own)), {})[place] = own
    covariance = np.zeros((len(seeds), len(seeds)))
    normal = sum(count * len(by_order) for (_, count), by_order in found.items()) > _MANY
    for (_, count), by_order in found.items():
        orders = list(by_order)
        if normal:
            adds = np.stack(list(by_order.values()))
            covariance[np.ix_(orders, orders)] += count * np.cov(adds, bias=True).reshape(len(orders), -1)
            continue
        # images that add the same in every order are as one that is drawn as often as all of them
        kinds, number = np.unique(np.stack(list(by_order.values()), axis=1), axis=0, return_counts=True)
        drawn[orders] += (generator.multinomial(count, number / count, _RESAMPLES) @ kinds).T
    if normal:
        drawn = generator.multivariate_normal(means, covariance, _RESAMPLES, method="eigh").T
    low, high = np.quantile(drawn.mean(0), (0.025, 0.975))
    p = None
    if len(seeds) >= ORDERS:
        picked = generator.integers(len(seeds), size=(len(seeds), _RESAMPLES))
        both = drawn[picked, np.arange(_RESAMPLES)].mean(0)
        # one more on each side: of so many resamples none can show that it is impossible
        p = float(min(1.0, 2 * (1 + min((both <= 0).sum(), (both >= 0).sum())) / (_RESAMPLES + 1)))
    return Difference(statistics.fmean(means.tolist()), float(low), float(high), p, len(seeds))


def classes_of(run: RunResults) -> Classes:
    """What the test images of a run's tasks are called; a name that several tasks have is another one in each."""
    tasks = [(str(task.get("name")), task.get("classes") or (), task.get("names") or ()) for task in run.tasks()]
    every = Counter(str(called) for _, _, names in tasks for called in names)
    return {
        (index, c): str(called) if every[str(called)] == 1 else f"{name}/{called}"
        for index, (name, classes, names) in enumerate(tasks)
        for c, called in zip(classes, names, strict=False)
    }


def _alike(one: Answers, other: Answers) -> bool:
    return sorted(one) == sorted(other) and all(one[task][0].equal(other[task][0]) for task in one)
