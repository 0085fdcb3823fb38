"""Which kernel sets are kept: the rule against its statement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikernel_jax.pipeline.kernel_sets import keep_sets

PAIRS = [(1, 3), (1, 5), (1, 7), (3, 5), (3, 7), (5, 7)]
MEMORY = {1: 100, 3: 300, 5: 700, 7: 1300}
MEAN = {1: 0.60, 3: 0.75, 5: 0.74, 7: 0.70}


def verdicts(mean=MEAN, sd=0.01, memory=MEMORY, n=4, sets=PAIRS):
    return keep_sets(list(mean), sets, mean, dict.fromkeys(mean, sd), memory, n)


def test_a_set_with_a_smaller_and_clearly_better_rival_is_dropped():
    found = {verdict.kernel_set: verdict for verdict in verdicts()}
    assert [name for name in PAIRS if found[name].kept] == [(1, 3), (3, 5)]
    # (5, 7) has 0.72, (3, 5) 0.745; what differs is (a3 - a7) / 2, of error 0.5 * sqrt(2 * 0.01² / 4).
    assert found[5, 7].reason == "dominated by 3,5: +2.5 points of accuracy ± 0.4 (SE) at 0.50x memory"
    assert found[1, 5].reason == "dominated by 1,3: +0.5 points of accuracy ± 0.4 (SE) at 0.50x memory"


def test_reasons_of_kept_sets():
    found = {verdict.kernel_set: verdict for verdict in verdicts(sd=0.05)}
    assert found[1, 5].kept
    assert found[1, 5].reason == "within noise of 1,3: +0.5 points of accuracy ± 1.8 (SE) at 0.50x memory"
    assert found[1, 3].reason == "no set of its memory or less is more accurate"


def test_one_seed_says_nothing_about_noise_and_drops_nothing():
    found = verdicts(sd=float("nan"), n=1)
    assert all(verdict.kept for verdict in found)
    assert "unknown noise (one seed)" in found[-1].reason


def test_equal_sets_are_both_kept():
    flat = dict.fromkeys(MEAN, 0.1 + 0.2)
    assert all(verdict.kept for verdict in verdicts(mean=flat, sd=0.0))


measured = st.fixed_dictionaries({size: st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.6, 0.9]) for size in (1, 3, 5, 7)})
spreads = st.fixed_dictionaries({size: st.sampled_from([0.0, 0.01, 0.1, 0.3]) for size in (1, 3, 5, 7)})
sizes_bytes = st.fixed_dictionaries({size: st.integers(1, 4) for size in (1, 3, 5, 7)})


@settings(max_examples=200)
@given(measured, spreads, sizes_bytes, st.integers(2, 5))
def test_rule_against_its_statement(mean, sd, memory, n):
    found = keep_sets([1, 3, 5, 7], PAIRS, mean, sd, memory, n)
    kept = {verdict.kernel_set for verdict in found if verdict.kept}
    assert [verdict.kernel_set for verdict in found] == PAIRS
    for verdict in found:
        own = verdict.kernel_set
        dominators = []
        for other in PAIRS:
            gain = sum(mean[k] for k in other) / 2 - sum(mean[k] for k in own) / 2
            error = np.sqrt(sum((((k in other) - (k in own)) / 2 * sd[k]) ** 2 / n for k in (1, 3, 5, 7)))
            no_larger = sum(memory[k] for k in other) <= sum(memory[k] for k in own)
            if no_larger and gain > error + 1e-9:
                dominators.append(other)
        assert verdict.kept == (not dominators)
        if dominators:  # the one named is itself kept
            assert any(
                verdict.reason.startswith(f"dominated by {name[0]},{name[1]}") for name in set(dominators) & kept
            )
    best = max(PAIRS, key=lambda name: round(sum(mean[k] for k in name), 9))
    tied = [name for name in PAIRS if abs(sum(mean[k] for k in name) - sum(mean[k] for k in best)) < 1e-9]
    assert kept & set(tied)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sets": [(1, 9)]}, r"1,9 holds kernels that were not measured: \[9\]"),
        ({"sets": [(1, 3), (3, 1)]}, "comes twice"),
        ({"sets": [(3, 3)]}, "different kernels"),
        ({"sets": [()]}, "different kernels"),
        ({"sets": []}, "no kernel sets"),
        ({"n": 0}, "number of seeds"),
        ({"sd": -0.1}, "accuracy sd of kernel 1"),
        ({"sd": float("nan")}, "accuracy sd of kernel 1"),
        ({"mean": {**MEAN, 5: float("nan")}}, "accuracy mean of kernel 5"),
        ({"memory": {1: 100, 3: 300, 5: 0, 7: 1}}, "memory of kernel 5"),
        ({"memory": {1: 100, 3: 300, 5: 700}}, "memory of kernel 7 was not measured: None"),
    ],
)
def test_wrong_measurements(change, match):
    with pytest.raises(ValueError, match=match):
        verdicts(**change)
