"""The Pareto front and the choice, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikernel_jax.pipeline.tradeoff import choose, pareto_front
from spikernel_jax.search.queue import NothingFitsError

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
