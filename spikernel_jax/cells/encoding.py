"""How cells are written: as rows of codes, as text, and as numbers.

A cell is a graph on four nodes, node 0 its input and node 3 its output; a node is the sum of what comes in. An
`Encoding` says which operations an edge may hold, and writes a cell as a row of int8 codes, one per edge.

Source: Kim et al., ECCV 2022, arXiv 2201.10355 (cells, notation).
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.cells import canonical as forms
from spikernel_jax.cells import notation
from spikernel_jax.cells.canonical import DIRECT, EDGES, FORWARD_EDGES, NOTHING, Codes, Rows
from spikernel_jax.operations.builtin import LARGEST_KERNEL
from spikernel_jax.operations.operation import GENERIC, KINDS, ZERO, Operation, get_operation

DIRECTS = ("required", "any")
_MOST_CODES = 127
_SIZES = (1, 3)


@dataclass(frozen=True, repr=False)
class Encoding:
    """Which operations an edge may hold; the fields are `CellSpace`'s."""

    kernel_sizes: tuple[int, ...] = _SIZES
    feedback: bool = False
    max_kernel_sizes: int | None = None
    operations: tuple[str, ...] = ()
    direct: str = "required"

    def __post_init__(self) -> None:
        """Checks the fields, derives the operations from the kernel sizes or the sizes from the operations."""
        if not isinstance(self.operations, tuple | list):
            raise ValueError(f"operations is {self.operations!r}: want a tuple of names, such as ('zero', 'conv3')")
        sizes = self.kernel_sizes if isinstance(self.kernel_sizes, tuple | list) else (self.kernel_sizes,)
        if self.operations:
            names = _checked_operations(tuple(self.operations))
            own = tuple(sorted(k for k in range(1, LARGEST_KERNEL + 1, 2) if f"conv{k}" in names))
            if tuple(sizes) not in (_SIZES, own):
                raise ValueError(f"kernel_sizes is {tuple(sizes)}: operations give {own}; leave kernel_sizes out")
            sizes = own
        else:
            sizes = _checked_sizes(self.kernel_sizes)
            names = ("zero", "skip", *(f"conv{size}" for size in sizes), "avgpool")
        object.__setattr__(self, "kernel_sizes", sizes)
        object.__setattr__(self, "operations", names)
        if not isinstance(self.feedback, bool):
            raise ValueError(f"feedback is {self.feedback!r}: want True or False")
        if self.direct not in DIRECTS:
            raise ValueError(f"direct is {self.direct!r}: want one of {', '.join(DIRECTS)}")
        limit, most = self.max_kernel_sizes, len(self.codes_of(GENERIC))
        if limit is not None and (not is_int(limit) or not 1 <= limit <= most):
            raise ValueError(f"max_kernel_sizes is {limit!r}: want None or an int from 1 to {most}")
        object.__setattr__(self, "max_kernel_sizes", None if limit is None else int(limit))

    def __repr__(self) -> str:
        """The fields that are not as they are by default."""
        plain = self.operations == ("zero", "skip", *(f"conv{size}" for size in self.kernel_sizes), "avgpool")
        told = ["kernel_sizes" if plain else "operations"]
        told += [f.name for f in fields(self)[1:] if f.name != "operations" and getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in told)})"

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The edges `(source, target)` a row encodes, in its order."""
        return EDGES if self.feedback else FORWARD_EDGES

    @property
    def num_ops(self) -> int:
        """How many codes there are."""
        return len(self.operations)

    def code(self, name: str) -> int:
        """The code of an operation. Raises ValueError if the space does not have it."""
        if name not in self.operations:
            raise ValueError(f"operation {name!r} is not in this space: it has {', '.join(self.operations)}")
        return self.operations.index(name)

    def operation(self, code: int) -> Operation:
        """The operation a code stands for. Raises ValueError if it stands for none."""
        if not 0 <= code < self.num_ops:
            raise ValueError(f"code {code!r} is not in this space: want 0 to {self.num_ops - 1}")
        return _operations(self.operations)[code]

    def codes_of(self, kind: str) -> tuple[int, ...]:
        """The codes of all operations of a kind (`operations.operation.KINDS`)."""
        return tuple(code for code, known in enumerate(_operations(self.operations)) if known.kind == kind)

    @property
    def codes(self) -> Codes:
        """What the codes stand for, as canonical forms see them."""
        return _codes(self.operations, self.direct)

    def validate(self, rows: ArrayLike) -> None:
        """Raises ValueError unless every row is a cell of this space.

        A row is a cell if its codes are in range, edge (0, 3) is not zero (or, with ``direct="any"``, some path leads
        from node 0 to node 3), no unordered pair of nodes holds two edges, and the edges left after `prune` use at most
        `max_kernel_sizes` different generic operations.

        Args:
          rows: ints [n, E] or [E], E the number of `edges`.
        """
        checked = self.shaped(rows)
        for wrong, why in self._faults(checked):
            if wrong.any():
                raise ValueError(f"row {checked[np.argmax(wrong)].tolist()} is no cell of {self}: {why}")

    def is_valid(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Which rows are cells of this space: bool [n]. Raises ValueError only for a wrong shape or dtype."""
        checked = self.shaped(rows)
        return ~functools.reduce(np.logical_or, (wrong for wrong, _ in self._faults(checked)))

    def connected(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Which rows have a path from node 0 to node 3: bool [n], whatever else is wrong with them."""
        return forms.connected(self.shaped(rows), self.edges)

    def index(self, rows: ArrayLike) -> NDArray[np.int64]:
        """The number of raw rows: in base `num_ops`, the first edge of `edges` the highest digit.

        All `num_ops` ** E rows have one, cells or not, and it grows in the lexicographic order of the rows.

        Args:
          rows: ints [n, E] or [E].

        Returns:
          int64 [n] or [].

        Raises:
          ValueError: if a code is out of range, or the space too large to number.
        """
        checked, places = self.shaped(rows), self._places()
        wrong, why = next(self._faults(checked))
        if wrong.any():
            raise ValueError(f"row {checked[np.argmax(wrong)].tolist()} is no row of {self}: {why}")
        return (checked.astype(np.int64) @ places).reshape(np.shape(rows)[:-1])

    def from_index(self, index: ArrayLike) -> Rows:
        """The raw rows of these numbers (`index`), not checked to be cells.

        Args:
          index: ints [n] or [].

        Returns:
          int8 [n, E] or [E].

        Raises:
          ValueError: if a number is out of range, or the space too large to number.
        """
        numbers, places = np.asarray(index), self._places()
        most = self.num_ops ** len(self.edges)
        if numbers.dtype.kind not in "iu" or np.any(numbers < 0) or np.any(numbers >= most):
            raise ValueError(f"index is {index!r}: want ints from 0 to {most - 1:,}")
        return (numbers[..., None] // places % self.num_ops).astype(np.int8)

    def parse(self, text: str) -> Rows:
        """Reads one cell, in either notation, as written: neither pruned nor canonicalised.

        Args:
          text: SNASNet's four words `"0303 0030 2002 0200"`, row = source and column = target, digits 0 zero,
            1 skip, 2 conv1x1, 3 conv3x3, 4 avgpool whatever the operations here; or named edges
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
            if (known := get_operation(name).name) not in self.operations:
                raise ValueError(f"cell {text!r} has {name} on edge {edge[0]}>{edge[1]}: want {self.operations}")
            row[self.edges.index(edge)] = self.operations.index(known)
        for wrong, why in self._faults(row[None]):
            if wrong.any():
                raise ValueError(f"cell {text!r} is no cell of {self}: {why}")
        return row

    def format(self, row: ArrayLike) -> str:
        """Writes one row [E] as it is: four words if SNASNet has all operations of this space, else named edges."""
        if set(self.operations) <= set(notation.DIGITS):
            return notation.words(self._named(row))
        return self.explicit(row)

    def explicit(self, row: ArrayLike) -> str:
        """Writes one row [E] as named edges, which `parse` reads in every space that holds the cell."""
        return notation.edge_list(self._named(row))

    def convert(self, rows: ArrayLike, source: Self) -> Rows:
        """Re-encodes rows of another space for this one.

        Args:
          rows: ints [n, E of source] or [E of source].
          source: the space the rows are from.

        Returns:
          int8 [n, E] or [E].

        Raises:
          ValueError: a row uses an operation or a feedback edge this space lacks, or too many operations.
        """
        source.validate(rows)
        old = source.shaped(rows)
        lost = -1
        table = [self.operations.index(name) if name in self.operations else lost for name in source.operations]
        new = np.array(table, np.int8)[old]
        if (new == lost).any():
            missing = source.operations[int(old[new == lost][0])]
            raise ValueError(f"the rows use {missing}: {self} does not have it")
        if not self.feedback and new[:, len(FORWARD_EDGES) :].any():
            raise ValueError(f"the rows use feedback edges: {self} has none")
        out = np.zeros((len(new), len(self.edges)), np.int8)
        width = min(new.shape[1], out.shape[1])
        out[:, :width] = new[:, :width]
        self.validate(out)
        return out.reshape(*np.shape(rows)[:-1], len(self.edges))

    def held(self, row: ArrayLike) -> list[tuple[int, int, Operation]]:
        """`(source, target, operation)` of the edges of one row [E] that are not zero, in the order of `edges`."""
        return [(*edge, self.operation(code)) for edge, code in self._coded(row) if code != NOTHING]

    def identity(self, rows: ArrayLike) -> NDArray[np.int64]:
        """An integer for each row that is the same in every space that holds it.

        It is the exclusive or of 63 bits of SHA-256 of each edge's text, as `0>1:conv3`: 20,005 cells collide with a
        probability of 2e-11. Take it of canonical rows to name a cell, not a row.

        Args:
          rows: ints [n, E] or [E].

        Returns:
          int64 [n] or [].
        """
        self.validate(rows)
        words = _words(self.operations)[np.arange(len(self.edges)), self.shaped(rows)]
        return np.bitwise_xor.reduce(words, axis=-1).reshape(np.shape(rows)[:-1])

    def shaped(self, rows: ArrayLike) -> Rows:
        """Rows as [n, E], int8 unless a code is out of its range (kept, so that the fault can be named)."""
        array = np.asarray(rows)
        if array.ndim not in (1, 2) or array.shape[-1] != len(self.edges) or array.dtype.kind not in "iu":
            raise ValueError(
                f"rows have shape {array.shape} and dtype {array.dtype}: want ints [n, {len(self.edges)}] or "
                f"[{len(self.edges)}]"
            )
        return np.clip(array, -1, _MOST_CODES).astype(np.int8).reshape(-1, len(self.edges))

    def _faults(self, rows: Rows) -> Iterator[tuple[NDArray[np.bool_], str]]:
        """Each rule as (which rows break it, what would be right)."""
        yield np.any((rows < 0) | (rows >= self.num_ops), axis=1), f"codes must be 0 to {self.num_ops - 1}"
        if self.direct == "required":
            yield rows[:, DIRECT] == NOTHING, "edge 0>3 must not be zero"
        else:
            yield ~forms.connected(rows, self.edges), "no path leads from node 0 to node 3"
        if self.feedback:
            back = [EDGES.index((target, source)) for source, target in FORWARD_EDGES]
            both = (rows[:, : len(FORWARD_EDGES)] != NOTHING) & (rows[:, back] != NOTHING)
            yield (
                np.any(both, axis=1),
                "a pair of nodes must hold one edge, forward or feedback, not both directions",
            )
        if self.max_kernel_sizes is not None:
            live = forms.prune(rows, self.edges)
            used = sum((live == code).any(axis=1).astype(int) for code in self.codes_of(GENERIC))
            yield (
                np.greater(used, self.max_kernel_sizes),
                f"want at most {self.max_kernel_sizes} different sizes, or generic operations",
            )

    def _places(self) -> NDArray[np.int64]:
        """What a digit is worth, by edge."""
        edges = len(self.edges)
        if self.num_ops**edges > np.iinfo(np.int64).max:
            raise ValueError(f"{self} is too large to number: {self.num_ops} operations on {edges} edges")
        return self.num_ops ** np.arange(edges - 1, -1, -1, dtype=np.int64)

    def _coded(self, row: ArrayLike) -> list[tuple[tuple[int, int], int]]:
        self.validate(one(row))
        return list(zip(self.edges, np.asarray(row).tolist(), strict=True))

    def _named(self, row: ArrayLike) -> dict[tuple[int, int], str]:
        return {edge: self.operations[code] for edge, code in self._coded(row)}


def is_int(value: object) -> bool:
    """Whether a value is a whole number, Python's or NumPy's."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def one(row: ArrayLike) -> ArrayLike:
    """One row [E]; ValueError else."""
    if np.ndim(row) != 1:
        raise ValueError(f"row has shape {np.shape(row)}: want one row, [E]")
    return row


def _checked_sizes(kernel_sizes: object) -> tuple[int, ...]:
    want = f"want odd ints from 1 to {LARGEST_KERNEL} in increasing order, such as (1, 3)"
    if not isinstance(kernel_sizes, tuple | list) or not kernel_sizes:
        raise ValueError(f"kernel_sizes is {kernel_sizes!r}: {want}")
    for size in kernel_sizes:
        if not is_int(size) or size < 1 or size % 2 == 0 or size > LARGEST_KERNEL:
            raise ValueError(f"kernel_sizes is {kernel_sizes!r}, with {size!r}: {want}")
    sizes = tuple(int(size) for size in kernel_sizes)
    if sizes != tuple(sorted(set(sizes))):
        raise ValueError(f"kernel_sizes is {sizes}: {want}; here {tuple(sorted(set(sizes)))}")
    return sizes


def _checked_operations(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as they are written best."""
    known = [get_operation(name) for name in names]
    kinds = [operation.kind for operation in known]
    if kinds[0] != ZERO or len(known) < 2 or len(known) > _MOST_CODES:
        raise ValueError(f"operations is {names}: want 'zero' first, and up to {_MOST_CODES - 1} others")
    for kind in KINDS[:2]:
        if kinds.count(kind) > 1:
            raise ValueError(f"operations is {names}: want one operation of kind {kind!r}")
    best = tuple(operation.name for operation in known)
    if twice := [name for name in best if best.count(name) > 1]:
        raise ValueError(f"operations is {names}: {twice[0]!r} is there twice")
    return best


@functools.cache
def _operations(names: tuple[str, ...]) -> tuple[Operation, ...]:
    return tuple(get_operation(name) for name in names)


@functools.cache
def _codes(names: tuple[str, ...], direct: str) -> Codes:
    neurons = [operation.neuron for operation in _operations(names)]
    distinct = [neuron for neuron in dict.fromkeys(neurons) if neuron is not None]
    numbers = tuple(-1 if neuron is None else distinct.index(neuron) for neuron in neurons)
    return Codes(tuple(operation.kind for operation in _operations(names)), numbers, direct == "required")


@functools.cache
def _words(names: tuple[str, ...]) -> NDArray[np.int64]:
    """63 random bits for each edge and operation, 0 for zero: [12, num_ops]."""

    def word(edge: tuple[int, int], name: str) -> int:
        digest = hashlib.sha256(f"{edge[0]}>{edge[1]}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    return np.array([[0, *(word(edge, name) for name in names[1:])] for edge in EDGES], np.int64)
