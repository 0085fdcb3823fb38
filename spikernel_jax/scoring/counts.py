"""Counts of a cell: what is known of it without a forward pass, and what every score has to beat.

Ning et al. (NeurIPS 2021, "Evaluating Efficient Performance Estimators of Neural Architectures") found that few scores
of untrained networks rank better than the number of parameters does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations.operation import Operation
from spikernel_jax.snn import cost
from spikernel_jax.snn.spec import NetworkSpec


def _longest_path(space: CellSpace, row: ArrayLike, length: Callable[[Operation], int]) -> int:
    """Of a forward cell's paths from node 0 to node 3 the one whose edges' lengths add up to most: that sum."""
    longest = {0: 0}
    for source, target, operation in sorted(space.held(space.prune(row)), key=lambda edge: edge[:2]):
        longest[target] = max(longest.get(target, 0), longest[source] + length(operation))
    return longest[3]


def is_convolution(operation: Operation) -> bool:
    """Whether an operation has weights."""
    return operation.weights(1) > 0


def extent(operation: Operation) -> int:
    """Side of the square of places that one output value of an operation reads."""
    sides = [layer.dilation * (max(layer.shape[:2]) - 1) for layer in operation.layers(1).values() if layer.shape]
    return 1 + sum(sides) + max(operation.window - 1, 0)


def depth(space: CellSpace, row: ArrayLike) -> int:
    """Convolutions on the longest path from node 0 to node 3 of a forward cell; 0 where no path has one."""
    return _longest_path(space, row, is_convolution)


def convolutions(space: CellSpace, row: ArrayLike) -> int:
    """Convolutions that lie on a path from node 0 to node 3; of a canonical cell, those that it differs by."""
    return sum(is_convolution(operation) for *_, operation in space.held(space.prune(row)))


def paths(space: CellSpace, row: ArrayLike) -> int:
    """Paths from node 0 to node 3 of a forward cell."""
    ways = {0: 1}
    for source, target, _ in sorted(space.held(space.prune(row)), key=lambda edge: edge[:2]):
        ways[target] = ways.get(target, 0) + ways[source]
    return ways[3]


def receptive_field(space: CellSpace, row: ArrayLike) -> int:
    """Side of the square of node 0 that a value of node 3 depends on, at most (Araujo et al., Distill 2019)."""
    return 1 + _longest_path(space, row, lambda operation: extent(operation) - 1)


def _of_cells(count: Callable[[CellSpace, Any], int]) -> Callable[[NetworkSpec, NDArray[np.int8]], NDArray[np.float64]]:
    return lambda spec, rows: np.array([count(spec.space, row) for row in rows], np.float64)


def _parameters(spec: NetworkSpec, rows: NDArray[np.int8]) -> NDArray[np.float64]:
    return cost.costs(spec, rows).parameters.astype(np.float64)


def _memory(spec: NetworkSpec, rows: NDArray[np.int8]) -> NDArray[np.float64]:
    return cost.costs(spec, rows).memory_bytes.astype(np.float64)


COUNTS: dict[str, Callable[[NetworkSpec, NDArray[np.int8]], NDArray[np.float64]]] = {
    "depth": _of_cells(depth),
    "convolutions": _of_cells(convolutions),
    "paths": _of_cells(paths),
    "receptive_field": _of_cells(receptive_field),
    "parameters": _parameters,
    "memory": _memory,
}
"""Functions of (spec, rows [n, E]) -> float64 [n], by name."""
