"""Orders compared: against scipy, against all choices, and the bootstrap's coverage."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spikernel_jax.report.ranking import bootstrap, kendall, regret, spearman, tied

FEW = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 2)), min_size=2, max_size=9)


@given(FEW)
def test_kendall_and_spearman_with_ties(rows):
    x, y, _ = map(np.array, zip(*rows, strict=True))
    if len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1:
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y)[0])
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    else:
        assert np.isnan(kendall(x, y))
        assert np.isnan(spearman(x, y))


@given(FEW)
def test_kendall_within_groups(rows):
    agree, xs, ys = 0, 0, 0
    for (x, y, g), (u, v, h) in itertools.combinations(rows, 2):
        if g == h:
            agree += np.sign(x - u) * np.sign(y - v)
            xs, ys = xs + (x != u), ys + (y != v)
    x, y, groups = zip(*rows, strict=True)
    if xs and ys:
        assert kendall(x, y, groups) == pytest.approx(agree / np.sqrt(xs * ys))
    else:
        assert np.isnan(kendall(x, y, groups))


@given(FEW, st.integers(1, 9))
def test_regret_is_the_mean_over_all_choices_of_equals(rows, k):
    k = min(k, len(rows))
    x, y, _ = (np.array(column, float) for column in zip(*rows, strict=True))
    chosen = [c for c in itertools.combinations(range(len(x)), k) if _is_top(x, c)]
    expected = np.mean([max(y) - max(y[list(c)]) for c in chosen])
    assert regret(x, y, k) == pytest.approx(expected)


def _is_top(x, chosen):
    left = [value for i, value in enumerate(x) if i not in chosen]
    return not left or min(x[list(chosen)]) >= max(left)


def test_what_is_not_a_number_ranks_last():
    assert kendall([np.nan, 1, 2], [0, 1, 2]) == 1
    assert regret([np.nan, -np.inf, 0], [5, 5, 3], 1) == 2


def test_tied():
    assert tied([1, 1, 1]) == 1
    assert tied([1, 2, 3]) == 0
    assert tied([1, 1, 2]) == pytest.approx(1 / 3)


def test_bootstrap_covers():
    covered = 0
    for trial in range(100):
        x = np.random.default_rng(trial).normal(size=60)

        def mean(rng, x=x):
            return {"mean": float((x if rng is None else rng.choice(x, len(x))).mean()), "none": float("nan")}

        found = bootstrap(mean, 200, trial)
        covered += found["mean"].low <= 0 <= found["mean"].high
        assert np.isnan(found["none"].low)
        assert found["mean"].low <= found["mean"].value <= found["mean"].high
    assert 88 <= covered <= 99
