"""The plain convolutions of a cell, which many tests count."""

from typing import Any

from spikernel_jax.cells.space import CellSpace


def conv_edges(space: CellSpace, row: Any) -> list[tuple[int, int, int]]:
    """(source, target, size) of each convolution of a row."""
    return [(source, target, int(op.name[4:])) for source, target, op in space.held(row) if op.name.startswith("conv")]
