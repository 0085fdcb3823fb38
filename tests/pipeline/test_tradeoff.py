"""The Pareto front and the choice against brute force, amounts of memory, and which kernel sets are kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikernel_jax.pipeline.tradeoff import (
    NothingFitsError,
    choose,
    format_bytes,
    keep_sets,
    pareto_front,
    parse_bytes,
)

PAIRS = [(1, 3), (1, 5), (1, 7), (3, 5), (3, 7), (5, 7)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512KiB", 524288),
        ("1.5MiB", 1572864),
        ("2MB", 2_000_000),
        ("100000", 100000),
        ("64 kB", 64000),
        (" 1gib ", 2**30),
        ("0.1 kB", 100),
        ("1.0009kb", 1000),
        (".5KiB", 512),
        ("7b", 7),
        ("1.1TB", 1_100_000_000_000),
        (4096, 4096),
        (np.int64(3), 3),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.4B", "-5", "-1KiB", "nan", "inf", "1e6", "KiB", "5 K", "5 bits", "1,5MiB", "1.2.3", "٣",
     "9" * 50, "2MB 3", 0, -1, True, 1.5, float("inf"), None],
)  # fmt: skip
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="is not an amount of memory: write") as error:
        parse_bytes(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (524288, "512.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20 - 100, "1023.9 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (5 * 2**40, "5.0 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(st.integers(1, 2**50))
def test_format_bytes_reads_back_within_its_digits(count):
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(0.05 * count, 0)


def test_format_bytes_refuses():
    with pytest.raises(ValueError, match="0 or more"):
        format_bytes(-1)


# Few distinct values, so that ties of every kind occur.
candidates = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.5, np.nan, -np.inf, np.inf]), st.integers(0, 5)), max_size=12
)


def brute_front(accuracy, memory):
    def beats(i, j):
        no_worse = accuracy[i] >= accuracy[j] and memory[i] <= memory[j]
        return no_worse and (accuracy[i] > accuracy[j] or memory[i] < memory[j])

    finite = [i for i in range(len(accuracy)) if np.isfinite(accuracy[i])]
    return [j in finite and not any(beats(i, j) for i in finite) for j in range(len(accuracy))]


@given(candidates)
def test_front_is_the_brute_force_one(rows):
    accuracy, memory = [a for a, _ in rows], [m for _, m in rows]
    assert pareto_front(accuracy, memory).tolist() == brute_front(accuracy, memory)


def test_front_of_many_random_candidates():
    rng = np.random.default_rng(0)
    accuracy, memory = rng.random(500), rng.integers(1, 10**12, 500)
    assert pareto_front(accuracy, memory).tolist() == brute_front(accuracy, memory)


def test_exact_ties_are_both_on_the_front():
    assert pareto_front([0.5, 0.5, 0.5, 0.4], [3, 3, 4, 3]).tolist() == [True, True, False, False]


@given(candidates, st.one_of(st.none(), st.integers(0, 6)))
def test_choice_is_the_brute_force_one_and_on_the_front(rows, budget):
    accuracy, memory = [a for a, _ in rows], [m for _, m in rows]
    finite = [i for i in range(len(rows)) if np.isfinite(accuracy[i])]
    fitting = [i for i in finite if budget is None or memory[i] <= budget]
    if not finite:
        with pytest.raises(ValueError, match="has a finite accuracy"):
            choose(accuracy, memory, budget)
    elif not fitting:
        with pytest.raises(NothingFitsError, match=f"smallest candidate needs {min(memory[i] for i in finite)} "):
            choose(accuracy, memory, budget)
    else:
        index = choose(accuracy, memory, budget)
        assert index == min(fitting, key=lambda i: (-accuracy[i], memory[i], i))
        assert pareto_front(accuracy, memory)[index]


def test_nothing_fits_says_budget_and_smallest():
    with pytest.raises(NothingFitsError, match=r"^nothing fits in 1000 bytes: .* 2048 bytes \(2\.0 KiB\)$"):
        choose([0.9, 0.8], [4096, 2048], 1000)


@pytest.mark.parametrize(
    ("accuracy", "memory", "match"),
    [
        ([0.1], [1, 2], "one accuracy and one memory"),
        ([[0.1]], [[1]], "one accuracy and one memory"),
        ([0.1], [-1], "0 or more"),
        ([0.1], [np.nan], "0 or more"),
        ([0.1], ["1"], "0 or more"),
    ],
)
def test_wrong_candidates(accuracy, memory, match):
    with pytest.raises(ValueError, match=match):
        pareto_front(accuracy, memory)
    with pytest.raises(ValueError, match=match):
        choose(accuracy, memory, None)


# Kernel sets

MEMORY = {1: 100, 3: 300, 5: 700, 7: 1300}
MEAN = {1: 0.60, 3: 0.75, 5: 0.74, 7: 0.70}


def verdicts(mean=MEAN, sd=0.01, memory=MEMORY, n=4, sets=PAIRS):
    return keep_sets(list(mean), sets, mean, dict.fromkeys(mean, sd), memory, n)


def test_a_set_with_a_smaller_and_clearly_better_rival_is_dropped():
    found = {verdict.kernel_set: verdict for verdict in verdicts()}
    assert [name for name in PAIRS if found[name].kept] == [(1, 3), (3, 5)]
    # (5, 7) has 0.72, (3, 5) 0.745; what differs is (a3 - a7) / 2, of error 0.5 * sqrt(2 * 0.01² / 4).
    assert found[5, 7].reason == "dominated by (3, 5): +2.5 points of accuracy ± 0.4 (SE) at 0.50x memory"
    assert found[1, 5].reason == "dominated by (1, 3): +0.5 points of accuracy ± 0.4 (SE) at 0.50x memory"


def test_reasons_of_kept_sets():
    found = {verdict.kernel_set: verdict for verdict in verdicts(sd=0.05)}
    assert found[1, 5].kept
    assert found[1, 5].reason == "within noise of (1, 3): +0.5 points of accuracy ± 1.8 (SE) at 0.50x memory"
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
            assert any(verdict.reason.startswith(f"dominated by {name}") for name in set(dominators) & kept)
    best = max(PAIRS, key=lambda name: round(sum(mean[k] for k in name), 9))
    tied = [name for name in PAIRS if abs(sum(mean[k] for k in name) - sum(mean[k] for k in best)) < 1e-9]
    assert kept & set(tied)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sets": [(1, 9)]}, r"\(1, 9\) holds sizes that were not measured: \[9\]"),
        ({"sets": [(1, 3), (3, 1)]}, "comes twice"),
        ({"sets": [(3, 3)]}, "different sizes"),
        ({"sets": [()]}, "different sizes"),
        ({"sets": []}, "no kernel sets"),
        ({"n": 0}, "number of seeds"),
        ({"sd": -0.1}, "accuracy sd of kernel size 1"),
        ({"sd": float("nan")}, "accuracy sd of kernel size 1"),
        ({"mean": {**MEAN, 5: float("nan")}}, "accuracy mean of kernel size 5"),
        ({"memory": {1: 100, 3: 300, 5: 0, 7: 1}}, "memory of kernel size 5"),
        ({"memory": {1: 100, 3: 300, 5: 700}}, "memory of kernel size 7 was not measured: None"),
    ],
)
def test_wrong_measurements(change, match):
    with pytest.raises(ValueError, match=match):
        verdicts(**change)
