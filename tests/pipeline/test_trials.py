"""What comparisons of trainings share: widths at equal parameters, statistics, time left, results that are kept."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import trials
from spikernel_jax.pipeline.trials import Clock, Trial
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import TrainConfig

SPACE = CellSpace((1, 3, 5, 7))


def by_hand(k: int, c: int, convs: int) -> int:
    """Parameters on CIFAR-10 with the gap head, of a cell with `convs` convolutions of one size in both cells."""
    stem, transition, last = 27 * c + 2 * c, 2 * c + 9 * c * 2 * c + 4 * c, 4 * c
    cells = convs * (k * k * c * c + 2 * c + k * k * 4 * c * c + 4 * c)
    return stem + transition + last + 10 * 2 * c + 10 + cells


@pytest.mark.parametrize("k", SPACE.kernel_sizes)
@pytest.mark.parametrize("cell", ["0>1:convK 1>3:convK 0>3:skip", "0>1:convK 0>2:convK 1>2:convK 2>3:convK 0>3:convK"])
def test_width_is_the_nearest_of_all(cell, k):
    spec = NetworkSpec((32, 32, 3), 10, SPACE, channels=5)
    genotype = SPACE.parse(cell.replace("convK", f"conv{k}"))
    counts = np.array([by_hand(k, c, cell.count("convK")) for c in range(1, 90)])
    assert [trials.parameters_at(spec, genotype, c) for c in (1, 16, 89)] == counts[[0, 15, 88]].tolist()
    halves = (counts[:-1] + counts[1:]) // 2  # at the middle between two widths, below and above
    for wanted in np.concatenate([counts[:40], counts[1:40] - 1, counts[:40] + 1, halves[:40], halves[:40] + 1]):
        nearest = 1 + int(np.argmin(np.abs(counts - wanted)))  # the first, so the smaller, of two as near
        assert trials.width_for(spec, genotype, int(wanted)) == nearest, wanted
    with pytest.raises(ValueError, match=f"parameters={counts[0] - 1} must be at least {counts[0]}"):
        trials.width_for(spec, genotype, int(counts[0]) - 1)


def test_width_with_the_other_head_and_two_cells():
    """The snasnet head's parameters grow with C too, and real arrays have as many."""
    spec = NetworkSpec((16, 16, 1), 4, SPACE, head="snasnet", head_hidden=7, neurons_per_class=3)
    rows = np.stack([SPACE.parse("0>1:conv5 1>3:conv1 0>3:skip"), SPACE.parse("0>3:conv7")])
    sizes = {}
    for c in range(1, 12):
        at_width = NetworkSpec((16, 16, 1), 4, SPACE, channels=c, head="snasnet", head_hidden=7, neurons_per_class=3)
        params, _ = jax.eval_shape(lambda at_width=at_width: network.init(jax.random.key(0), at_width, rows))
        sizes[c] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    for wanted in range(sizes[1], sizes[10], 997):
        assert trials.width_for(spec, rows, wanted) == min(sizes, key=lambda c: abs(sizes[c] - wanted))


def test_interval_by_hand():
    # Quantiles from printed tables of Student's t: 4.303 (2), 3.182 (3), 12.706 (1); 2.920 is 90 % two-sided of 2.
    mean, sd, n, low, high = trials.interval([1, 2, 3, 4])
    assert (mean, n) == (2.5, 4)
    assert sd == pytest.approx(math.sqrt(5 / 3))
    assert (high - mean, mean - low) == pytest.approx((3.182 * math.sqrt(5 / 3) / 2,) * 2, rel=2e-4)
    assert trials.interval([0, 1, 2]).high == pytest.approx(1 + 4.303 / math.sqrt(3), rel=1e-4)
    assert trials.interval([0, 1, 2], 0.9).low == pytest.approx(1 - 2.920 / math.sqrt(3), rel=1e-4)
    assert trials.interval([0, 2]).high == pytest.approx(1 + 12.706, rel=1e-4)
    assert trials.interval([3, 3, 3]) == (3, 0, 3, 3, 3)
    alone = trials.interval([5])
    assert (alone.mean, alone.n) == (5, 1)
    assert np.isnan([alone.sd, alone.low, alone.high]).all()
    for values in ([], [1, math.nan], [[1, 2]]):
        with pytest.raises(ValueError, match="finite number"):
            trials.interval(values)
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        trials.interval([1, 2], 1.0)


def trial(k: int, seed: int, **changes) -> Trial:
    spec = NetworkSpec((8, 8, 1), 2, SPACE, channels=4, **changes)
    return Trial(f"k{k}", seed, spec, tuple(SPACE.parse(f"0>3:conv{k}").tolist()), TrainConfig(epochs=3))


def test_time_left():
    small, large, later = trial(1, 0), trial(7, 0), trial(1, 1)
    clock = Clock([small, large, later])
    for left, seconds in ((2, 9.0), (1, 1.0), (0, 1.0)):  # compilation counts once
        clock.epoch(small, left, seconds)
    guessed = clock.left()
    assert guessed > 3 * 1 + 3 * 3  # the large one has more work, by more than three times
    clock.epoch(large, 2, 4.0)
    assert clock.left() == pytest.approx(2 * 4 + 3 * 1)
    clock.done(later)
    assert clock.left() == pytest.approx(2 * 4)


def test_time_left_of_a_kind_unseen_goes_by_its_time_steps():
    two, six = trial(3, 0, time_steps=2), dataclasses.replace(trial(3, 0, time_steps=6), kind="six")
    clock = Clock([two, six])
    clock.epoch(two, 0, 1.0)
    assert 3 * 2.5 < clock.left() < 3 * 3  # the stem is computed once


def test_columns_and_points():
    row = trials.columns("x", trials.interval([0.1, 0.3]))
    assert [*row] == ["x", "x_sd", "x_low", "x_high"]
    assert trials.points(row, "x", "+") == "+20.00 ± 14.14 [-107.06, +147.06]"
    assert trials.points(trials.columns("x", trials.interval([0.1])), "x") == "10.00"
    assert trials.points({"x": None}, "x") == "-"
