"""Spaces of any operations: their listing against a brute force, raw rows by number, and bad input."""

import functools
import itertools
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikernel_jax.cells.canonical import FORWARD_EDGES
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations.operation import get_operation

THRESHOLDS = CellSpace(operations=("zero", "skip", "conv3@0.5", "conv3@1.0", "conv3@1.5"), direct="any")
SPACES = {
    "thresholds": THRESHOLDS,
    "two_linear": CellSpace(operations=("zero", "skip", "avgpool", "avgpool5", "conv3")),
    "no_skip": CellSpace(operations=("zero", "conv3", "avgpool"), direct="any"),
    "no_linear": CellSpace(operations=("zero", "dwconv3", "skip", "maxpool3")),
    "generic_alone": CellSpace(operations=("zero", "conv1", "conv3d2", "conv1x5"), direct="any"),
    "linear_alone": CellSpace(operations=("zero", "avgpool", "avgpool5", "avgpool7"), direct="any"),
    "limited": CellSpace(operations=("zero", "skip", "conv1", "conv3", "conv5"), max_kernel_sizes=1, direct="any"),
}

PRIME = 2**61 - 1
PATHS = [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]]


@functools.cache
def numbers(name: str, which: int) -> tuple[int, ...]:
    """Random numbers of an operation; of a generic one, of each of its edges."""
    drawn = random.Random(f"{name} {which}")
    return tuple(drawn.randrange(PRIME) for _ in range(6))


def applied(name: str, which: int, v: tuple[int, ...]) -> tuple[int, ...]:
    """A random function on pairs of numbers: matrices for linear operations, which do not commute, else cubics."""
    kind = get_operation(name).kind
    if kind == "identity":
        return v
    a, b, c, d, e, f = numbers(name, 0 if kind == "linear" else which)
    first, second = (a * v[0] + b * v[1]) % PRIME, (c * v[0] + d * v[1]) % PRIME
    if kind == "linear":
        return first, second
    return (first * first * second + e * first) % PRIME, (second * second * first + f * second) % PRIME


def live_edges(cell: dict) -> set:
    return {edge for path in PATHS if all(step in cell for step in path) for edge in path}


def output(cell: dict, which: dict) -> tuple[int, ...]:
    values: dict[int, tuple[int, ...]] = {0: (123456789, 987654321), 1: (0, 0), 2: (0, 0), 3: (0, 0)}
    for edge in FORWARD_EDGES:
        if edge in cell:
            made = applied(cell[edge], which.get(edge, 0), values[edge[0]])
            values[edge[1]] = tuple((x + y) % PRIME for x, y in zip(values[edge[1]], made, strict=True))
    return values[3]


def fingerprint(cell: dict) -> tuple[int, ...]:
    """Equal for cells that are the same function, up to which edge of an operation owns which function."""
    cell = {edge: cell[edge] for edge in cell if edge in live_edges(cell)}
    groups: dict[str, list] = {}
    for edge, name in cell.items():
        if get_operation(name).kind == "generic":
            groups.setdefault(name, []).append(edge)
    orders = [itertools.permutations(range(1, len(group) + 1)) for group in groups.values()]
    return min(
        output(
            cell, {e: i for g, own in zip(groups.values(), chosen, strict=True) for e, i in zip(g, own, strict=True)}
        )
        for chosen in itertools.product(*orders)
    )


def cells_of(space: CellSpace) -> list[tuple[tuple[int, ...], dict]]:
    """Every row that is a cell, by the rules as they are told."""
    found = []
    for row in itertools.product(range(space.num_ops), repeat=6):
        cell = {e: space.operations[c] for e, c in zip(FORWARD_EDGES, row, strict=True) if c}
        live = live_edges(cell)
        generic = {cell[e] for e in live if get_operation(cell[e]).kind == "generic"}
        reached = (0, 3) in cell if space.direct == "required" else live
        if reached and len(generic) <= (space.max_kernel_sizes or 6):
            found.append((row, cell))
    return found


def check_against_brute_force(space: CellSpace) -> None:
    cells = cells_of(space)
    rows = np.array([row for row, _ in cells], np.int8)
    assert space.is_valid(rows).all()
    canonical = [tuple(row) for row in space.canonical(rows).tolist()]
    prints = [fingerprint(cell) for _, cell in cells]
    # Neither coarser nor finer than the brute force.
    assert len(set(prints)) == len(set(canonical)) == len(set(zip(prints, canonical, strict=True)))
    assert sorted(set(canonical)) == [tuple(row) for row in space.enumerate().tolist()]


@pytest.mark.parametrize("name", SPACES)
def test_the_listing_is_that_of_a_brute_force(name):
    check_against_brute_force(SPACES[name])


_NAMES = ("skip", "conv3", "conv3@0.5", "maxpool3", "dwconv3", "avgpool", "avgpool5")


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=2, unique=True), st.sampled_from(["required", "any"]))
def test_any_set_of_kinds(names, direct):
    check_against_brute_force(CellSpace(operations=("zero", *names), direct=direct))


def test_sizes_are_the_short_way():
    space = CellSpace(operations=("zero", "skip", "conv3", "conv5", "avgpool"))
    assert space == CellSpace((3, 5)) == CellSpace(kernel_sizes=(3, 5), operations=space.operations)
    assert hash(space) == hash(CellSpace((3, 5)))
    assert space.kernel_sizes == (3, 5)
    assert repr(space) == "CellSpace(kernel_sizes=(3, 5))"
    assert THRESHOLDS.kernel_sizes == ()
    assert CellSpace(operations=("zero", "conv3@1")).operations == ("zero", "conv3@1.0")  # as it is written best


