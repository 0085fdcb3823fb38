"""Published tables of trained cells, and how they are halved."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikernel_jax.cells.space import CellSpace

if TYPE_CHECKING:
    import polars as pl

_PUBLISHED = Path(__file__).parent / "published"
ABOUT = "spikernel_jax"  # what the facts of a table go by in its file
HALVES = LOOKING, HELD_OUT = ("looking", "held_out")


def half_of(space: CellSpace, row: Any) -> str:
    """Which half of a table a cell is in, whatever else is: ``"looking"``, or ``"held_out"`` and looked at once."""
    return HALVES[int(space.identity(space.canonical(row))) % 2]


def load_trained_cells(which: str | Path = "cifar10", half: str | None = None) -> "pl.DataFrame":
    """A published table of trained cells; its card is ``studies/published/README.md``.

    Args:
      which: name of a published table (``"cifar10"``, or the small ``"mnist5k"``), or path of one's own.
      half: ``"looking"``, where choices are made, or ``"held_out"``, to be looked at once; None is both.

    Returns:
      A row for each cell and seed.

    Raises:
      ValueError: on another half, or a file that is no such table.

    Example:
      >>> from spikernel_jax import load_trained_cells
      >>> table = load_trained_cells("mnist5k", half="looking")
      >>> bool(table["test_accuracy"].is_between(0, 1).all())
      True
    """
    if half not in (None, *HALVES):
        raise ValueError(f"half={half!r} is unknown; known: {', '.join(HALVES)}, and None for both")
    table, _ = read_table(which)
    return table if half is None else table.filter(table["half"] == half)


def read_table(which: str | Path) -> tuple["pl.DataFrame", dict[str, Any]]:
    """A table and the facts of it; arguments and errors as `load_trained_cells`."""
    import polars as pl

    published = sorted(path.stem for path in _PUBLISHED.glob("*.parquet"))
    path = _PUBLISHED / f"{which}.parquet" if str(which) in published else Path(which)
    if not path.is_file():
        raise ValueError(f"table {str(which)!r} is unknown; known: {', '.join(published)}, or the path of one's own")
    try:
        facts = json.loads(pl.read_parquet_metadata(path)[ABOUT])
        return pl.read_parquet(path), facts
    except (pl.exceptions.PolarsError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no table of experiments/trained_cells.py: {type(error).__name__}") from None
