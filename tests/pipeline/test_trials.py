"""What comparisons of trainings share: time left, and results that are kept."""

import dataclasses

import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline.trials import Clock, Trial
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import TrainConfig

SPACE = CellSpace((1, 3, 5, 7))


def trial(k: int, seed: int, **changes) -> Trial:
    spec = NetworkSpec((8, 8, 1), 2, SPACE, channels=4, **changes)
    return Trial(f"k{k}", seed, spec, tuple(SPACE.parse(f"0>3:conv{k}").tolist()), TrainConfig(epochs=3))


def test_time_left():
    small, large, later = trial(1, 0), trial(7, 0), trial(1, 1)
    clock = Clock([small, large, later])
    for left, seconds in ((2, 9.0), (1, 1.0), (0, 1.0)):  # compilation counts once
        clock.epoch(small, left, seconds)
    epoch = (clock.left() - 3 * 1 - 8) / 3  # of the large one, which is compiled too
    assert 3 < epoch < 49  # it has more work, by more than three times
    clock.epoch(large, 2, 20.0)
    assert clock.left() == pytest.approx(2 * epoch + 3 * 1)  # its first epoch tells nothing of others
    clock.epoch(large, 1, 4.0)
    assert clock.left() == pytest.approx(4 + 3 * 1)
    clock.done(later)
    assert clock.left() == pytest.approx(4)


def test_time_left_of_a_kind_unseen_goes_by_its_time_steps():
    two, six = trial(3, 0, time_steps=2), dataclasses.replace(trial(3, 0, time_steps=6), kind="six")
    clock = Clock([two, six])
    clock.epoch(two, 0, 1.0)
    assert 3 * 2.5 < clock.left() < 3 * 3  # the stem is computed once
