"""Statistics over seeds: mean, standard deviation and confidence interval, as columns of a table and as text."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class Interval(NamedTuple):
    """A sample of n values: mean, standard deviation (n - 1), and the mean's confidence interval by Student's t."""

    mean: float
    sd: float
    n: int
    low: float
    high: float


def interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean, standard deviation and the mean's t-interval, mean ± t(n - 1)·sd/√n.

    Args:
      values: [n], independent and about normally distributed.
      confidence: of the interval, above 0 and below 1.

    Returns:
      The interval; sd and bounds are NaN for n = 1.

    Raises:
      ValueError: if there is no value or one is not finite, or on a confidence that is none.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"values={x.tolist()} must be at least one finite number in a row")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be above 0 and below 1")
    return of_moments(float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else math.nan, x.size, confidence)


def of_moments(mean: float, sd: float, n: int, confidence: float = 0.95) -> Interval:
    """The `interval` of n values of which mean and standard deviation are known; sd is not looked at for n = 1."""
    if n == 1:
        return Interval(mean, math.nan, 1, math.nan, math.nan)
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return Interval(mean, sd, n, mean - half, mean + half)


def columns(name: str, i: Interval) -> dict[str, float]:
    """An interval as columns of a table: the mean as `name`, the rest with ``_sd``, ``_low`` and ``_high``."""
    return {name: i.mean, f"{name}_sd": i.sd, f"{name}_low": i.low, f"{name}_high": i.high}


def points(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    """The `columns` of a share as text, in per cent: mean ± sd [low, high]; of one value itself; "-" where null.

    Args:
      row: of a table that `columns` made.
      name: of the interval.
      sign: ``"+"`` writes the sign of positive numbers too.
    """
    if row[name] is None:
        return "-"
    mean, low, high = (f"{100 * row[field]:{sign}.2f}" for field in (name, f"{name}_low", f"{name}_high"))
    return mean if math.isnan(row[f"{name}_sd"]) else f"{mean} ± {100 * row[f'{name}_sd']:.2f} [{low}, {high}]"
