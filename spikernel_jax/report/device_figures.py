"""Figures of a model on a device; conventions as those of `figures`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikernel_jax.report.figures import BLUE, GREY, new_figure, numeric_columns, save

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure


def embedded_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws the accuracy of a model in integers against the width of its weights, the float network's beside it.

    The table has one row for each width: `bits` (32 of the float network) and `validation_accuracy`.
    """
    bits, accuracy = numeric_columns(table, ("bits", "validation_accuracy"))
    whole, order = bits < 32, np.argsort(bits)
    order = order[whole[order]]
    figure, (axis,) = new_figure(title, (5.6, 3.6))
    axis.plot(bits[order], 100 * accuracy[order], color=BLUE, marker="o", label="integers")
    axis.axhline(100 * accuracy[~whole][0], color=GREY, linestyle="--", label="float32")
    axis.set_ylabel("validation accuracy (%)")
    axis.set_xlabel("bits of a weight")
    axis.set_xticks(bits[order])
    axis.legend(fontsize=8, frameon=False)
    return save(figure, path)
