"""Rows that compute the same function have one canonical row, and no others do."""

import jax
import numpy as np
import pytest
from hypothesis import given

from convolutions import conv_edges
from small_spaces import LOOPED, ONE_SET, WEIGHTS, cell_of, live_edges, namings, properties, simulate, spaces_and_rows
from spikernel_jax.cells.canonical import EDGES


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0>2:conv3 2>3:skip 0>3:skip", "0>1:conv3 1>3:skip 0>3:skip", True),
        ("0>1:skip 1>3:conv3 0>3:conv1", "0>3:conv3 0>1:conv1 1>3:skip", True),
        ("0>1:conv3 0>2:conv3 1>3:conv1 0>3:skip", "0>1:conv3 1>3:conv1 0>3:skip", True),
        (
            "0>1:skip 0>2:conv3 1>2:skip 2>3:avgpool 0>3:skip",
            "0>1:conv3 0>2:avgpool 1>3:avgpool 2>3:skip 0>3:skip",
            True,
        ),
        # One convolution read twice is not two convolutions.
        (
            "0>1:conv3 1>2:skip 1>3:skip 2>3:skip 0>3:skip",
            "0>1:conv3 0>2:conv3 1>3:skip 2>3:skip 0>3:skip",
            False,
        ),
        (
            "0>1:conv3 1>2:skip 1>3:conv3 2>3:conv3 0>3:skip",
            "0>1:conv3 0>2:conv3 1>3:conv3 2>3:conv3 0>3:skip",
            False,
        ),
        ("0>3:conv1", "0>3:conv3", False),
    ],
)
def test_same_function(one, other, same):
    a, b = (ONE_SET.canonical(ONE_SET.parse(text)) for text in (one, other))
    assert np.array_equal(a, b) == same


def test_cheapest_row_stands_for_a_class():
    row = ONE_SET.canonical(ONE_SET.parse("0>1:conv3 0>2:avgpool 1>3:avgpool 2>3:skip 0>3:skip"))
    assert (row == ONE_SET.code("avgpool")).sum() == 1


@properties
@given(spaces_and_rows())
def test_canonical_is_idempotent_and_valid(case):
    space, row = case
    canonical = space.canonical(row)
    assert space.is_valid(canonical).all()
    assert np.array_equal(space.canonical(canonical), canonical)
    assert np.array_equal(space.prune(canonical), canonical)
    assert np.array_equal(space.canonical(np.stack([row, row])), np.stack([canonical, canonical]))
    # A class keeps its convolutions, hence its parameters.
    sizes = [sorted(k for _, _, k in conv_edges(space, r)) for r in (space.prune(row), canonical)]
    assert sizes[0] == sizes[1]


@properties
@given(spaces_and_rows())
def test_canonical_ignores_which_node_is_which(case):
    space, row = case
    cell = cell_of(space, row)
    for edge in ((1, 2), (2, 1)):
        cell.pop(edge, None)
    names = (0, 2, 1, 3)
    rows = np.zeros((2, len(space.edges)), np.int8)
    for (source, target), name in cell.items():
        rows[0, space.edges.index((source, target))] = space.operations.index(name)
        rows[1, space.edges.index((names[source], names[target]))] = space.operations.index(name)
    a, b = space.canonical(rows)
    assert np.array_equal(a, b)


@properties
@given(spaces_and_rows())
def test_prune_keeps_the_function(case):
    space, row = case
    weights = dict(zip(EDGES, WEIGHTS, strict=False))
    before, after = cell_of(space, row), cell_of(space, space.prune(row))
    assert simulate(before, weights) == simulate(after, weights)
    assert after.items() <= before.items()
    if not space.feedback:
        assert set(after) == live_edges(before)


@properties
@given(spaces_and_rows(feedback=True))
def test_canonical_keeps_the_function_with_feedback(case):
    space, row = case
    pair = [cell_of(space, r) for r in (space.prune(row), space.canonical(row))]
    want = simulate(pair[0], next(namings(pair[0])))
    assert any(simulate(pair[1], weights) == want for weights in namings(pair[1]))


def test_no_swap_when_an_edge_joins_the_nodes():
    # Nodes 1 and 2 exchanged, the instant edge 1>2 would be a delayed 2>1: other functions.
    one = LOOPED.parse("0>1:skip 0>2:conv3 1>2:skip 2>3:skip 0>3:skip 3>1:skip")
    other = LOOPED.parse("0>2:skip 0>1:conv3 2>1:skip 1>3:skip 0>3:skip 3>2:skip")
    assert not np.array_equal(LOOPED.canonical(one), LOOPED.canonical(other))
    weights = dict(zip(EDGES, WEIGHTS, strict=False)) | {(0, 1): WEIGHTS[50], (0, 2): WEIGHTS[50]}
    assert simulate(cell_of(LOOPED, one), weights) != simulate(cell_of(LOOPED, other), weights)


def test_cells_without_feedback_reduce_alike_in_a_feedback_space():
    rows = ONE_SET.sample(jax.random.key(3), 50)
    raw = LOOPED.convert(rows[:, [1, 0, 2, 3, 5, 4]] * (rows[:, [2]] == 0) + rows * (rows[:, [2]] != 0), ONE_SET)
    assert np.array_equal(LOOPED.canonical(raw), LOOPED.convert(rows, ONE_SET))