def test_raw_rows_by_number():
    raw = THRESHOLDS.from_index(np.arange(5**6))
    assert len(raw) == 15_625
    assert (THRESHOLDS.index(raw) == np.arange(5**6)).all()
    assert THRESHOLDS.from_index(0).tolist() == [0] * 6
    assert THRESHOLDS.from_index(3 * 5**5 + 4).tolist() == [3, 0, 0, 0, 0, 4]
    assert int(THRESHOLDS.index([3, 0, 0, 0, 0, 4])) == 3 * 5**5 + 4
    there = THRESHOLDS.connected(raw)
    assert (there == THRESHOLDS.is_valid(raw)).all()
    assert there.sum() == len(cells_of(THRESHOLDS))
    looped = CellSpace(feedback=True)
    assert (looped.index(looped.from_index([5**12 - 1, 17])) == [5**12 - 1, 17]).all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 5**6 - 1), st.integers(0, 2**31))
def test_a_space_without_a_direct_edge(number, seed):
    row = THRESHOLDS.from_index(number)
    if not THRESHOLDS.connected(row)[0]:
        with pytest.raises(ValueError, match="no path leads from node 0 to node 3"):
            THRESHOLDS.validate(row)
        return
    canonical, changed = THRESHOLDS.canonical(row), THRESHOLDS.mutate(jax.random.key(seed), row)
    assert np.array_equal(THRESHOLDS.parse(THRESHOLDS.format(row)), row)
    assert np.array_equal(THRESHOLDS.canonical(canonical), canonical)
    assert THRESHOLDS.is_valid(changed).all()
    assert not np.array_equal(changed, canonical)


def test_samples_of_a_space_without_a_direct_edge():
    rows = THRESHOLDS.sample(jax.random.key(0), 200)
    assert THRESHOLDS.is_valid(rows).all()
    assert (rows[:, 3] == 0).any()


def test_a_space_whose_neighbours_are_far_apart():
    space = CellSpace(operations=("zero", "conv3"))
    start = space.parse("0>3:conv3")  # one edge more leads nowhere
    assert {space.explicit(space.mutate(jax.random.key(i), start)) for i in range(20)} >= {
        "0>2:conv3 0>3:conv3 2>3:conv3"
    }


def test_a_table_of_one_space_serves_another():
    """Canonical rows agree between spaces, wherever skip and average pooling stand."""
    one = CellSpace((1, 3))
    other = CellSpace(operations=("zero", "conv1", "avgpool", "conv3", "skip"))
    moved = other.convert(one.enumerate(), one)
    assert (other.canonical(moved) == moved).all()
    assert set(other.identity(other.enumerate()).tolist()) == set(one.identity(one.enumerate()).tolist())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"operations": ("zero", "cnv3")}, "operation 'cnv3' is unknown: did you mean 'conv3'"),
        ({"operations": ("zero", "conv4")}, "operation 'conv4': want odd sizes from 1 to 15"),
        ({"operations": ("zero", "conv17")}, "operation 'conv17': want odd sizes"),
        ({"operations": ("zero", "conv3@0")}, "threshold=0.0 of 'conv3@0.0' must be finite and above 0"),
        ({"operations": ("zero", "conv3~1")}, "tau=1.0 of 'conv3~1.0' must be finite and above 1"),
        ({"operations": ("skip", "conv3")}, "want 'zero' first"),
        ({"operations": ("zero",)}, "want 'zero' first, and up to 126 others"),
        ({"operations": ("zero", "conv3", "conv3")}, "'conv3' is there twice"),
        ({"operations": ("zero", "conv3@1", "conv3@1.0")}, "'conv3@1.0' is there twice"),
        ({"operations": ("zero", "skip", "skip")}, "want one operation of kind 'identity'"),
        ({"operations": "conv3"}, "operations is 'conv3': want a tuple"),
        ({"operations": ("zero", 3)}, "operation 3 is unknown"),
        ({"operations": ("zero", "conv3"), "kernel_sizes": (5,)}, r"operations give \(3,\); leave kernel_sizes out"),
        ({"direct": "never"}, "direct is 'never': want one of required, any"),
        ({"operations": ("zero", "skip", "conv3@0.5"), "max_kernel_sizes": 2}, "want None or an int from 1 to 1"),
    ],
)
def test_space_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        CellSpace(**fields)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: THRESHOLDS.from_index(5**6), "want ints from 0 to 15,624"),
        (lambda: THRESHOLDS.from_index(-1), "want ints from 0"),
        (lambda: THRESHOLDS.from_index(1.5), "want ints from 0"),
        (lambda: THRESHOLDS.index([9, 0, 0, 0, 0, 0]), "is no row of"),
        (lambda: THRESHOLDS.parse("0>3:conv5"), "has conv5 on edge 0>3"),
        (lambda: THRESHOLDS.convert([[0, 0, 0, 2, 0, 0]], CellSpace((3,))), "the rows use conv3"),
        (lambda: CellSpace(operations=("zero", "skip")).mutate(0, [0, 0, 0, 1, 0, 0]), "want one key"),
    ],
)
def test_calls_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
