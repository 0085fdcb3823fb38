"""When two cells are the same function: pruning, normal forms, and the list of all distinct forward cells.

What "the same function" means, and why the normal form decides it, is proved in `CellSpace.enumerate`.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells import notation
from spikernel_jax.operations.operation import GENERIC, IDENTITY, LINEAR

FORWARD_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
FEEDBACK_EDGES = ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2))
EDGES = FORWARD_EDGES + FEEDBACK_EDGES
DIRECT = FORWARD_EDGES.index((0, 3))

NOTHING = 0  # the code of no edge, in every space

Rows = NDArray[np.int8]
Row = tuple[int, ...]


class Codes(NamedTuple):
    """What the codes of a space stand for, as far as functions and their price go."""

    kinds: tuple[str, ...]  # of each code
    neurons: tuple[int, ...]  # of each code: which LIF it reads through, -1 for none
    direct: bool  # whether edge (0, 3) must hold something


def prune(rows: Rows, edges: tuple[tuple[int, int], ...]) -> Rows:
    """Rows [n, E] without the edges of nodes that are not on a path from node 0 to node 3."""
    source, target = np.array(edges).T
    joined = np.zeros((len(rows), notation.NODES, notation.NODES), bool)
    joined[:, source, target] = rows != NOTHING
    reached = np.arange(notation.NODES) == np.zeros((len(rows), 1), int)
    reaching = np.arange(notation.NODES) == np.full((len(rows), 1), notation.NODES - 1)
    for _ in range(notation.NODES - 1):
        reached = reached | (joined & reached[:, :, None]).any(axis=1)
        reaching = reaching | (joined & reaching[:, None, :]).any(axis=2)
    live = reached & reaching
    return np.where(live[:, source] & live[:, target], rows, np.int8(NOTHING))


def connected(rows: Rows, edges: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    """Which of rows [n, E] have a path from node 0 to node 3: bool [n]."""
    return (prune(rows, edges) != NOTHING).any(axis=1)


def _form(row: Row, kinds: Sequence[str]) -> tuple[Any, ...]:
    """The normal form of a pruned forward row: equal for two rows if and only if they are the same function.

    A node's value is a polynomial, a count for each (generic operation, word of linear ones that follow it). The form
    lists each generic operation's code and argument, then the output, with generic operations numbered. Of the
    numberings we take the one that makes the form smallest; only operations that look alike with all numbers hidden can
    trade places.
    """
    values: list[Counter[tuple[int, Row]]] = [Counter({(-1, ()): 1})]
    arguments: dict[int, Counter[tuple[int, Row]]] = {}
    for node in range(1, notation.NODES):
        value: Counter[tuple[int, Row]] = Counter()
        for i, (source, target) in enumerate(FORWARD_EDGES):
            if target != node or row[i] == NOTHING:
                continue
            if kinds[row[i]] == GENERIC:
                arguments[i] = values[source]
                value[i, ()] += 1
            else:
                letter = (row[i],) if kinds[row[i]] == LINEAR else ()
                for (term, word), count in values[source].items():
                    value[term, word + letter] += count
        values.append(value)

    looks: dict[int, tuple[Any, ...]] = {-1: ()}
    for i in sorted(arguments, key=lambda i: FORWARD_EDGES[i][0]):
        terms = sorted((looks[term], word, count) for (term, word), count in arguments[i].items())
        looks[i] = (row[i], *terms)
    order = sorted(arguments, key=lambda i: looks[i])
    alike = [list(group) for _, group in itertools.groupby(order, key=lambda i: looks[i])]

    def numbered(arrangement: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
        chosen = list(itertools.chain.from_iterable(arrangement))
        number = {-1: -1} | {i: place for place, i in enumerate(chosen)}

        def written(value: Counter[tuple[int, Row]]) -> tuple[Any, ...]:
            return tuple(sorted((number[term], word, count) for (term, word), count in value.items()))

        return (*((row[i], written(arguments[i])) for i in chosen), written(values[-1]))

    return min(numbered(a) for a in itertools.product(*map(itertools.permutations, alike)))


def most_alive(row: Row, first: int) -> int:
    """Values alive at a forward cell's worst moment, of nodes from `first` on: one is summed up, others still read."""
    used = [edge for edge, code in zip(FORWARD_EDGES, row, strict=True) if code != NOTHING]

    def beside(node: int) -> int:
        return len({source for source, target in used if first <= source < node <= target})

    return 1 + max(beside(node) for node in range(1, notation.NODES))


