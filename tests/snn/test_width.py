"""The width at which a network has a number of parameters, against counting by hand and real arrays."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.cost import nearest_width, parameters_of, width_for
from spikernel_jax.snn.spec import NetworkSpec

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
    assert [parameters_of(dataclasses.replace(spec, channels=c), genotype) for c in (1, 16, 89)] == counts[
        [0, 15, 88]
    ].tolist()
    halves = (counts[:-1] + counts[1:]) // 2  # at the middle between two widths, below and above
    for wanted in np.concatenate([counts[:40], counts[1:40] - 1, counts[:40] + 1, halves[:40], halves[:40] + 1]):
        nearest = 1 + int(np.argmin(np.abs(counts - wanted)))  # the first, so the smaller, of two as near
        assert width_for(spec, genotype, int(wanted)) == nearest, wanted
    with pytest.raises(ValueError, match=f"parameters={counts[0] - 1} must be at least {counts[0]}"):
        width_for(spec, genotype, int(counts[0]) - 1)


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
        assert width_for(spec, rows, wanted) == min(sizes, key=lambda c: abs(sizes[c] - wanted))


def test_the_nearest_width_of_any_growing_quadratic():
    values = [3 + 5 * c + 2 * c * c for c in range(1, 60)]
    for wanted in range(0, values[50], 7):
        assert nearest_width(lambda c: values[c - 1], wanted) == 1 + int(np.argmin(np.abs(np.array(values) - wanted)))
