"""When two cells are the same function: pruning, normal forms, and the list of all distinct forward cells.

What "the same function" means, and why the normal form decides it, is proved in `CellSpace.enumerate`.
"""

import functools
import itertools
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells import notation

FORWARD_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
FEEDBACK_EDGES = ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2))
EDGES = FORWARD_EDGES + FEEDBACK_EDGES
DIRECT = FORWARD_EDGES.index((0, 3))

ZERO, SKIP, FIRST_CONV = 0, 1, 2

Rows = NDArray[np.int8]
Row = tuple[int, ...]


def prune(rows: Rows, edges: tuple[tuple[int, int], ...]) -> Rows:
    """Rows [n, E] without the edges of nodes that are not on a path from node 0 to node 3."""
    source, target = np.array(edges).T
    joined = np.zeros((len(rows), notation.NODES, notation.NODES), bool)
    joined[:, source, target] = rows != ZERO
    reached = np.arange(notation.NODES) == np.zeros((len(rows), 1), int)
    reaching = np.arange(notation.NODES) == np.full((len(rows), 1), notation.NODES - 1)
    for _ in range(notation.NODES - 1):
        reached = reached | (joined & reached[:, :, None]).any(axis=1)
        reaching = reaching | (joined & reaching[:, None, :]).any(axis=2)
    live = reached & reaching
    return np.where(live[:, source] & live[:, target], rows, np.int8(ZERO))


def _form(row: Row, avgpool: int) -> tuple[Any, ...]:
    """The normal form of a pruned forward row: equal for two rows if and only if they are the same function.

    A node's value is a polynomial, a count for each (convolution, power of average pooling). The form lists
    each convolution's size and argument, then the output, with convolutions numbered. Of the numberings we
    take the one that makes the form smallest; only convolutions that look alike with all numbers hidden can
    trade places.
    """
    values: list[Counter[tuple[int, int]]] = [Counter({(-1, 0): 1})]
    arguments: dict[int, Counter[tuple[int, int]]] = {}
    for node in range(1, notation.NODES):
        value: Counter[tuple[int, int]] = Counter()
        for i, (source, target) in enumerate(FORWARD_EDGES):
            if target != node or row[i] == ZERO:
                continue
            if FIRST_CONV <= row[i] < avgpool:
                arguments[i] = values[source]
                value[i, 0] += 1
            else:
                for (term, power), count in values[source].items():
                    value[term, power + (row[i] == avgpool)] += count
        values.append(value)

    looks: dict[int, tuple[Any, ...]] = {-1: ()}
    for i in sorted(arguments, key=lambda i: FORWARD_EDGES[i][0]):
        terms = sorted((looks[term], power, count) for (term, power), count in arguments[i].items())
        looks[i] = (row[i], *terms)
    order = sorted(arguments, key=lambda i: looks[i])
    alike = [list(group) for _, group in itertools.groupby(order, key=lambda i: looks[i])]

    def numbered(arrangement: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
        chosen = list(itertools.chain.from_iterable(arrangement))
        number = {-1: -1} | {i: place for place, i in enumerate(chosen)}

        def written(value: Counter[tuple[int, int]]) -> tuple[Any, ...]:
            return tuple(sorted((number[term], power, count) for (term, power), count in value.items()))

        return (*((row[i], written(arguments[i])) for i in chosen), written(values[-1]))

    return min(numbered(a) for a in itertools.product(*map(itertools.permutations, alike)))


def most_alive(row: Row, first: int) -> int:
    """Values alive at a forward cell's worst moment, of nodes from `first` on: one is summed up, others still read."""
    used = [edge for edge, code in zip(FORWARD_EDGES, row, strict=True) if code != ZERO]

    def beside(node: int) -> int:
        return len({source for source, target in used if first <= source < node <= target})

    return 1 + max(beside(node) for node in range(1, notation.NODES))


@functools.cache
def classes(counts: tuple[int, ...]) -> dict[Row, Row]:
    """The canonical row of each pruned forward row with `counts[i]` convolutions of its i-th size.

    Equal cells hold the same convolutions, so each table is closed. Codes run 0 zero, 1 skip, 2 on the
    sizes in use, then average pooling.
    """
    avgpool = FIRST_CONV + len(counts)
    grid = np.indices((avgpool + 1,) * len(FORWARD_EDGES), np.int8).reshape(len(FORWARD_EDGES), -1).T
    grid = grid[grid[:, DIRECT] != ZERO]
    for code, count in enumerate(counts, FIRST_CONV):
        grid = grid[(grid == code).sum(axis=1) == count]
    grid = grid[(prune(grid, FORWARD_EDGES) == grid).all(axis=1)]

    def cost(row: Row) -> tuple[int, int, int, int, int, Row]:
        reads = {edge[0] for edge, code in zip(FORWARD_EDGES, row, strict=True) if FIRST_CONV <= code < avgpool}
        edges = len(FORWARD_EDGES) - row.count(ZERO)
        return len(reads), most_alive(row, 0), most_alive(row, 1), row.count(avgpool), edges, row

    forms = {row: _form(row, avgpool) for row in map(tuple, grid.tolist())}
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(forms, key=cost):
        best.setdefault(forms[row], row)
    return {row: best[form] for row, form in forms.items()}


@functools.cache
def distinct(sizes: int, limit: int) -> Rows:
    """Canonical rows of all distinct forward cells with at most `limit` of `sizes` kernel sizes, sorted."""
    rows = []
    for used in range(min(limit, len(FORWARD_EDGES)) + 1):
        for counts in itertools.product(range(1, len(FORWARD_EDGES) + 1), repeat=used):
            if sum(counts) > len(FORWARD_EDGES):
                continue
            local = np.array(sorted(set(classes(counts).values())), np.int8).reshape(-1, len(FORWARD_EDGES))
            for codes in itertools.combinations(range(FIRST_CONV, FIRST_CONV + sizes), used):
                rows.append(np.array([ZERO, SKIP, *codes, FIRST_CONV + sizes], np.int8)[local])
    listed = np.concatenate(rows)
    listed = listed[np.lexsort(listed.T[::-1])]
    listed.flags.writeable = False
    return listed