@functools.cache
def classes(counts: tuple[int, ...], codes: Codes) -> dict[Row, Row]:
    """The canonical row of each pruned forward row with `counts[i]` edges of the i-th generic operation.

    Equal cells hold the same generic operations, so each table is closed. The codes are zero, the identity if there is
    one, the generic operations in use, then the linear ones.
    """
    kinds, neurons = codes.kinds, codes.neurons
    grid = np.indices((len(kinds),) * len(FORWARD_EDGES), np.int8).reshape(len(FORWARD_EDGES), -1).T
    for code, count in zip((i for i, kind in enumerate(kinds) if kind == GENERIC), counts, strict=True):
        grid = grid[(grid == code).sum(axis=1) == count]
    grid = grid[connected(grid, FORWARD_EDGES) if not codes.direct else grid[:, DIRECT] != NOTHING]
    grid = grid[(prune(grid, FORWARD_EDGES) == grid).all(axis=1)]

    def cost(row: Row) -> tuple[int, int, int, int, int, Row]:
        reads = {(edge[0], neurons[code]) for edge, code in zip(FORWARD_EDGES, row, strict=True) if neurons[code] >= 0}
        edges = len(FORWARD_EDGES) - row.count(NOTHING)
        linear = sum(kinds[code] == LINEAR for code in row)
        return len(reads), most_alive(row, 0), most_alive(row, 1), linear, edges, row

    forms = {row: _form(row, kinds) for row in map(tuple, grid.tolist())}
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(forms, key=cost):
        best.setdefault(forms[row], row)
    return {row: best[form] for row, form in forms.items()}


def _local(codes: Codes, used: Row) -> tuple[Row, Codes]:
    """Codes of a space's operations but for generic ones not in use, in the order of `classes`, and what they are.

    Only the order of the generic operations in use matters, and which of them share a LIF, so spaces share tables.
    """
    by_kind = {kind: [c for c, k in enumerate(codes.kinds) if k == kind] for kind in (IDENTITY, LINEAR)}
    kept = (NOTHING, *by_kind[IDENTITY], *used, *by_kind[LINEAR])
    numbers: dict[int, int] = {-1: -1}
    neurons = tuple(numbers.setdefault(codes.neurons[code], len(numbers) - 1) for code in kept)
    return kept, Codes(tuple(codes.kinds[code] for code in kept), neurons, codes.direct)


def canonical_forward(row: Row, codes: Codes) -> Row:
    """The canonical row of a pruned forward row."""
    used = tuple(sorted({code for code in row if codes.kinds[code] == GENERIC}))
    kept, local = _local(codes, used)
    table = classes(tuple(row.count(code) for code in used), local)
    return tuple(kept[code] for code in table[tuple(kept.index(code) for code in row)])


@functools.cache
def distinct(codes: Codes, limit: int) -> Rows:
    """Canonical rows of all distinct forward cells with at most `limit` different generic operations, sorted."""
    generic = [code for code, kind in enumerate(codes.kinds) if kind == GENERIC]
    rows = [np.zeros((0, len(FORWARD_EDGES)), np.int8)]
    for used in range(min(limit, len(generic), len(FORWARD_EDGES)) + 1):
        for counts in itertools.product(range(1, len(FORWARD_EDGES) + 1), repeat=used):
            if sum(counts) > len(FORWARD_EDGES):
                continue
            for chosen in itertools.combinations(generic, used):
                kept, local = _local(codes, chosen)
                rows.append(np.array(kept, np.int8)[_canonical(counts, local)])
    listed = np.concatenate(rows)
    listed = listed[np.lexsort(listed.T[::-1])]
    listed.flags.writeable = False
    return listed


@functools.cache
def _canonical(counts: tuple[int, ...], codes: Codes) -> Rows:
    """The distinct canonical rows of `classes`."""
    return np.array(sorted(set(classes(counts, codes).values())), np.int8).reshape(-1, len(FORWARD_EDGES))
