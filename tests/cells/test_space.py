"""Spaces: which cells they hold, each once, and what is no cell of theirs."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_spaces import LOOPED, ONE_SET, SPACES, UNION, fingerprint, live_edges, properties, raw_cells, spaces_and_rows
from spikernel_jax.cells.canonical import EDGES, FEEDBACK_EDGES, FORWARD_EDGES
from spikernel_jax.cells.space import CellSpace


def test_edges():
    assert FORWARD_EDGES == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert FEEDBACK_EDGES == ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2))
    assert ONE_SET.edges == FORWARD_EDGES
    assert LOOPED.edges == EDGES == FORWARD_EDGES + FEEDBACK_EDGES


def test_codes():
    space = CellSpace([3, 7])  # pyright: ignore[reportArgumentType]
    assert space == CellSpace((3, 7))
    assert space.operations == ("zero", "skip", "conv3", "conv7", "avgpool")
    assert (space.num_ops, space.code("avgpool"), space.code("conv7")) == (5, 4, 3)
    assert [space.operation(code).kind for code in range(5)] == ["zero", "identity", "generic", "generic", "linear"]


def test_distinct_cells_of_one_set():
    keys, rows = [], []
    for row, cell in raw_cells(ONE_SET):
        rows.append(row)
        keys.append(fingerprint(cell, named=True, linear=True))
    canonical = [tuple(row) for row in ONE_SET.canonical(np.array(rows)).tolist()]
    assert len(rows) == 12_500
    assert len(np.unique(ONE_SET.prune(np.array(rows)), axis=0)) == 7_556
    # The library's classes are those of the brute force, neither coarser nor finer.
    assert len(set(keys)) == len(set(canonical)) == len(set(zip(keys, canonical, strict=True))) == 4_243
    assert sorted(set(canonical)) == [tuple(row) for row in ONE_SET.enumerate().tolist()]


@pytest.mark.parametrize(
    ("named", "linear", "count"), [(False, False, 4_197), (True, False, 4_393), (False, True, 3_991)]
)
def test_looser_readings_of_one_set(named, linear, count):
    assert len({fingerprint(cell, named, linear) for _, cell in raw_cells(ONE_SET)}) == count


@pytest.mark.slow
def test_distinct_cells_of_the_union():
    exact, trees = set(), set()
    for _, cell in raw_cells(UNION):
        live = {edge: cell[edge] for edge in live_edges(cell)}
        if len({name for name in live.values() if name.startswith("conv")}) <= 2:
            exact.add(fingerprint(cell, named=True, linear=True))
            trees.add(fingerprint(cell, named=False, linear=False))
    assert len(exact) == len(UNION.enumerate()) == 20_005
    assert len(trees) == 19_582


@pytest.mark.parametrize("space", [ONE_SET, UNION, CellSpace((3,)), CellSpace((1, 3, 5, 7))], ids=str)
def test_enumerate(space):
    rows = space.enumerate()
    assert rows.dtype == np.int8
    assert space.is_valid(rows).all()
    assert (space.canonical(rows) == rows).all()
    assert (np.unique(rows, axis=0) == rows).all()
    assert len(np.unique(space.identity(rows))) == len(rows)
    assert rows is space.enumerate()
    assert not rows.flags.writeable


def test_enumerate_of_a_union_holds_each_set():
    union = set(UNION.identity(UNION.enumerate()).tolist())
    for pair in itertools.combinations((1, 3, 5, 7), 2):
        space = CellSpace(pair)
        assert union > set(space.identity(space.enumerate()).tolist())


def test_feedback_is_too_large_to_list():
    with pytest.raises(ValueError, match=r"too large to list, with 236,196 raw rows"):
        LOOPED.enumerate()


@properties
@given(spaces_and_rows())
def test_convert_and_identity_over_spaces(case):
    space, row = case
    wide = CellSpace(tuple(range(1, 16, 2)), feedback=True)
    there = wide.convert(row, space)
    assert wide.explicit(there) == space.explicit(row)
    assert np.array_equal(space.convert(there, wide), row)
    assert wide.identity(there) == space.identity(row)
    assert 0 < int(space.identity(row)) < 2**63


@properties
@given(spaces_and_rows(), st.integers(0, 2**31))
def test_mutate(case, seed):
    space, row = case
    key = jax.random.key(seed)
    start, changed = space.canonical(row), space.mutate(key, row)
    assert changed.shape == row.shape
    assert np.array_equal(space.mutate(key, row), changed)
    assert space.is_valid(changed).all()
    assert np.array_equal(space.canonical(changed), changed)
    assert not np.array_equal(changed, start)


def test_mutate_reaches_more_than_one_cell():
    start = LOOPED.parse("0303 0030 2002 0200")
    reached = {LOOPED.format(LOOPED.mutate(jax.random.key(i), start)) for i in range(30)}
    assert len(reached) > 10


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_sample(space):
    rows = space.sample(jax.random.key(0), 60)
    assert rows.shape == (60, len(space.edges))
    assert rows.dtype == np.int8
    assert space.is_valid(rows).all()
    assert np.array_equal(space.canonical(rows), rows)
    assert np.array_equal(space.sample(jax.random.key(0), 25), rows[:25])
    assert not np.array_equal(space.sample(jax.random.key(1), 60), rows)
    assert space.sample(jax.random.key(0), 0).shape == (0, len(space.edges))


def test_sample_is_the_reference_distribution():
    rows = ONE_SET.sample(jax.random.key(0), 5_000)
    single = (rows != 0).sum(axis=1) == 1
    # How often both nodes are dead, over all rows.
    alone = sum(live_edges(cell) == {(0, 3)} for _, cell in raw_cells(ONE_SET)) / 12_500
    assert single.mean() == pytest.approx(alone, abs=0.015)
    assert np.bincount(rows[single][:, 3], minlength=5)[0] == 0
    assert np.ptp(np.bincount(rows[single][:, 3])[1:]) < 60


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kernel_sizes": (2, 3)}, r"kernel_sizes is \(2, 3\), with 2: want odd"),
        ({"kernel_sizes": (-1, 3)}, "with -1"),
        ({"kernel_sizes": (0,)}, "with 0"),
        ({"kernel_sizes": (True, 3)}, "with True"),
        ({"kernel_sizes": (1.0, 3)}, r"with 1\.0"),
        ({"kernel_sizes": ("3",)}, "with '3'"),
        ({"kernel_sizes": (3, 17)}, "with 17"),
        ({"kernel_sizes": ()}, r"kernel_sizes is \(\)"),
        ({"kernel_sizes": 3}, "kernel_sizes is 3"),
        ({"kernel_sizes": (3, 3)}, r"here \(3,\)"),
        ({"kernel_sizes": (3, 1)}, r"here \(1, 3\)"),
        ({"feedback": 1}, "feedback is 1: want True or False"),
        ({"max_kernel_sizes": 0}, "max_kernel_sizes is 0: want None or an int from 1 to 2"),
        ({"max_kernel_sizes": 3}, "max_kernel_sizes is 3"),
        ({"max_kernel_sizes": True}, "max_kernel_sizes is True"),
    ],
)
def test_space_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        CellSpace(**fields)


@pytest.mark.parametrize("method", ["validate", "canonical", "prune", "identity", "format", "explicit", "held"])
@pytest.mark.parametrize(
    ("space", "row", "match"),
    [
        (ONE_SET, [0, 0, 0, 5, 0, 0], "codes must be 0 to 4"),
        (ONE_SET, [0, -1, 0, 1, 0, 0], "codes must be 0 to 4"),
        (ONE_SET, [0, 0, 0, 257, 0, 0], "codes must be 0 to 4"),
        (ONE_SET, [1, 0, 0, 0, 1, 0], "edge 0>3 must not be zero"),
        (ONE_SET, [1, 0, 0, 1], r"want ints \[n, 6\]"),
        (ONE_SET, [0, 0, 0, 1.0, 0, 0], "dtype float64"),
        (LOOPED, [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0], "not both directions"),
        (UNION, [2, 0, 0, 3, 4, 0], "at most 2 different sizes"),
    ],
)
def test_rows_are_checked(method, space, row, match):
    with pytest.raises(ValueError, match=match):
        getattr(space, method)(row)


def test_is_valid_row_by_row():
    rows = [[0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1], [0, 0, 0, 9, 0, 0], [2, 0, 3, 4, 0, 0]]
    # The last row's third size is on a dead edge, which no cell runs.
    assert CellSpace((1, 3), max_kernel_sizes=1).is_valid(rows).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ONE_SET.code("conv5"), "operation 'conv5' is not in this space: it has zero, skip, conv1"),
        (lambda: ONE_SET.operation(5), "code 5 is not in this space"),
        (lambda: ONE_SET.convert([0, 0, 0, 5, 0, 0], UNION), "use conv7"),
        (lambda: ONE_SET.convert(LOOPED.parse("0303 0030 2002 0200"), LOOPED), "use feedback edges"),
        (lambda: UNION.convert([2, 0, 0, 3, 4, 0], CellSpace((1, 3, 5))), "at most 2 different sizes"),
        (lambda: ONE_SET.sample(jax.random.key(0), -1), "n is -1"),
        (lambda: ONE_SET.sample(0, 1), "want one key"),
        (lambda: ONE_SET.sample(jax.random.split(jax.random.key(0)), 1), "want one key"),
        (lambda: ONE_SET.mutate(jax.random.key(0), [[0, 0, 0, 1, 0, 0]]), "want one row"),
        (lambda: ONE_SET.format([[0, 0, 0, 1, 0, 0]]), "want one row"),
    ],
)
def test_calls_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
