import itertools
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convolutions import conv_edges
from spikernel_jax.cells.canonical import EDGES, FEEDBACK_EDGES, FORWARD_EDGES
from spikernel_jax.cells.space import CellSpace

ONE_SET = CellSpace((1, 3))
UNION = CellSpace((1, 3, 5, 7), max_kernel_sizes=2)
LOOPED = CellSpace((1, 3), feedback=True)
WIDE_LOOPED = CellSpace((1, 3, 5, 7), feedback=True, max_kernel_sizes=2)
SPACES = [ONE_SET, UNION, LOOPED, WIDE_LOOPED]

PRIME = 2**61 - 1
_RANDOM = random.Random(7)
X, POOL = _RANDOM.randrange(PRIME), _RANDOM.randrange(PRIME)
WEIGHTS = [(_RANDOM.randrange(PRIME), _RANDOM.randrange(PRIME)) for _ in range(200)]
CONVS = {name: 20 * i for i, name in enumerate(f"conv{k}" for k in range(1, 17, 2))}


def live_edges(cell):
    """The edges of a forward cell that lie on a path from node 0 to node 3, by listing the paths."""
    paths = [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]]
    return {edge for path in paths if all(step in cell for step in path) for edge in path}


def output(cell, weights, linear=True):
    """Node 3 modulo a large prime; a convolution is a random polynomial without constant term."""
    x = [X, 0, 0, 0]
    for edge in FORWARD_EDGES:
        name, v = cell.get(edge), x[edge[0]]
        if name is None:
            continue
        if name == "avgpool" and not linear:
            v = POOL * v**3
        elif name == "avgpool":
            v = POOL * v
        elif name != "skip":
            w, u = weights[edge]
            v = (w * v + u) * v * v
        x[edge[1]] = (x[edge[1]] + v) % PRIME
    return x[3]


def namings(cell):
    """Every way to hand each size's weights out to the convolutions of that size."""
    groups = {}
    for edge, name in cell.items():
        if name.startswith("conv"):
            groups.setdefault(name, []).append(edge)
    for choice in itertools.product(*(itertools.permutations(range(len(g))) for g in groups.values())):
        yield {
            edge: WEIGHTS[CONVS[name] + i]
            for (name, group), places in zip(groups.items(), choice, strict=True)
            for edge, i in zip(group, places, strict=True)
        }


def fingerprint(cell, named, linear):
    """A number equal for cells that are the same function: own weights if named, else one for a size."""
    cell = {edge: cell[edge] for edge in FORWARD_EDGES if edge in live_edges(cell)}
    if not named:
        return output(cell, {edge: WEIGHTS[CONVS.get(name, 0)] for edge, name in cell.items()}, linear)
    return min(output(cell, weights, linear) for weights in namings(cell))


def raw_cells(space):
    """Every row with edge (0, 3) set, with its cell."""
    for row in itertools.product(range(space.num_ops), repeat=6):
        if row[3]:
            yield (
                row,
                {e: space.operations[c] for e, c in zip(FORWARD_EDGES, row, strict=True) if c},
            )


def cell_of(space, row):
    return {e: space.operations[c] for e, c in zip(space.edges, row.tolist(), strict=True) if c}


def simulate(cell, weights, steps=4):
    """Node 3 at each step of the feedback recurrence; a convolution keeps a state, as its neurons do."""
    state = dict.fromkeys(EDGES, 0)

    def send(source, target, v):
        name = cell.get((source, target), "zero")
        if name.startswith("conv"):
            w, u = weights[source, target]
            state[source, target] = s = (3 * state[source, target] + v) % PRIME
            return (w * s + u) * s * s % PRIME
        return {"zero": 0, "skip": v, "avgpool": POOL * v}[name] % PRIME

    f0 = f1 = f2 = 0
    seen = []
    for t in range(steps):
        y0 = X + t * t + f0
        y1 = send(0, 1, y0) + f1
        y2 = send(0, 2, y0) + send(1, 2, y1) + f2
        y3 = (send(0, 3, y0) + send(1, 3, y1) + send(2, 3, y2)) % PRIME
        f0 = send(1, 0, y1) + send(2, 0, y2) + send(3, 0, y3)
        f1, f2 = send(2, 1, y2) + send(3, 1, y3), send(3, 2, y3)
        seen.append(y3)
    return seen


@st.composite
def spaces(draw, feedback=None):
    sizes = draw(st.lists(st.sampled_from(range(1, 16, 2)), min_size=1, max_size=4, unique=True))
    limit = draw(st.none() | st.integers(1, len(sizes)))
    return CellSpace(tuple(sorted(sizes)), draw(st.booleans()) if feedback is None else feedback, limit)


