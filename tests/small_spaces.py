"""Spaces and their cells, listed and drawn; what a cell computes, by hand."""

import itertools
import random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from spikernel_jax.cells.canonical import EDGES, FORWARD_EDGES
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
