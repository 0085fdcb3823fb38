"""Figures of a model on a device; conventions as those of `figures`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikernel_jax.report.figures import BLUE, GREY, ORANGE, new_figure, numeric_columns, save

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure


def embedded_figure(table: "pl.DataFrame", path: str | Path, title: str, images: int) -> "Figure":
    """Draws the accuracy of a model in integers against the width of its weights and against its bytes.

    Beside it stand the float network's, and what rounding alone leaves where the model was trained for its few bits.
    Bars are standard errors of a share of so many images.

    The table has one row for each width: `bits` (32 of the float network), `validation_accuracy`, `rounded_accuracy`,
    `constant_bytes` and `written_bytes` (both null or NaN of the float network where not known).
    """
    wanted = ("bits", "validation_accuracy", "rounded_accuracy", "constant_bytes", "written_bytes")
    bits, accuracy, rounded, constants, written = numeric_columns(table, wanted)
    whole = bits < 32
    order = np.flatnonzero(whole)[np.argsort(bits[whole])]
    exact, kib = accuracy[~whole][0], (constants + written) / 1024
    figure, axes = new_figure(title, (8.6, 3.6), ncols=2, sharey=True)
    for axis, x in zip(axes, (bits, kib), strict=True):
        error = 100 * np.sqrt(accuracy * (1 - accuracy) / images)
        axis.errorbar(
            x[order], 100 * accuracy[order], error[order], color=BLUE, marker="o", capsize=3, label="as exported"
        )
        moved = order[rounded[order] < accuracy[order]]
        axis.scatter(
            x[moved], 100 * rounded[moved], facecolors="none", edgecolors=ORANGE, label="rounded alone", zorder=3
        )
        axis.axhline(100 * exact, color=GREY, linestyle="--", label="float32")
    for size in np.unique(kib[order]):  # widths that are stored alike share a place
        here = order[kib[order] == size]
        text = ", ".join(str(int(width)) for width in bits[here])
        axes[1].annotate(f" {text}", (size, 100 * accuracy[here].max()), fontsize=8, va="bottom")
    axes[0].set_ylabel("validation accuracy (%)")
    axes[0].set_xlabel("bits of a weight")
    axes[0].set_xticks(bits[order])
    axes[1].set_xlabel("static memory of the C (KiB), bits beside")
    axes[0].legend(fontsize=8, frameon=False)
    return save(figure, path)