@st.composite
def spaces_and_rows(draw, feedback=None):
    space = draw(spaces(feedback))
    codes = st.integers(0, space.num_ops - 1)
    row = np.zeros(len(space.edges), np.int8)
    for i, (source, target) in enumerate(FORWARD_EDGES):
        back = space.feedback and i != 3 and draw(st.booleans())
        column = EDGES.index((target, source)) if back else i
        row[column] = draw(st.integers(1, space.num_ops - 1) if i == 3 else codes)
    if not space.is_valid(row)[0]:
        row[(row > 2) & (row < space.code("avgpool"))] = 2
    return space, row


properties = settings(derandomize=True, deadline=None, max_examples=60)


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


def test_distinct_cells_of_the_union():
    exact, trees = set(), set()
    for _, cell in raw_cells(UNION):
        live = {edge: cell[edge] for edge in live_edges(cell)}
        if len({name for name in live.values() if name.startswith("conv")}) <= 2:
            exact.add(fingerprint(cell, named=True, linear=True))
            trees.add(fingerprint(cell, named=False, linear=False))
    assert len(exact) == len(UNION.enumerate()) == 20_005
    assert len(trees) == 19_582


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


@properties
@given(spaces_and_rows())
def test_parse_reads_what_format_writes(case):
    space, row = case
    assert np.array_equal(space.parse(space.format(row)), row)
    assert np.array_equal(space.parse(space.explicit(row)), row)
    assert space.parse(space.format(row)).dtype == np.int8


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
    ("text", "edges"),
    [
        (
            "0303 0030 2002 0200",
            "0>1:conv3 1>2:conv3 0>3:conv3 2>3:conv1 2>0:conv1 3>1:conv1",
        ),
        ("0003 0000 0000 0000", "0>3:conv3"),
        ("0142 0030 0004 0000", "0>1:skip 0>2:avgpool 1>2:conv3 0>3:conv1 2>3:avgpool"),
    ],
)
def test_golden_notation(text, edges):
    row = LOOPED.parse(text)
    assert LOOPED.explicit(row) == edges
    assert LOOPED.format(row) == text
    assert np.array_equal(LOOPED.parse(edges), row)
    assert WIDE_LOOPED.explicit(WIDE_LOOPED.parse(text)) == WIDE_LOOPED.format(WIDE_LOOPED.parse(text)) == edges


def test_golden_row():
    assert LOOPED.parse("0303 0030 2002 0200").tolist() == [3, 0, 3, 3, 0, 2, 0, 2, 0, 0, 2, 0]
    assert UNION.parse("0>3:conv7 0>1:avgpool").tolist() == [6, 0, 0, 5, 0, 0]
    assert conv_edges(UNION, UNION.parse("0>3:conv7 0>1:conv5")) == [(0, 1, 5), (0, 3, 7)]


@pytest.mark.parametrize(
    ("space", "text", "match"),
    [
        (ONE_SET, "", "is empty"),
        (ONE_SET, None, "must be text"),
        (ONE_SET, "0303 0030 2002 0200", "feedback edge 2>0"),
        (ONE_SET, "0003 0000 0000", "four words of four digits"),
        (ONE_SET, "0003 0000 0000 000", "four words of four digits"),
        (ONE_SET, "0005 0000 0000 0000", "digit 5"),
        (ONE_SET, "1003 0000 0000 0000", "node 0 to itself: the diagonal"),
        (ONE_SET, "0300 0003 0000 0000", "edge 0>3 must not be zero"),
        (ONE_SET, "0>1:skip 1>3:skip", "edge 0>3 must not be zero"),
        (ONE_SET, "0>3:skip 0>3:conv1", "0>3 twice"),
        (ONE_SET, "0>3:skip 1>1:conv1", "node 1 to itself"),
        (ONE_SET, "0>3:maxpool", "operation 'maxpool' is unknown: did you mean 'maxpool3'"),
        (ONE_SET, "0>4:skip", "'0>4:skip'"),
        (ONE_SET, "0>3:conv5", "has conv5 on edge 0>3"),
        (CellSpace((5, 7)), "0003 0000 0000 0000", "has conv3 on edge 0>3"),
        (CellSpace((3,)), "0002 0000 0000 0000", "has conv1 on edge 0>3"),
        (LOOPED, "0303 3000 0000 0000", "not both directions"),
        (UNION, "0>3:conv1 0>1:conv3 1>3:conv5", "at most 2 different sizes"),
    ],
)
def test_parse_refuses(space, text, match):
    with pytest.raises(ValueError, match=match):
        space.parse(text)


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
