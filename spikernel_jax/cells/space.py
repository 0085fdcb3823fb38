"""The space of cells: which of them are the same, all of them, some of them, and the neighbours of one.

Sources: Kim et al., ECCV 2022, arXiv 2201.10355 (cells, sampler); Putra & Shafique, 2025, arXiv 2404.01685 (kernel
sets).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spikernel_jax.cells import canonical as forms
from spikernel_jax.cells.canonical import DIRECT, EDGES, FORWARD_EDGES, NOTHING, Rows
from spikernel_jax.cells.encoding import Encoding, is_int, one
from spikernel_jax.cells.kernels import Kernel, kernel_of, operation_of
from spikernel_jax.operations.operation import GENERIC

_EXCHANGED = (0, 2, 1, 3)
# Exchanging nodes 1 and 2 moves column _SWAP[i] of a row to column i.
_SWAP = [EDGES.index((_EXCHANGED[source], _EXCHANGED[target])) for source, target in EDGES]
_BETWEEN = [EDGES.index((1, 2)), EDGES.index((2, 1))]


@dataclass(frozen=True, repr=False)
class CellSpace(Encoding):
    """Cells whose edges hold the given operations.

    A row holds one int8 code an edge, in the order of `edges`: the operation's place in `operations`. With kernel sizes
    alone these are 0 zero, 1 skip, 2 to n+1 the convolution with `kernel_sizes[code - 2]`, n+2 average pooling, for n
    sizes; with sizes (1, 3) these are SNASNet's codes. In a feedback space each unordered pair of nodes carries a
    forward edge, a feedback edge, or none.

    Attributes:
      kernel_sizes: odd sizes up to 15 in increasing order. Where `operations` are given, those among them.
      feedback: whether a later node may feed an earlier one at the next time step.
      max_kernel_sizes: how many different sizes, or generic operations, one cell may use; None is no limit.
      operations: names of what an edge may hold, ``"zero"`` first: registered ones, or of a family
        (`operations.builtin`). None given are zero, skip, a convolution of each size, and average pooling.
      direct: ``"required"`` if edge (0, 3) may not be zero (SNASNet), ``"any"`` if it may, as long as some path leads
        from node 0 to node 3.

    Raises:
      ValueError: naming the field, its value, and what would be right.

    Example:
      >>> from spikernel_jax import CellSpace
      >>> space = CellSpace(kernel_sizes=(3, 5))
      >>> len(space.enumerate())  # distinct cells, of 12,500 rows
      4243
      >>> row = space.parse("0>1:conv5 0>2:conv3 0>3:skip 1>3:conv3")
      >>> space.explicit(space.canonical(row))  # node 2 led nowhere; nodes 1 and 2 are alike
      '0>2:conv5 0>3:skip 2>3:conv3'
      >>> thresholds = CellSpace(operations=("zero", "skip", "conv3@0.5", "conv3@1.0"), direct="any")
      >>> thresholds.explicit(thresholds.from_index(4**5))
      Traceback (most recent call last):
          ...
      ValueError: row [1, 0, 0, 0, 0, 0] is no cell of ...: no path leads from node 0 to node 3
    """

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What its generic operations are, in the order of `operations`."""
        return tuple(kernel_of(self.operations[code]) for code in self.codes_of(GENERIC))

    def restricted(self, kernels: Sequence[Kernel]) -> "CellSpace":
        """The space without the generic operations that are not named, and without a limit of how many.

        Raises:
          ValueError: if one that is named is not here, or nothing is left.
        """
        kept = {self.code(operation_of(kernel)) for kernel in kernels}
        dropped = {*self.codes_of(GENERIC)} - kept
        names = tuple(name for code, name in enumerate(self.operations) if code not in dropped)
        return CellSpace(feedback=self.feedback, operations=names, direct=self.direct)

    def prune(self, rows: ArrayLike) -> Rows:
        """Drops, with all its edges, every node that node 0 does not reach or that does not reach node 3.

        Paths run over forward and feedback edges alike. A node that does not reach node 3 is never read,
        and one that node 0 does not reach is zero, but for the constants that batch norm would make of it:
        SNASNet drops both.

        Args:
          rows: ints [n, E] or [E].

        Returns:
          int8 rows of the same shape.
        """
        self.validate(rows)
        return forms.prune(self.shaped(rows), self.edges).reshape(np.shape(rows))

    def canonical(self, rows: ArrayLike) -> Rows:
        """The one row that stands for all cells computing the same function.

        Two forward cells share it if and only if they are the same function for every assignment of
        functions to their generic edges (convolutions), up to one fixed renaming of edges of the same operation (an
        edge owns its parameters, and one edge read twice is not two edges), with each linear operation (average
        pooling) a fixed linear map and skip the identity.
        Of the equal rows the cheapest is taken: fewest nodes read through a LIF, then fewest values alive at once,
        so that no equal row takes less memory (`cost.costs`, with shortcuts of membranes), then fewest average
        poolings or other linear operations, then fewest edges, then a fixed order. The convolutions used, and so
        parameters and LIF
        layers, are the same for all of them.

        A feedback cell obeys, with y_i a node's value and D the delay by one step, `y_j = sum_{i<j}
        e_ij(y_i) + sum_{i>j} D e_ij(y_i)`. Nodes 1 and 2 can be exchanged whenever no edge joins them:
        otherwise an instant edge would have to become a delayed one, or the reverse. The smaller of the two
        rows is taken. Equal canonical rows are equal cells; with feedback the converse is not claimed,
        because skips around a loop are left alone. A cell that uses no feedback edge is reduced as a
        forward cell.

        Args:
          rows: ints [n, E] or [E].

        Returns:
          int8 rows of the same shape, each valid and pruned.
        """
        pruned = self.prune(rows)
        flat = pruned.reshape(-1, len(self.edges))
        out = flat.copy()
        looped = flat[:, len(FORWARD_EDGES) :].any(axis=1)
        plain, inverse = np.unique(flat[~looped, : len(FORWARD_EDGES)], axis=0, return_inverse=True)
        reduced = [forms.canonical_forward(tuple(row), self.codes) for row in plain.tolist()]
        unique = np.array(reduced, np.int8).reshape(-1, len(FORWARD_EDGES))
        out[~looped, : len(FORWARD_EDGES)] = unique[inverse.ravel()]
        if looped.any():
            here = flat[looped]
            swapped = here[:, _SWAP]
            column = np.argmax(here != swapped, axis=1)[:, None]
            smaller = np.take_along_axis(swapped, column, 1) < np.take_along_axis(here, column, 1)
            free = ~here[:, _BETWEEN].any(axis=1, keepdims=True)
            out[looped] = np.where(free & smaller, swapped, here)
        return out.reshape(pruned.shape)

    def enumerate(self) -> Rows:
        """Lists every distinct forward cell.

        One kernel set of two sizes has 12,500 raw rows, 7,556 once pruned and **4,243** distinct cells; the
        union of the six pairs of (1, 3, 5, 7) has 33,150 and **20,005**. Two looser readings give other
        figures. Comparing cells as trees of terms, with no name for a convolution, gives 4,197 and 19,582,
        but is wrong in both directions. It merges different functions: `0>1:conv3 1>2:skip 1>3:skip
        2>3:skip 0>3:skip` is x + 2c(x), one convolution read twice, and `0>1:conv3 0>2:conv3 1>3:skip
        2>3:skip 0>3:skip` is x + c(x) + c'(x), with twice the parameters and LIF layers. And it separates
        equal ones: average pooling, zero padded and always divided by nine, is linear, A(a + b) = A(a) +
        A(b). Naming convolutions alone gives 4,393 and 20,422; linearity then merges 150 and 417 of these.

        Proof that the form behind the count is exact. Every node is a sum of terms A^p c_e(...) or A^p x
        with multiplicity, because skip, sums and A are linear: equal forms are equal functions in exact
        arithmetic. (With several linear operations, words of them stand where A^p does: they
        need not commute.) Conversely, give each convolution a generic function: its values at different arguments
        are then independent, the powers of A are independent operators, and every multiplicity is positive
        so nothing cancels; reading the output inwards, equal functions force equal forms up to the names of
        the convolutions of each size.

        As networks slightly fewer differ, 4,223 of one set's 4,243: the batch norm behind a cell takes the scale out of
        its output, so x and 2x, two cells, are one network.

        Returns:
          int8 [n_cells, 6], canonical rows in lexicographic order; read-only, computed once.

        Raises:
          ValueError: the space has feedback edges and is too large to list.
        """
        if self.feedback:
            ops = self.num_ops - 1
            rows = (ops if self.direct == "required" else 1 + 2 * ops) * (1 + 2 * ops) ** 5
            raise ValueError(
                f"{self} is too large to list, with {rows:,} raw rows: use sample and mutate, or feedback=False"
            )
        return forms.distinct(self.codes, self.max_kernel_sizes or self.num_ops)

    def sample(self, key: Any, n: int) -> Rows:
        """Draws cells as SNASNet does: every edge's code uniform, then pruned and canonicalised.

        Edge (0, 3) is uniform over the codes other than zero, unless ``direct="any"``. With feedback every other pair
        of nodes draws a direction, then a code. A draw that is no cell of this space is drawn again.
        Repeats are kept. Row i depends on the key and on i alone, so a longer sample begins with the
        shorter one.

        Args:
          key: one jax random key.
          n: number of rows, at least 0.

        Returns:
          int8 [n, E].
        """
        if not is_int(n) or n < 0:
            raise ValueError(f"n is {n!r}: want an int of at least 0")
        words = _key_words(key)
        rows = [self._draw(np.random.default_rng([*words, i])) for i in range(n)]
        return self.canonical(np.array(rows, np.int8).reshape(n, len(self.edges)))

    def mutate(self, key: Any, row: ArrayLike) -> Rows:
        """Changes one edge of a cell so that it becomes another cell.

        The change is uniform over all changes of one pair of nodes of the canonical row (another operation,
        or another direction) that give a cell of this space with another canonical form. Where there is none, as where
        convolutions alone can be held, two pairs change, or three.

        Args:
          key: one jax random key.
          row: ints [E].

        Returns:
          int8 [E], canonical.

        Raises:
          ValueError: if the space has no other cell.
        """
        start = self.canonical(one(row))
        candidates = start[None]
        for _ in range(len(FORWARD_EDGES)):
            candidates = np.unique(self._neighbours(candidates), axis=0)
            cells = self.canonical(candidates[self.is_valid(candidates)])
            cells = cells[(cells != start).any(axis=1)]
            if len(cells):
                return cells[np.random.default_rng(_key_words(key)).integers(len(cells))]
        raise ValueError(f"{self} has no cell but {self.explicit(start)!r}: want more operations")

    def _neighbours(self, rows: Rows) -> Rows:
        """All rows that differ from one of rows [n, E] in what one pair of nodes holds, and those themselves."""
        changed = []
        for i, (source, target) in enumerate(FORWARD_EDGES):
            columns = [i, EDGES.index((target, source))] if self.feedback else [i]
            for column, code in itertools.product(columns, range(self.num_ops)):
                other = rows.copy()
                other[:, columns] = NOTHING
                other[:, column] = code
                changed.append(other)
        return np.concatenate(changed)

    def _draw(self, rng: np.random.Generator) -> Rows:
        while True:
            row = np.zeros(len(self.edges), np.int8)
            row[: len(FORWARD_EDGES)] = rng.integers(self.num_ops, size=len(FORWARD_EDGES))
            if self.direct == "required":
                row[DIRECT] = rng.integers(NOTHING + 1, self.num_ops)
            if self.feedback:
                for i in np.flatnonzero(rng.integers(2, size=len(FORWARD_EDGES))).tolist():
                    if i != DIRECT:
                        source, target = FORWARD_EDGES[i]
                        row[EDGES.index((target, source))] = row[i]
                        row[i] = NOTHING
            if self.is_valid(row)[0]:
                return row


def _key_words(key: Any) -> list[int]:
    """The words of one jax random key, as a seed for numpy."""
    import jax  # kept out of module import: cells are read and printed without an array library

    typed = isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.ndim:
        raise ValueError(f"key is {key!r}: want one key, such as jax.random.key(0)")
    return np.asarray(jax.random.key_data(key)).ravel().tolist()
