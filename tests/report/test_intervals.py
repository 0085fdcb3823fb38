"""Means with their t-intervals, against printed quantiles."""

import math

import numpy as np
import pytest

from spikernel_jax.report.intervals import columns, interval, of_moments, points


def test_interval_by_hand():
    # Quantiles from printed tables of Student's t: 4.303 (2), 3.182 (3), 12.706 (1); 2.920 is 90 % two-sided of 2.
    mean, sd, n, low, high = interval([1, 2, 3, 4])
    assert (mean, n) == (2.5, 4)
    assert sd == pytest.approx(math.sqrt(5 / 3))
    assert (high - mean, mean - low) == pytest.approx((3.182 * math.sqrt(5 / 3) / 2,) * 2, rel=2e-4)
    assert interval([0, 1, 2]).high == pytest.approx(1 + 4.303 / math.sqrt(3), rel=1e-4)
    assert interval([0, 1, 2], 0.9).low == pytest.approx(1 - 2.920 / math.sqrt(3), rel=1e-4)
    assert interval([0, 2]).high == pytest.approx(1 + 12.706, rel=1e-4)
    assert interval([3, 3, 3]) == (3, 0, 3, 3, 3)
    assert of_moments(2.5, math.sqrt(5 / 3), 4) == pytest.approx(interval([1, 2, 3, 4]))
    alone = interval([5])
    assert (alone.mean, alone.n) == (5, 1)
    assert np.isnan([alone.sd, alone.low, alone.high]).all()
    for values in ([], [1, math.nan], [[1, 2]]):
        with pytest.raises(ValueError, match="finite number"):
            interval(values)
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        interval([1, 2], 1.0)


def test_columns_and_points():
    row = columns("x", interval([0.1, 0.3]))
    assert [*row] == ["x", "x_sd", "x_low", "x_high"]
    assert points(row, "x", "+") == "+20.00 ± 14.14 [-107.06, +147.06]"
    assert points(columns("x", interval([0.1])), "x") == "10.00"
    assert points({"x": None}, "x") == "-"
