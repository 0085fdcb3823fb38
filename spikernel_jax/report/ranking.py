"""How well one order of cells is another: rank correlations, regret, and their intervals by the bootstrap."""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Values = NDArray[np.float64]


def ranks(values: ArrayLike) -> Values:
    """Ranks from 1, the mean of them where values are equal; what is not a number ranks with the least."""
    x = np.asarray(values, np.float64)
    return stats.rankdata(np.where(np.isnan(x), -np.inf, x))


def kendall(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Kendall's τ-b, where groups are given over pairs of one group alone.

    Pairs that are equal in x count for nothing above the line, and under it as pairs of y: an order that says nothing
    of most pairs has a small τ, however right it is of the others.

    Args:
      x: [n].
      y: [n].
      groups: [n].

    Returns:
      τ, or NaN where x or y is the same in every pair.
    """
    a, b = (np.sign(r[:, None] - r) for r in (ranks(x), ranks(y)))
    if groups is not None:
        g = np.asarray(groups)
        a, b = (np.where(g[:, None] == g, m, 0) for m in (a, b))
    untied = np.sqrt(np.count_nonzero(a) * np.count_nonzero(b))
    return float((a * b).sum() / untied) if untied else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's ρ, of mean ranks where values are equal; NaN where x or y is the same everywhere."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def retest(values: ArrayLike) -> float:
    """Kendall's τ-b between the columns of [n, seeds], mean over their pairs; NaN of one column.

    What no ranking can pass: the order of the same cells, trained again.
    """
    pairs = itertools.combinations(np.asarray(values, np.float64).T, 2)
    found = [kendall(one, other) for one, other in pairs]
    return float(np.mean(found)) if found else float("nan")


def tied(x: ArrayLike) -> float:
    """Share of all pairs that are equal in x."""
    _, counts = np.unique(ranks(x), return_counts=True)
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def regret(x: ArrayLike, y: ArrayLike, k: int) -> float:
    """How much less the best y among the k cells of the highest x is than the best of all; at least 0.

    Of cells of equal x that are not all among the k, each is as likely: the mean over the choices.
    """
    r, best = ranks(x), np.asarray(y, np.float64)
    edge = np.sort(r)[::-1][k - 1]
    sure, maybe, free = best[r > edge], np.sort(best[r == edge])[::-1], k - np.count_nonzero(r > edge)
    # The best of `free` drawn from m sorted ones is the i-th with the probability that it is drawn and no better is.
    left, m = 1.0, len(maybe)
    expected = 0.0
    for i, value in enumerate(maybe):
        p = left * free / (m - i) if free < m - i else left
        expected += p * max(value, sure.max(initial=-np.inf))
        left -= p
        if left <= 0:
            break
    return max(0.0, float(best.max() - expected))


class Estimate(NamedTuple):
    """A figure, and the middle 95 % of what it is of resampled data; NaN where it is not defined."""

    value: float
    low: float
    high: float


Draw = Callable[[np.random.Generator | None], Mapping[str, float]]


def bootstrap(figures: Draw, draws: int, seed: int = 0) -> dict[str, Estimate]:
    """Percentile intervals.

    Args:
      figures: named figures of the data as they are (None), or resampled by a generator.
      draws: how often they are resampled.
      seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    found = figures(None)
    samples = [figures(rng) for _ in range(draws)]
    result = {}
    for name, value in found.items():
        values = np.array([sample[name] for sample in samples])
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
        result[name] = Estimate(value, float(low), float(high))
    return result
