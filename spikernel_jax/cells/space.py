"""The space of cells: encode, check, reduce to a canonical form, list, sample, mutate, read and print.

A cell is a graph on four nodes, node 0 its input and node 3 its output; a node is the sum of what comes in.
`CellSpace` fixes which operations an edge may hold and encodes a cell as a row of int8 codes, one per edge.

Sources: Kim et al., ECCV 2022, arXiv 2201.10355 (cells, sampler, notation); Putra & Shafique, 2025,
arXiv 2404.01685 (kernel sets).
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.cells import canonical as forms
from spikernel_jax.cells import notation
from spikernel_jax.cells.canonical import (
    DIRECT,
    EDGES,
    FIRST_CONV,
    FORWARD_EDGES,
    SKIP,
    ZERO,
    Row,
    Rows,
)

LARGEST_KERNEL = 15

_EXCHANGED = (0, 2, 1, 3)
# Exchanging nodes 1 and 2 moves column _SWAP[i] of a row to column i.
_SWAP = [EDGES.index((_EXCHANGED[source], _EXCHANGED[target])) for source, target in EDGES]
_BETWEEN = [EDGES.index((1, 2)), EDGES.index((2, 1))]


@dataclass(frozen=True)
class CellSpace:
    """Cells whose convolutions have the given kernel sizes.

    A row holds one int8 code an edge, in the order of `edges`: 0 zero, 1 skip, 2 to n+1 the convolution
    with `kernel_sizes[code - 2]`, n+2 average pooling, for n kernel sizes. With sizes (1, 3) these are
    SNASNet's codes. In a feedback space each unordered pair of nodes carries a forward edge, a feedback
    edge, or none.

    Attributes:
      kernel_sizes: odd sizes up to 15 in increasing order.
      feedback: whether a later node may feed an earlier one at the next time step.
      max_kernel_sizes: how many different sizes one cell may use; None is no limit.

    Example:
      >>> from spikernel_jax import CellSpace
      >>> space = CellSpace(kernel_sizes=(3, 5))
      >>> len(space.enumerate())  # distinct cells, of 12,500 rows
      4243
      >>> row = space.parse("0>1:conv5 0>2:conv3 0>3:skip 1>3:conv3")
      >>> space.explicit(space.canonical(row))  # node 2 led nowhere; nodes 1 and 2 are alike
      '0>2:conv5 0>3:skip 2>3:conv3'
    """

    kernel_sizes: tuple[int, ...] = (1, 3)
    feedback: bool = False
    max_kernel_sizes: int | None = None

    def __post_init__(self) -> None:
        """Checks the fields and turns `kernel_sizes` into a tuple of ints."""
        want = f"want odd ints from 1 to {LARGEST_KERNEL} in increasing order, such as (1, 3)"
        if not isinstance(self.kernel_sizes, tuple | list) or not self.kernel_sizes:
            raise ValueError(f"kernel_sizes is {self.kernel_sizes!r}: {want}")
        for size in self.kernel_sizes:
            if not _is_int(size) or size < 1 or size % 2 == 0 or size > LARGEST_KERNEL:
                raise ValueError(f"kernel_sizes is {self.kernel_sizes!r}, with {size!r}: {want}")
        sizes = tuple(int(size) for size in self.kernel_sizes)
        if sizes != tuple(sorted(set(sizes))):
            raise ValueError(f"kernel_sizes is {sizes}: {want}; here {tuple(sorted(set(sizes)))}")
        object.__setattr__(self, "kernel_sizes", sizes)
        if not isinstance(self.feedback, bool):
            raise ValueError(f"feedback is {self.feedback!r}: want True or False")
        limit = self.max_kernel_sizes
        if limit is not None and (not _is_int(limit) or not 1 <= limit <= len(sizes)):
            raise ValueError(f"max_kernel_sizes is {limit!r}: want None or an int from 1 to {len(sizes)}")
        object.__setattr__(self, "max_kernel_sizes", None if limit is None else int(limit))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges `(source, target)` a row encodes, in its order."""
        return EDGES if self.feedback else FORWARD_EDGES

    @property
    def num_ops(self) -> int:
        """How many codes there are: zero, skip, one a kernel size, average pooling."""
        return len(self.kernel_sizes) + 3

    @property
    def avgpool(self) -> int:
        """The code of average pooling, the largest."""
        return len(self.kernel_sizes) + FIRST_CONV

    @property
    def op_names(self) -> tuple[str, ...]:
        """The name of each code."""
        return ("zero", "skip", *(f"conv{size}" for size in self.kernel_sizes), "avgpool")

    def conv_code(self, kernel_size: int) -> int:
        """The code of a convolution. Raises ValueError if the space has no such size."""
        if kernel_size not in self.kernel_sizes:
            raise ValueError(f"kernel size {kernel_size!r} is not in this space: it has {self.kernel_sizes}")
        return FIRST_CONV + self.kernel_sizes.index(kernel_size)

    def kernel_size(self, code: int) -> int | None:
        """The kernel size a code stands for, None for zero, skip and average pooling."""
        if not 0 <= code < self.num_ops:
            raise ValueError(f"code {code!r} is not in this space: want 0 to {self.num_ops - 1}")
        return self.kernel_sizes[code - FIRST_CONV] if FIRST_CONV <= code < self.avgpool else None

    def validate(self, rows: ArrayLike) -> None:
        """Raises ValueError unless every row is a cell of this space.

        A row is a cell if its codes are in range, edge (0, 3) is not zero, no unordered pair of nodes holds
        two edges, and the edges left after `prune` use at most `max_kernel_sizes` sizes.

        Args:
          rows: ints [n, E] or [E], E the number of `edges`.
        """
        checked = self._shaped(rows)
        for wrong, why in self._faults(checked):
            if wrong.any():
                raise ValueError(f"row {checked[np.argmax(wrong)].tolist()} is no cell of {self}: {why}")

    def is_valid(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Which rows are cells of this space: bool [n]. Raises ValueError only for a wrong shape or dtype."""
        checked = self._shaped(rows)
        return ~functools.reduce(np.logical_or, (wrong for wrong, _ in self._faults(checked)))

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
        return forms.prune(self._shaped(rows), self.edges).reshape(np.shape(rows))

    def canonical(self, rows: ArrayLike) -> Rows:
        """The one row that stands for all cells computing the same function.

        Two forward cells share it if and only if they are the same function for every assignment of
        functions to their convolution edges, up to one fixed renaming of edges of the same size (an edge owns
        its parameters, and one edge read twice is not two edges), with average pooling a fixed linear map and
        skip the identity.
        Of the equal rows the cheapest is taken: fewest nodes read through a LIF, then fewest values alive at once,
        so that no equal row takes less memory (`cost.costs`, with shortcuts of membranes), then fewest average
        poolings, then fewest edges, then first in lexicographic order. The convolutions used, and so parameters and LIF
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
        reduced = [self._canonical_forward(tuple(row)) for row in plain.tolist()]
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
        arithmetic. Conversely, give each convolution a generic function: its values at different arguments
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
            ops = len(self.kernel_sizes) + 2
            raise ValueError(
                f"{self} is too large to list, with {ops * (1 + 2 * ops) ** 5:,} raw rows: "
                "use sample and mutate, or feedback=False"
            )
        return forms.distinct(len(self.kernel_sizes), self.max_kernel_sizes or len(self.kernel_sizes))

    def sample(self, key: Any, n: int) -> Rows:
        """Draws cells as SNASNet does: every edge's code uniform, then pruned and canonicalised.

        Edge (0, 3) is uniform over the codes other than zero. With feedback every other pair of nodes draws
        a direction, then a code. A draw with more than `max_kernel_sizes` sizes in use is drawn again.
        Repeats are kept. Row i depends on the key and on i alone, so a longer sample begins with the
        shorter one.

        Args:
          key: one jax random key.
          n: number of rows, at least 0.

        Returns:
          int8 [n, E].
        """
        if not _is_int(n) or n < 0:
            raise ValueError(f"n is {n!r}: want an int of at least 0")
        words = _key_words(key)
        rows = [self._draw(np.random.default_rng([*words, i])) for i in range(n)]
        return self.canonical(np.array(rows, np.int8).reshape(n, len(self.edges)))

    def mutate(self, key: Any, row: ArrayLike) -> Rows:
        """Changes one edge of a cell so that it becomes another cell.

        The change is uniform over all changes of one pair of nodes of the canonical row (another operation,
        or another direction) that give a cell of this space with another canonical form. There always is
        one: edge (0, 3) can turn into a skip, or from a skip into average pooling.

        Args:
          key: one jax random key.
          row: ints [E].

        Returns:
          int8 [E], canonical.
        """
        start = self.canonical(_one(row))
        changed = []
        for i, (source, target) in enumerate(FORWARD_EDGES):
            columns = [i, EDGES.index((target, source))] if self.feedback else [i]
            for column, code in itertools.product(columns, range(self.num_ops)):
                other = start.copy()
                other[columns] = ZERO
                other[column] = code
                changed.append(other)
        candidates = np.unique(np.array(changed), axis=0)
        candidates = self.canonical(candidates[self.is_valid(candidates)])
        candidates = candidates[(candidates != start).any(axis=1)]
        rng = np.random.default_rng(_key_words(key))
        return candidates[rng.integers(len(candidates))]

    def parse(self, text: str) -> Rows:
        """Reads one cell, in either notation, as written: neither pruned nor canonicalised.

        Args:
          text: SNASNet's four words `"0303 0030 2002 0200"`, row = source and column = target, digits 0 zero,
            1 skip, 2 conv1x1, 3 conv3x3, 4 avgpool whatever the kernel sizes here; or named edges
            `"0>1:conv3 0>3:skip"`.

        Returns:
          int8 [E].

        Raises:
          ValueError: the text follows neither notation, or is no cell of this space.
        """
        row = np.zeros(len(self.edges), np.int8)
        for edge, name in notation.read(text).items():
            if edge not in self.edges:
                raise ValueError(f"cell {text!r} has the feedback edge {edge[0]}>{edge[1]}: {self} has none")
            if name not in self.op_names:
                raise ValueError(f"cell {text!r} has {name} on edge {edge[0]}>{edge[1]}: want {self.op_names}")
            row[self.edges.index(edge)] = self.op_names.index(name)
        for wrong, why in self._faults(row[None]):
            if wrong.any():
                raise ValueError(f"cell {text!r} is no cell of {self}: {why}")
        return row

    def format(self, row: ArrayLike) -> str:
        """Writes one row [E] as it is: four words if every size here is 1 or 3, else named edges."""
        if set(self.kernel_sizes) <= {1, 3}:
            return notation.words(self._named(row))
        return self.explicit(row)

    def explicit(self, row: ArrayLike) -> str:
        """Writes one row [E] as named edges, which `parse` reads in every space that holds the cell."""
        return notation.edge_list(self._named(row))

    def convert(self, rows: ArrayLike, source: "CellSpace") -> Rows:
        """Re-encodes rows of another space for this one.

        Args:
          rows: ints [n, E of source] or [E of source].
          source: the space the rows are from.

        Returns:
          int8 [n, E] or [E].

        Raises:
          ValueError: a row uses a kernel size or a feedback edge this space lacks, or too many sizes.
        """
        source.validate(rows)
        old = source._shaped(rows)
        lost = -1
        table = [self.op_names.index(name) if name in self.op_names else lost for name in source.op_names]
        new = np.array(table, np.int8)[old]
        if (new == lost).any():
            missing = source.kernel_size(int(old[new == lost][0]))
            raise ValueError(f"the rows use kernel size {missing}: {self} has {self.kernel_sizes}")
        if not self.feedback and new[:, len(FORWARD_EDGES) :].any():
            raise ValueError(f"the rows use feedback edges: {self} has none")
        out = np.zeros((len(new), len(self.edges)), np.int8)
        width = min(new.shape[1], out.shape[1])
        out[:, :width] = new[:, :width]
        self.validate(out)
        return out.reshape(*np.shape(rows)[:-1], len(self.edges))

    def conv_edges(self, row: ArrayLike) -> list[tuple[int, int, int]]:
        """The convolutions `(source, target, kernel_size)` of one row [E], in the order of `edges`."""
        sizes = [(edge, self.kernel_size(code)) for edge, code in self._coded(row)]
        return [(*edge, size) for edge, size in sizes if size is not None]

    def identity(self, rows: ArrayLike) -> NDArray[np.int64]:
        """An integer for each row that is the same in every space that holds it, and differs for other rows.

        It is written in base 11, one digit an edge in the order of `EDGES`: 0 zero, 1 skip, 2 average
        pooling, 3 + (k - 1) / 2 convolution k; below 2**42. Take it of canonical rows to name a cell, not a
        row.

        Args:
          rows: ints [n, E] or [E].

        Returns:
          int64 [n] or [].
        """
        self.validate(rows)
        convs = [3 + (size - 1) // 2 for size in self.kernel_sizes]
        digits = np.array([0, 1, *convs, 2], np.int64)[self._shaped(rows)]
        base = 3 + (LARGEST_KERNEL + 1) // 2
        return (digits @ base ** np.arange(len(self.edges), dtype=np.int64)).reshape(np.shape(rows)[:-1])

    def _shaped(self, rows: ArrayLike) -> Rows:
        """Rows as [n, E], int8 unless a code is out of its range (kept, so that the fault can be named)."""
        array = np.asarray(rows)
        if array.ndim not in (1, 2) or array.shape[-1] != len(self.edges) or array.dtype.kind not in "iu":
            raise ValueError(
                f"rows have shape {array.shape} and dtype {array.dtype}: want ints [n, {len(self.edges)}] or "
                f"[{len(self.edges)}]"
            )
        return np.clip(array, -1, 127).astype(np.int8).reshape(-1, len(self.edges))

    def _faults(self, rows: Rows) -> Iterator[tuple[NDArray[np.bool_], str]]:
        """Each rule as (which rows break it, what would be right)."""
        yield np.any((rows < 0) | (rows >= self.num_ops), axis=1), f"codes must be 0 to {self.num_ops - 1}"
        yield rows[:, DIRECT] == ZERO, "edge 0>3 must not be zero"
        if self.feedback:
            back = [EDGES.index((target, source)) for source, target in FORWARD_EDGES]
            both = (rows[:, : len(FORWARD_EDGES)] != ZERO) & (rows[:, back] != ZERO)
            yield (
                np.any(both, axis=1),
                "a pair of nodes must hold one edge, forward or feedback, not both directions",
            )
        if self.max_kernel_sizes is not None:
            live = forms.prune(rows, self.edges)
            used = sum((live == code).any(axis=1).astype(int) for code in range(FIRST_CONV, self.avgpool))
            yield (
                np.greater(used, self.max_kernel_sizes),
                f"want at most {self.max_kernel_sizes} kernel sizes",
            )

    def _coded(self, row: ArrayLike) -> list[tuple[tuple[int, int], int]]:
        self.validate(_one(row))
        return list(zip(self.edges, np.asarray(row).tolist(), strict=True))

    def _named(self, row: ArrayLike) -> dict[tuple[int, int], str]:
        return {edge: self.op_names[code] for edge, code in self._coded(row)}

    def _canonical_forward(self, row: Row) -> Row:
        # Only the order of the sizes in use matters, so all spaces share the tables of `canonical.classes`.
        used = tuple(sorted({code for code in row if FIRST_CONV <= code < self.avgpool}))
        codes = (ZERO, SKIP, *used, self.avgpool)
        local = tuple(codes.index(code) for code in row)
        table = forms.classes(tuple(row.count(code) for code in used))
        return tuple(codes[code] for code in table[local])

    def _draw(self, rng: np.random.Generator) -> Rows:
        while True:
            row = np.zeros(len(self.edges), np.int8)
            row[: len(FORWARD_EDGES)] = rng.integers(self.num_ops, size=len(FORWARD_EDGES))
            row[DIRECT] = rng.integers(SKIP, self.num_ops)
            if self.feedback:
                for i in np.flatnonzero(rng.integers(2, size=len(FORWARD_EDGES))).tolist():
                    if i != DIRECT:
                        source, target = FORWARD_EDGES[i]
                        row[EDGES.index((target, source))] = row[i]
                        row[i] = ZERO
            if self.max_kernel_sizes is None or self.is_valid(row)[0]:
                return row


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _one(row: ArrayLike) -> ArrayLike:
    if np.ndim(row) != 1:
        raise ValueError(f"row has shape {np.shape(row)}: want one row, [E]")
    return row


def _key_words(key: Any) -> list[int]:
    """The words of one jax random key, as a seed for numpy."""
    import jax  # kept out of module import: cells are read and printed without an array library

    typed = isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.ndim:
        raise ValueError(f"key is {key!r}: want one key, such as jax.random.key(0)")
    return np.asarray(jax.random.key_data(key)).ravel().tolist()


def kernel_set(text: str, what: str = "kernel set") -> tuple[int, ...]:
    """Reads a kernel set as options and tables write it, ``"3,5"``; `kernel_set_text` writes it.

    Args:
      text: sizes with commas, in any order.
      what: names the text in an error, as ``"--sets"``.

    Returns:
      The sizes in increasing order.

    Raises:
      ValueError: unless they are different odd sizes up to 15.
    """
    try:
        return CellSpace(tuple(sorted(int(part) for part in text.split(",")))).kernel_sizes
    except ValueError:
        wanted = f"want different odd sizes from 1 to {LARGEST_KERNEL} with commas, as 3,5"
        raise ValueError(f"{what} {text!r}: {wanted}") from None


def kernel_set_text(sizes: Iterable[int]) -> str:
    """Writes a kernel set: ``"3,5"``."""
    return ",".join(map(str, sizes))
